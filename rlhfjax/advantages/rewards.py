"""Scores of responses: bounded, combined, penalised, and laid out as rewards of tokens.

Where a score is placed is said by the mask: its last True token (verl, OpenRLHF, Tunix); a mask of
ones gives the last column (OpenAI); `sequences.one_past` of the mask the one behind the last token
(TRL).
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def score_at_end(scores: Array, mask: Array) -> Array:
    """rₜ = score at the last True token, 0 elsewhere.

    Args:
      scores: [...] one number a response.
      mask: [..., T] bool. Gaps (the tokens of a tool, say) are allowed.

    Returns:
      [..., T] float32. A row without a True token gets no score.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.
    """
    chex.assert_shape(scores, mask.shape[:-1])
    chex.assert_type(mask, bool)
    remaining = jax.lax.cumsum(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True)
    return spread(scores, mask & (remaining == 1))


def at_ends_of_turns(turn_rewards: Array, turn_ids: Array, mask: Array) -> Array:
    """rₜ = reward of turn k at the last True token of turn k, 0 elsewhere.

    Args:
      turn_rewards: [..., K] one number a turn.
      turn_ids: [..., T] int, the turn from 0 to K - 1 that each token belongs to.
      mask: [..., T] bool, True where the policy wrote.

    Returns:
      [..., T] float32. The reward of a turn without a True token is in none of it.

    Raises:
      AssertionError: shapes do not fit, `turn_ids` is not of integers or `mask` not bool.
    """
    chex.assert_equal_shape([turn_ids, mask])
    chex.assert_shape(turn_rewards, (*mask.shape[:-1], None))
    chex.assert_type([turn_ids, mask], [int, bool])
    columns = jnp.arange(mask.shape[-1])
    of_turn = mask[..., None] & (turn_ids[..., None] == jnp.arange(turn_rewards.shape[-1]))
    last = jnp.max(jnp.where(of_turn, columns[:, None], -1), axis=-2, keepdims=True, initial=-1)
    ends = of_turn & (columns[:, None] == last)
    each = jnp.broadcast_to(turn_rewards[..., None, :], ends.shape)
    return masked.sum(each, ends, axis=-1)


def spread(per_response: Array, mask: Array) -> Array:
    """One number a response at each of its tokens, 0 at masked ones.

    Args:
      per_response: [...], such as advantages.
      mask: [..., T] bool.

    Returns:
      [..., T] float32.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.
    """
    chex.assert_shape(per_response, mask.shape[:-1])
    return masked.fill(jnp.broadcast_to(per_response[..., None], mask.shape), mask)


def penalize_kl(rewards: Array, kl: Array, mask: Array, *, kl_coef: float | Array) -> Array:
    """rₜ - β·klₜ.

    A mask of ones counts the divergence at padding too (OpenRLHF, OpenAI).

    Args:
      rewards: [...] of tokens or of responses.
      kl: [...] divergence from the reference, of the same.
      mask: [...] bool.
      kl_coef: β.

    Returns:
      [...] float32; 0 at masked entries.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    chex.assert_equal_shape([rewards, kl, mask])
    return masked.fill(rewards, mask) - kl_coef * masked.fill(kl, mask)


def token_rewards(
    scores: Array, kl: Array, response_mask: Array, *, kl_coef: float | Array
) -> Array:
    """rₜ = -β·klₜ, plus the score at the last True token.

    Args:
      scores: [...] one number a response.
      kl: [..., T] divergence from the reference at each token.
      response_mask: [..., T] bool. Gaps (the tokens of a tool, say) are allowed.
      kl_coef: β.

    Returns:
      [..., T] float32; 0 at masked tokens. A row without a True token gets no score.

    Raises:
      AssertionError: shapes do not fit or `response_mask` is not bool.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, eq. 2; the score
      at the last valid token as in verl and OpenRLHF.
    """
    rewards = score_at_end(scores, response_mask)
    return penalize_kl(rewards, kl, response_mask, kl_coef=kl_coef)


def bound_scores(scores: Array, *, low: float | Array, high: float | Array) -> Array:
    """min(max(score, low), high); NaN stays NaN.

    Args:
      scores: [...].
      low: the least.
      high: the largest.

    Returns:
      [...] float32.
    """
    return jnp.clip(scores.astype(jnp.float32), low, high)


def combine_scores(scores: Array, mask: Array, *, weights: Array) -> Array:
    """Σₖ wₖ·scoreₖ over the reward functions that gave a score.

    Normalise before or after the sum (GDPO or GRPO) by calling `group_relative` and
    `scale_by_group_std` on the columns or on the result.

    Args:
      scores: [..., K] of K reward functions.
      mask: [..., K] bool, False where a function gave none.
      weights: [K].

    Returns:
      [...] float32; 0 where no function gave a score.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.
    """
    chex.assert_shape(weights, scores.shape[-1:])
    return masked.sum(masked.fill(scores, mask) * weights, mask, axis=-1)


def overlong_penalty(
    lengths: Array,
    *,
    max_length: float | Array,
    buffer: float | Array,
    factor: float | Array = 1.0,
    floor: float | Array | None = -1.0,
) -> Array:
    """factor · max(floor, -max(0, L - (max_length - buffer)) / buffer).

    Nothing up to the buffer, then linearly down to -factor at the maximum.

    Args:
      lengths: [...] L, tokens of each response.
      max_length: where the penalty is whole.
      buffer: how many tokens before it begins.
      factor: its size.
      floor: in units of `factor`; None for a penalty that grows without end (verl, Tunix).

    Returns:
      [...] float32, never positive, to be added to the scores.

    References:
      Yu et al. 2025, DAPO, eq. 13.
    """
    excess = jnp.maximum(lengths.astype(jnp.float32) - (max_length - buffer), 0.0)
    penalty = -excess / jnp.maximum(buffer, 1.0)
    return factor * (penalty if floor is None else jnp.maximum(penalty, floor))


def penalize_missing_end(scores: Array, ended: Array, *, penalty: float | Array) -> Array:
    """score - penalty for a response that did not end (TRL's `missing_eos_penalty`).

    To replace its score instead (OpenAI), use `masked.fill(scores, ended, value=…)`.

    Args:
      scores: [...].
      ended: [...] bool, the response has its end token.
      penalty: what a response loses that does not.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ or `ended` is not bool.
    """
    chex.assert_equal_shape([scores, ended])
    chex.assert_type(ended, bool)
    return scores.astype(jnp.float32) - jnp.where(ended, 0.0, penalty)
