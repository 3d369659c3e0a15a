"""Losses of the policy in which a response is one action, with one ratio π / π_old.

Every token of a response carries the loss of the response, so that `reduce` may count responses
or weigh them by their length. Gradients flow to `log_probs` only; see `policy` for `weights`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _ratios
from rlhfjax.losses.reductions import sequence_mean
from rlhfjax.types import Loss, Reduction


def gspo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float | Array = 3e-4,
    clip_range_high: float | Array | None = None,
    weights: float | Array = 1.0,
    reduce: Reduction = sequence_mean,
) -> Loss:
    """-min(s·A, clip(s, 1 - ε, 1 + ε_high)·A) of each response, s = exp(mean of its log ratios).

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [...] one a response.
      mask: [..., T] bool.
      clip_range: ε.
      clip_range_high: ε_high; None takes ε.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: as of `ppo_clip`, but for the dual clip, over responses that have a token.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.

    References:
      Zheng et al. 2025, Group Sequence Policy Optimization, eq. 5.
    """
    log_ratio, _, weights = _ratios.prepare(
        log_probs, old_log_probs, _ratios.spread(advantages, mask), mask, weights
    )
    log_ratio = masked.mean(log_ratio, mask, axis=-1)
    return _of_responses(log_ratio, advantages, mask, clip_range, clip_range_high, weights, reduce)


def gspo_token(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float | Array = 3e-4,
    clip_range_high: float | Array | None = None,
    log_ratio_clip: float | Array | None = 10.0,
    weights: float | Array = 1.0,
    reduce: Reduction = sequence_mean,
) -> Loss:
    """`ppo_clip` with sₜ = sg(s)·π / sg(π): the ratio of the response, the gradient of the token.

    Equal to `gspo` in value and gradient where advantages and weights are those of responses; here
    they may differ from token to token.

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [..., T].
      mask: [..., T] bool.
      clip_range: ε.
      clip_range_high: ε_high; None takes ε.
      log_ratio_clip: log s is at most this (verl, Tunix); None for no bound.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: as of `ppo_clip`, but for the dual clip, over tokens and of the ratio s.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Zheng et al. 2025, Group Sequence Policy Optimization, eq. 14.
    """
    log_ratio, advantages, weights = _ratios.prepare(
        log_probs, old_log_probs, advantages, mask, weights
    )
    mean = masked.mean(log_ratio, mask, axis=-1)[..., None]
    own = log_ratio - jax.lax.stop_gradient(log_ratio)
    log_ratio = jax.lax.stop_gradient(mean) + own
    bounded = log_ratio if log_ratio_clip is None else jnp.minimum(log_ratio, log_ratio_clip)
    low, high = _ratios.log_bounds(clip_range, clip_range_high)
    clipped, is_clipped = _ratios.clip(bounded, advantages, low, high)
    metrics = _ratios.metrics(log_ratio, bounded, is_clipped, mask)
    return reduce(_ratios.surrogate(clipped, -advantages * weights), mask), metrics


def rloo_clip(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float | Array = 0.2,
    clip_range_high: float | Array | None = None,
    weights: float | Array = 1.0,
    reduce: Reduction = sequence_mean,
) -> Loss:
    """-min(r·A, clip(r, 1 - ε, 1 + ε_high)·A) of each response, r = exp(Σₜ log ratio).

    The whole response is one action; `gspo` takes the mean where this takes the sum.

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [...] one a response.
      mask: [..., T] bool.
      clip_range: ε.
      clip_range_high: ε_high; None takes ε.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: as of `ppo_clip`, but for the dual clip, over responses that have a token.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.

    References:
      Ahmadian et al. 2024, Back to Basics; the ratio as in TRL.
    """
    log_ratio, _, weights = _ratios.prepare(
        log_probs, old_log_probs, _ratios.spread(advantages, mask), mask, weights
    )
    log_ratio = masked.sum(log_ratio, mask, axis=-1)
    return _of_responses(log_ratio, advantages, mask, clip_range, clip_range_high, weights, reduce)


def gmpo(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float | Array = 0.4,
    clip_range_high: float | Array | None = None,
    weights: float | Array = 1.0,
    reduce: Reduction = sequence_mean,
) -> Loss:
    """-A·exp(mean over tokens of the clipped log ratio) of each response: the geometric mean.

    A token's log ratio is clipped to [-ε, ε_high], on the side where it helps the objective.

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [...] one a response.
      mask: [..., T] bool.
      clip_range: ε, of the logarithm.
      clip_range_high: ε_high, of the logarithm; None takes ε.
      weights: broadcastable to [..., T]; numbers, without a gradient.
      reduce: from the tokens' losses, each that of its response, to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: as of `ppo_clip`, but for the dual clip, over tokens.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.

    References:
      Zhao et al. 2025, Geometric-Mean Policy Optimization, eq. 4.
    """
    log_ratio, spread, weights = _ratios.prepare(
        log_probs, old_log_probs, _ratios.spread(advantages, mask), mask, weights
    )
    high = clip_range if clip_range_high is None else clip_range_high
    clipped, is_clipped = _ratios.clip(log_ratio, spread, -clip_range, high)
    of_response = _ratios.spread(masked.mean(clipped, mask, axis=-1), mask)
    metrics = _ratios.metrics(log_ratio, log_ratio, is_clipped, mask)
    return reduce(_ratios.surrogate(of_response, -spread * weights), mask), metrics


def _of_responses(
    log_ratio: Array,
    advantages: Array,
    mask: Array,
    clip_range: float | Array,
    clip_range_high: float | Array | None,
    weights: Array,
    reduce: Reduction,
) -> Loss:
    """The clipped loss of a ratio [...] and an advantage [...], at each token of the response."""
    real = mask.any(-1)
    advantages = jax.lax.stop_gradient(masked.fill(advantages, real))
    low, high = _ratios.log_bounds(clip_range, clip_range_high)
    clipped, is_clipped = _ratios.clip(log_ratio, advantages, low, high)
    metrics = _ratios.metrics(log_ratio, log_ratio, is_clipped, real)
    scale = -_ratios.spread(advantages, mask) * weights
    return reduce(_ratios.surrogate(_ratios.spread(clipped, mask), scale), mask), metrics
