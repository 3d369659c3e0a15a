"""Losses of reward models from rankings of several responses to one prompt.

The K-wise losses by pairs are compositions of `ranked_pairs` and `reward.pairwise`: averaged over
all pairs together

    reward.pairwise(*ranked_pairs(scores, mask))

and, as in InstructGPT (Ouyang et al. 2022, eq. 1), averaged by prompt and then over prompts

    reward.pairwise(*ranked_pairs(scores, mask), reduce=reductions.sequence_mean)
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _pairs
from rlhfjax.types import Loss, Reduction

# Of candidates that are not real. Finite, since a row of -inf has no softmax.
_LOWEST = float(jnp.finfo(jnp.float32).min)


def plackett_luce(
    scores: Array, mask: Array | None = None, *, reduce: Reduction = masked.mean
) -> Loss:
    """-Σₖ log(exp(sₖ) / Σ_{j≥k} exp(sⱼ)) of each ranking: the best of all, then of the rest, ….

    A ranking of fewer than two candidates says nothing and counts nowhere.

    Args:
      scores: [..., K] of candidates that are listed best first.
      mask: [..., K] bool, True at real candidates; None when all are.
      reduce: from the losses [...] of rankings to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: `accuracy`, pairs of a ranking whose scores are in its order.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Plackett 1975, The Analysis of Permutations; Luce 1959, Individual Choice Behavior.
    """
    mask = _pairs.all_real(scores) if mask is None else mask
    filled = masked.fill(scores, mask, value=_LOWEST)
    log_rest = jax.lax.cumlogsumexp(filled, axis=filled.ndim - 1, reverse=True)
    loss = masked.sum(log_rest - filled, mask, axis=-1)
    better, worse, pairs = ranked_pairs(scores, mask)
    accuracy = masked.mean(better > worse, pairs)
    return reduce(loss, pairs.any(axis=-1)), {"accuracy": jax.lax.stop_gradient(accuracy)}


def best_of_n(
    scores: Array, best: Array, mask: Array | None = None, *, reduce: Reduction = masked.mean
) -> Loss:
    """-log softmax(scores)[best] of each choice.

    A choice between fewer than two candidates, or of none of them, counts nowhere.

    Args:
      scores: [..., N] of the candidates.
      best: [...] int, which one was chosen.
      mask: [..., N] bool, True at real candidates; None when all are.
      reduce: from the losses [...] of choices to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: `accuracy`, choices whose candidate has the highest score.

    Raises:
      AssertionError: shapes do not fit, `mask` is not bool or `best` not of integers.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, eq. 1.
    """
    mask = _pairs.all_real(scores) if mask is None else mask
    chex.assert_equal_shape([scores, mask])
    chex.assert_shape(best, scores.shape[:-1])
    chex.assert_type([best, mask], [int, bool])
    chosen = mask & (jnp.arange(scores.shape[-1]) == best[..., None])
    counts = chosen.any(axis=-1) & (jnp.sum(mask, axis=-1) > 1)
    log_p = jax.nn.log_softmax(masked.fill(scores, mask, value=_LOWEST), axis=-1)
    loss = -masked.sum(log_p, chosen, axis=-1)
    accuracy = masked.mean(jnp.argmax(log_p, axis=-1) == best, counts)
    return reduce(loss, counts), {"accuracy": jax.lax.stop_gradient(accuracy)}


def ranked_pairs(ranked: Array, mask: Array | None = None) -> tuple[Array, Array, Array]:
    """Every pair of a ranking: the K·(K - 1)/2 entries i < j, the better one first.

    Args:
      ranked: [..., K], anything listed best first: scores, or the ids of candidates.
      mask: [..., K] bool, True at real candidates; None when all are.

    Returns:
      better [..., P] and worse [..., P], P = K·(K - 1)/2, as integers or float32, and the mask
      [..., P] of real pairs: the arguments of `reward.pairwise`, or of `indexed_pairs` if they are
      ids.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    mask = _pairs.all_real(ranked) if mask is None else mask
    chex.assert_equal_shape([ranked, mask])
    chex.assert_type(mask, bool)
    ranked = jnp.where(mask, ranked, 0)
    ranked = ranked.astype(jnp.float32) if jnp.issubdtype(ranked.dtype, jnp.floating) else ranked
    better, worse = np.triu_indices(ranked.shape[-1], 1)
    return ranked[..., better], ranked[..., worse], mask[..., better] & mask[..., worse]


def indexed_pairs(scores: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """The scores of pairs of candidates that are given by their indices.

    Args:
      scores: [..., K] of the candidates of a prompt.
      first: [..., P] int, indices of candidates; anything where a pair is not real.
      second: [..., P] int, likewise.

    Returns:
      [..., P] and [..., P] float32, the scores of the first and of the second.

    Raises:
      AssertionError: shapes of the indices differ or they are not integers.

    References:
      Dubois et al. 2023, AlpacaFarm (its released code).
    """
    chex.assert_equal_shape([first, second])
    chex.assert_type([first, second], int)
    scores = scores.astype(jnp.float32)
    return jnp.take_along_axis(scores, first, -1), jnp.take_along_axis(scores, second, -1)
