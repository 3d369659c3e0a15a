"""Losses of the policy in which every token is an action, with a ratio π / π_old of its own.

Every loss takes two more arguments. `weights` multiply the loss of each token: importance weights
for a sampler that is not the learner, a selection of tokens. `reduce` says how tokens are averaged,
see `reductions`; GRPO, DAPO and Dr.GRPO are `ppo_clip` under three of them.

Gradients flow to `log_probs` only. Bounds are applied to the log ratio, the input of the
exponential, so that a ratio which overflows where it is clipped anyway costs neither value nor
gradient.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _ratios
from rlhfjax.losses.reductions import sequence_mean
from rlhfjax.types import Loss, Reduction


def ppo_clip(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float | Array = 0.2,
    clip_range_high: float | Array | None = None,
    dual_clip: float | Array | None = None,
    log_ratio_clip: float | Array | None = None,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-min(ratio·A, clip(ratio, 1 - ε, 1 + ε_high)·A) of each token.

    ratio = exp(log_probs - old_log_probs) = π / π_old. With a dual clip c the objective is at
    least c·A where A < 0 (for c > 1 + ε_high also TRL's two-sided clipping with δ = c).

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [..., T].
      mask: [..., T] bool.
      clip_range: ε.
      clip_range_high: ε_high; None takes ε.
      dual_clip: c > 1; None for no such bound.
      log_ratio_clip: |log ratio| is bounded by it before anything else; None for no bound.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: scalars over the tokens. `clip_fraction`, those whose clipped term is the smaller
        one; `dual_clip_fraction`, those that only the dual clip holds; `approx_kl`, mean of
        ½·(log ratio)² before `log_ratio_clip`; `ratio` and `ratio_var`, mean and biased variance
        of the ratio, infinite where one overflows.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 7; Ye et al. 2020,
      Mastering Complex Control in MOBA Games (dual clip); Yu et al. 2025, DAPO (ε_high).
    """
    log_ratio, advantages, weights = _ratios.prepare(
        log_probs, old_log_probs, advantages, mask, weights
    )
    bounded = _ratios.bounded(log_ratio, log_ratio_clip)
    low, high = _ratios.log_bounds(clip_range, clip_range_high)
    clipped, is_clipped = _ratios.clip(bounded, advantages, low, high)
    is_capped = jnp.zeros_like(mask)
    if dual_clip is not None:
        ceiling = jnp.log(dual_clip)
        is_capped = (advantages < 0) & (clipped > ceiling)
        clipped = jnp.where(is_capped, ceiling, clipped)
    metrics = _ratios.metrics(log_ratio, bounded, is_clipped, mask)
    metrics["dual_clip_fraction"] = masked.mean(is_capped, mask)
    return reduce(_ratios.surrogate(clipped, -advantages * weights), mask), metrics


def cispo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float | Array = 0.2,
    clip_range_high: float | Array | None = None,
    log_ratio_clip: float | Array | None = None,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-sg(clip(ratio, 1 - ε, 1 + ε_high))·A·log π: clipped tokens keep their gradient.

    TRL's form has an absolute cap and no floor: `policy_gradient` with weights of
    `advantages.truncate_weights`.

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [..., T].
      mask: [..., T] bool.
      clip_range: ε.
      clip_range_high: ε_high; None takes ε.
      log_ratio_clip: |log ratio| is bounded by it before anything else; None for no bound.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: as of `ppo_clip`, but for the dual clip; `clip_fraction` counts the tokens outside
        the range, on any side.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      MiniMax 2025, MiniMax-M1, eq. 4.
    """
    log_ratio, advantages, weights = _ratios.prepare(
        log_probs, old_log_probs, advantages, mask, weights
    )
    bounded = _ratios.bounded(log_ratio, log_ratio_clip)
    low, high = _ratios.log_bounds(clip_range, clip_range_high)
    ratio = jax.lax.stop_gradient(jnp.exp(jnp.clip(bounded, low, high)))
    is_clipped = (bounded < low) | (bounded > high)
    metrics = _ratios.metrics(log_ratio, bounded, is_clipped, mask)
    return reduce(-ratio * advantages * masked.fill(log_probs, mask) * weights, mask), metrics


def sapo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    gain_temperature: float | Array = 1.0,
    loss_temperature: float | Array = 1.05,
    log_ratio_clip: float | Array | None = None,
    weights: float | Array = 1.0,
    reduce: Reduction = sequence_mean,
) -> Loss:
    """-A·sigmoid(τ·(ratio - 1))·4/τ: a soft gate in place of the clip.

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [..., T].
      mask: [..., T] bool.
      gain_temperature: τ where A > 0.
      loss_temperature: τ elsewhere; larger, so that unwanted tokens fade sooner.
      log_ratio_clip: |log ratio| is bounded by it before anything else; None for no bound.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: as of `ppo_clip`, but for the dual clip; nothing is clipped.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Gao et al. 2025, Soft Adaptive Policy Optimization, eq. 5.
    """
    log_ratio, advantages, weights = _ratios.prepare(
        log_probs, old_log_probs, advantages, mask, weights
    )
    bounded = _ratios.bounded(log_ratio, log_ratio_clip)
    temperature = jnp.where(advantages > 0, gain_temperature, loss_temperature)
    # Beyond e^20 the gate is 1 to the last bit; there exp would make its gradient 0·inf.
    ratio = jnp.exp(jnp.minimum(bounded, 20.0))
    gate = jax.nn.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature
    metrics = _ratios.metrics(log_ratio, bounded, jnp.zeros_like(mask), mask)
    return reduce(-advantages * gate * weights, mask), metrics


def kl_cov(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    fraction: float | Array = 2e-3,
    kl_coef: float | Array = 1.0,
    log_ratio_clip: float | Array | None = 20.0,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-ratio·A, + β·|log ratio| for the tokens of the largest covariance of A and log π.

    The covariance of a token is (A - mean A)·(log π - mean log π), with the means of all tokens of
    the call; the penalty holds back the few tokens that would cost most entropy. Of equal ones the
    first are taken.

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [..., T].
      mask: [..., T] bool.
      fraction: of the True tokens that are penalised, rounded down; at least one is.
      kl_coef: β.
      log_ratio_clip: |log ratio| is bounded by it in the ratio, which nothing else clips; None for
        no bound, but two ratios that overflow with A of both signs then make the loss NaN.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: as of `ppo_clip`, but for the dual clip; `clip_fraction` is the fraction of
        penalised tokens.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning Language
      Models, §4.
    """
    log_ratio, advantages, weights = _ratios.prepare(
        log_probs, old_log_probs, advantages, mask, weights
    )
    bounded = _ratios.bounded(log_ratio, log_ratio_clip)
    now = jax.lax.stop_gradient(masked.fill(log_probs, mask))
    deviations = (x - masked.mean(x, mask) for x in (advantages, now))
    covariance = masked.fill(jnp.multiply(*deviations), mask, value=-jnp.inf)
    # A little more than the product, which may round to just below a whole number.
    chosen = jnp.maximum(jnp.floor(masked.sum(mask, mask) * fraction * (1 + 1e-6)), 1.0)
    rank = jnp.argsort(jnp.argsort(-covariance, axis=None)).reshape(mask.shape)
    penalised = rank < chosen
    # |log ratio|, but without the derivative 1 that jnp.abs has at 0, on the policy that sampled.
    penalty = jnp.where(penalised, kl_coef * jnp.sign(log_ratio) * log_ratio, 0.0)
    metrics = _ratios.metrics(log_ratio, bounded, penalised, mask)
    return reduce(
        penalty * weights + _ratios.surrogate(bounded, -advantages * weights), mask
    ), metrics


def policy_gradient(
    log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-A·log π: REINFORCE, the gradient that the losses of ratios have on the policy that sampled.

    Args:
      log_probs: [..., T] under the policy that is trained.
      advantages: [..., T].
      mask: [..., T] bool.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: empty.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Williams 1992, Simple Statistical Gradient-Following Algorithms.
    """
    chex.assert_equal_shape([log_probs, advantages, mask])
    advantages = jax.lax.stop_gradient(masked.fill(advantages, mask))
    weights = _ratios.token_weights(weights, mask)
    return reduce(-advantages * masked.fill(log_probs, mask) * weights, mask), {}


def entropy_loss(
    entropies: Array,
    mask: Array,
    *,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-H of each token, to be added with a coefficient: the entropy bonus as a loss (rlax's sign).

    Args:
      entropies: [..., T], see `log_probs.entropy`.
      mask: [..., T] bool.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: empty.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    entropies, weights = masked.fill(entropies, mask), _ratios.token_weights(weights, mask)
    return reduce(-entropies * weights, mask), {}
