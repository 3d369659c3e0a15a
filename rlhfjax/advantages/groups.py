"""Baselines from the other responses to the same prompt.

A group is the responses whose `group_ids` are equal; they need not be neighbours, and groups may
differ in size. A masked response (one without a score, say) belongs to no group and gets 0.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.advantages.returns import discounted_returns


def group_relative(
    scores: Array, group_ids: Array, mask: Array | None = None, *, keep_singletons: bool = False
) -> Array:
    """score - mean of its group (Dr.GRPO; GRPO after `scale_by_group_std`).

    Args:
      scores: [B].
      group_ids: [B] int.
      mask: [B] bool; None when all responses count.
      keep_singletons: a group of one keeps its score (verl) instead of getting 0 (TRL, Tunix).

    Returns:
      [B] float32; 0 at masked responses.

    Raises:
      AssertionError: shapes differ, wrong rank or dtypes.

    References:
      Liu et al. 2025, Understanding R1-Zero-Like Training; Shao et al. 2024, DeepSeekMath.
    """
    scores, same, mask = _groups(scores, group_ids, mask)
    return _minus(scores, _mean(scores, same), same, mask, keep_singletons)


def scale_by_group_std(
    advantages: Array,
    scores: Array,
    group_ids: Array,
    mask: Array | None = None,
    *,
    ddof: int = 1,
    eps: float | Array = 1e-4,
    min_std: float | Array = 0.0,
) -> Array:
    """advantage / (max(σ, min_std) + eps), σ the standard deviation of the scores of its group.

    To divide by that of the whole batch, use `masked.standardize` with a mean of 0.

    Args:
      advantages: [B], of `group_relative` or another baseline.
      scores: [B] whose spread is measured.
      group_ids: [B] int.
      mask: [B] bool; None when all responses count.
      ddof: 1 for the unbiased σ (nearly all), 0 for the biased one (HALOs).
      eps: added to σ. 1e-4 in TRL, 1e-6 in verl and Tunix, 1e-9 in OpenRLHF, 1e-2 in HALOs: with
        equal scores the advantage is 0, with nearly equal ones it is eps that decides.
      min_std: σ is at least this.

    Returns:
      [B] float32; unscaled in groups of `ddof` members or fewer, which have no σ; 0 where the
      divisor is 0.

    Raises:
      AssertionError: shapes differ, wrong rank or dtypes.

    References:
      Shao et al. 2024, DeepSeekMath, §4.1.2.
    """
    scores, same, mask = _groups(scores, group_ids, mask)
    advantages = masked.fill(advantages, mask)
    deviations = scores - _mean(scores, same)
    freedom = same.sum(-1) - ddof
    variance = _sum(jnp.square(deviations), same) / jnp.maximum(freedom, 1)
    std = jnp.sqrt(jnp.where(variance > 0, variance, 1.0)) * (variance > 0)
    divisor = jnp.where(freedom > 0, jnp.maximum(std, min_std) + eps, 1.0)
    return jnp.where(divisor > 0, advantages / jnp.where(divisor > 0, divisor, 1.0), 0.0)


def leave_one_out(
    scores: Array, group_ids: Array, mask: Array | None = None, *, keep_singletons: bool = False
) -> Array:
    """score - mean of the others in its group (RLOO).

    Args:
      scores: [B].
      group_ids: [B] int.
      mask: [B] bool; None when all responses count.
      keep_singletons: a group of one keeps its score (verl) instead of getting 0 (TRL, Tunix).

    Returns:
      [B] float32; 0 at masked responses.

    Raises:
      AssertionError: shapes differ, wrong rank or dtypes.

    References:
      Ahmadian et al. 2024, Back to Basics, eq. 8; Kool et al. 2019.
    """
    scores, same, mask = _groups(scores, group_ids, mask)
    others = _others(same)
    return _minus(scores, _mean(scores, others), same, mask, keep_singletons)


def opo(
    scores: Array,
    lengths: Array,
    group_ids: Array,
    mask: Array | None = None,
    *,
    keep_singletons: bool = False,
) -> Array:
    """score - Σ length·score / Σ length over its group: the optimal baseline of OPO.

    Args:
      scores: [B].
      lengths: [B] tokens of each response; the baseline of a group without any is 0.
      group_ids: [B] int.
      mask: [B] bool; None when all responses count.
      keep_singletons: a group of one keeps its score (verl) instead of getting 0.

    Returns:
      [B] float32; 0 at masked responses.

    Raises:
      AssertionError: shapes differ, wrong rank or dtypes.

    References:
      Hao et al. 2025, On-Policy RL with Optimal Reward Baseline.
    """
    scores, same, mask = _groups(scores, group_ids, mask)
    baseline = _mean(scores, same, masked.fill(lengths, mask))
    return _minus(scores, baseline, same, mask, keep_singletons)


def gpg(
    scores: Array, group_ids: Array, mask: Array | None = None, *, keep_singletons: bool = False
) -> Array:
    """α·(score - mean of its group), α = responses / responses whose score is not 0.

    Args:
      scores: [B].
      group_ids: [B] int.
      mask: [B] bool; None when all responses count.
      keep_singletons: a group of one keeps its score (verl) instead of getting 0.

    Returns:
      [B] float32; 0 at masked responses.

    Raises:
      AssertionError: shapes differ, wrong rank or dtypes.

    References:
      Chu et al. 2025, GPG: Group Policy Gradient; α as in verl.
    """
    scores, same, mask = _groups(scores, group_ids, mask)
    relative = _minus(scores, _mean(scores, same), same, mask, keep_singletons)
    return relative * mask.sum() / jnp.maximum(jnp.count_nonzero(scores), 1)


def pass_at_k(scores: Array, group_ids: Array, mask: Array | None = None) -> Array:
    """max(0, score - best of the others in its group): only the best response gets anything.

    Args:
      scores: [B].
      group_ids: [B] int.
      mask: [B] bool; None when all responses count.

    Returns:
      [B] float32; 0 at masked responses and in groups of one (verl refuses those).

    Raises:
      AssertionError: shapes differ, wrong rank or dtypes.

    References:
      Tang et al. 2025, Optimizing Language Models for Inference Time Objectives, as in verl.
    """
    scores, same, _ = _groups(scores, group_ids, mask)
    others = _others(same)
    best = jnp.where(others, scores, -jnp.inf).max(-1)
    return jnp.where(others.any(-1), jnp.maximum(scores - best, 0.0), 0.0)


def optimal_token_baseline(
    rewards: Array, log_probs: Array, collisions: Array, mask: Array, group_ids: Array
) -> Array:
    """Aₜ = Gₜ - Bₜ, with a baseline for every group and position that minimises the variance.

    Gₜ = Σ_{s≥t} rₛ, Wₜ = Σ_{s≤t} (1 - 2·πₛ + Σ_a πₛ(a)²), Bₜ = Σ G·W / Σ W over the group.

    Args:
      rewards: [B, T].
      log_probs: [B, T] log π of the sampled tokens.
      collisions: [B, T] Σ_a π(a)², the probability that two samples agree.
      mask: [B, T] bool.
      group_ids: [B] int.

    Returns:
      [B, T] float32; 0 at masked tokens; G itself in groups of one.

    Raises:
      AssertionError: shapes do not fit, wrong rank or dtypes.

    References:
      The optimal token baseline of verl; Weaver and Tao 2001, The Optimal Reward Baseline.
    """
    chex.assert_equal_shape([rewards, log_probs, collisions, mask])
    returns = discounted_returns(rewards, mask, gamma=1.0)
    likelihood = jnp.exp(masked.fill(log_probs, mask))
    weights = masked.fill(1.0 - 2.0 * likelihood + masked.fill(collisions, mask), mask)
    weights = masked.fill(jnp.cumsum(weights, axis=-1), mask)
    _, same, _ = _groups(group_ids, group_ids, mask.any(-1))

    def baseline(returns: Array, weights: Array) -> Array:
        return _sum(returns * weights, same) / (_sum(weights, same) + 1e-8)

    baselines = jax.vmap(baseline, in_axes=-1, out_axes=-1)(returns, weights)
    baselines = jnp.where(same.sum(-1, keepdims=True) > 1, baselines, 0.0)
    return masked.fill(returns - baselines, mask)


def _groups(scores: Array, group_ids: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Filled scores, which responses [B, B] share a group, and the mask."""
    chex.assert_rank(scores, 1)
    mask = jnp.ones(scores.shape, bool) if mask is None else mask
    chex.assert_equal_shape([scores, group_ids, mask])
    chex.assert_type([group_ids, mask], [int, bool])
    same = (group_ids[:, None] == group_ids) & mask[:, None] & mask
    return masked.fill(scores, mask), same, mask


def _others(same: Array) -> Array:
    return same & ~jnp.eye(same.shape[-1], dtype=bool)


def _sum(x: Array, same: Array) -> Array:
    return jnp.where(same, x, 0.0).sum(-1)


def _mean(scores: Array, same: Array, weights: float | Array = 1.0) -> Array:
    """Around the largest, so that the mean of equal scores is that score to the bit."""
    weights = jnp.where(same, weights, 0.0)
    counted = weights > 0
    top = jnp.where(counted, scores, -jnp.inf).max(-1)
    top = jnp.where(counted.any(-1), top, 0.0)
    below = weights * jnp.where(counted, scores - top[:, None], 0.0)
    return top + below.sum(-1) / jnp.maximum(weights.sum(-1), 1.0)


def _minus(
    scores: Array, baseline: Array, same: Array, mask: Array, keep_singletons: bool
) -> Array:
    alone = jnp.where(keep_singletons, scores, 0.0)
    return masked.fill(jnp.where(same.sum(-1) > 1, scores - baseline, alone), mask)
