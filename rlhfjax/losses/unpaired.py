"""Losses of single responses that are known to be desirable or not.

The implicit reward of a response is r = β·(log π - log π_ref), of sums over its tokens. Gradients
flow to the policy's log-probabilities only. `weights` and `reduce` are those of `preference`.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _pairs
from rlhfjax.types import Loss, Reduction


def reference_kl(log_probs: Array, ref_log_probs: Array, mask: Array | None = None) -> Array:
    """max(0, mean of log π - log π_ref) over responses that belong to other prompts: z of `kto`.

    Args:
      log_probs: [N] of the mismatched responses under the policy.
      ref_log_probs: [N] under the reference.
      mask: [N] bool, the rows that count; None when all do. HALOs leaves out empty responses.

    Returns:
      scalar float32.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization.
    """
    mask = _pairs.all_real(log_probs) if mask is None else mask
    return jax.nn.relu(masked.mean(_pairs.log_ratio(log_probs, ref_log_probs, mask), mask))


def kto(
    log_probs: Array,
    ref_log_probs: Array,
    desirable: Array,
    kl: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    desirable_weight: float | Array = 1.0,
    undesirable_weight: float | Array = 1.0,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """λ_d·(1 - σ(r - β·z)) of desirable responses, λ_u·(1 - σ(β·z - r)) of the others.

    With z = 0 it is the unpaired form of APO-zero.

    Args:
      log_probs: [...] of responses under the policy that is trained.
      ref_log_probs: [...] under the reference.
      desirable: [...] bool.
      kl: z, scalar or [...], see `reference_kl`.
      mask: [...] bool, False for the rows that only fill a batch; None when all are real.
      beta: β.
      desirable_weight: λ_d.
      undesirable_weight: λ_u.
      weights: broadcastable to [...]; numbers, without a gradient.
      reduce: from the losses of responses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: `rewards/chosen` and `rewards/rejected`, means of r over desirable and other
        responses; `rewards/margins`, their difference; `kl`, the mean of z.

    Raises:
      AssertionError: shapes differ or `desirable` or `mask` is not bool.

    References:
      Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization.
    """
    rewards, mask = _rewards(log_probs, ref_log_probs, desirable, mask, beta)
    kl = jax.lax.stop_gradient(jnp.where(mask, kl, 0.0))
    gains = rewards - beta * kl
    losses = jnp.where(
        desirable,
        desirable_weight * jax.nn.sigmoid(-gains),
        undesirable_weight * jax.nn.sigmoid(gains),
    )
    loss, metrics = _result(losses, rewards, desirable, mask, weights, reduce)
    return loss, metrics | {"kl": masked.mean(kl, mask)}


def bco(
    log_probs: Array,
    ref_log_probs: Array,
    desirable: Array,
    reward_shift: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(r - δ) of desirable responses, -log σ(δ - r) of the others.

    Args:
      log_probs: [...] of responses under the policy that is trained.
      ref_log_probs: [...] under the reference.
      desirable: [...] bool.
      reward_shift: δ, scalar or [...]: a running mean of the rewards of all responses, that of this
        batch included, see `masked.Moments` and `preference.implicit_rewards`.
      mask: [...] bool, False for the rows that only fill a batch; None when all are real.
      beta: β.
      weights: broadcastable to [...]; numbers, without a gradient.
      reduce: from the losses of responses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: `rewards/chosen` and `rewards/rejected`, means of r over desirable and other
        responses; `rewards/margins`, their difference.

    Raises:
      AssertionError: shapes differ or `desirable` or `mask` is not bool.

    References:
      Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment.
    """
    rewards, mask = _rewards(log_probs, ref_log_probs, desirable, mask, beta)
    gains = rewards - jax.lax.stop_gradient(jnp.where(mask, reward_shift, 0.0))
    losses = -jax.nn.log_sigmoid(jnp.where(desirable, gains, -gains))
    return _result(losses, rewards, desirable, mask, weights, reduce)


def _rewards(
    log_probs: Array,
    ref_log_probs: Array,
    desirable: Array,
    mask: Array | None,
    beta: float | Array,
) -> tuple[Array, Array]:
    mask = _pairs.all_real(log_probs) if mask is None else mask
    chex.assert_equal_shape([desirable, mask])
    chex.assert_type(desirable, bool)
    return beta * _pairs.log_ratio(log_probs, ref_log_probs, mask), mask


def _result(
    losses: Array,
    rewards: Array,
    desirable: Array,
    mask: Array,
    weights: float | Array,
    reduce: Reduction,
) -> Loss:
    chosen = masked.mean(rewards, mask & desirable)
    rejected = masked.mean(rewards, mask & ~desirable)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
    }
    loss = reduce(_pairs.weighted(losses, mask, weights), mask)
    return loss, jax.lax.stop_gradient(metrics)
