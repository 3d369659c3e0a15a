"""Losses of reward models: from pairs, ratings, classes and levels. Rankings are in `ranking`."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _pairs
from rlhfjax.types import Loss, Reduction


def pairwise(
    chosen_scores: Array,
    rejected_scores: Array,
    mask: Array | None = None,
    *,
    margin: float | Array = 0.0,
    preference: float | Array = 1.0,
    center_coef: float | Array = 0.0,
    l2_coef: float | Array = 0.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """Bradley-Terry: -π·log sigmoid(d) - (1 - π)·log sigmoid(-d) of each pair, d = c - r - margin.

    To it are added center_coef·(c + r)² and l2_coef·½·(c² + r²). Gradients flow to the scores only.

    Args:
      chosen_scores: [...], c.
      rejected_scores: [...], r.
      mask: [...] bool, False for the rows that only fill a batch; None when all pairs are real.
      margin: scalar or [...], by how much c should exceed r.
      preference: scalar or [...], π, the probability that the chosen one is better: 1 - ε smooths
        labels by ε, the share of annotators who chose it is a soft label.
      center_coef: weight of the term that keeps the sum of a pair near 0.
      l2_coef: weight of the term that keeps every score near 0.
      reduce: from the losses of pairs to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: `accuracy`, pairs with c > r; `margin`, mean of c - r.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Bradley and Terry 1952; Touvron et al. 2023, Llama 2, eq. 2 (margin); Wang et al. 2024,
      Secrets of RLHF in LLMs, part II (label smoothing); Eisenstein et al. 2023, Helping or
      Herding?, appendix (centring); Köpf et al. 2023, OpenAssistant Conversations (its code: L2).
    """
    mask = _pairs.all_real(chosen_scores) if mask is None else mask
    chex.assert_equal_shape([chosen_scores, rejected_scores, mask])
    chosen, rejected = masked.fill(chosen_scores, mask), masked.fill(rejected_scores, mask)
    margin = jax.lax.stop_gradient(jnp.where(mask, margin, 0))
    preference = jax.lax.stop_gradient(jnp.where(mask, preference, 1))
    difference = chosen - rejected
    loss = _pairs.logistic(difference - margin, 1.0 - preference)
    loss += center_coef * jnp.square(chosen + rejected)
    loss += l2_coef * 0.5 * (jnp.square(chosen) + jnp.square(rejected))
    metrics = {
        "accuracy": masked.mean(difference > 0, mask),
        "margin": masked.mean(difference, mask),
    }
    return reduce(loss, mask), jax.lax.stop_gradient(metrics)


def rating(
    scores: Array, ratings: Array, mask: Array | None = None, *, reduce: Reduction = masked.mean
) -> Loss:
    """(rating - score)² of each response.

    Gradients flow to `scores` only.

    Args:
      scores: [...].
      ratings: [...], what people gave each response.
      mask: [...] bool, False for the rows that only fill a batch; None when all are real.
      reduce: from the losses of responses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: empty.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences (its released code).
    """
    mask = _pairs.all_real(scores) if mask is None else mask
    chex.assert_equal_shape([scores, ratings, mask])
    error = jax.lax.stop_gradient(masked.fill(ratings, mask)) - masked.fill(scores, mask)
    return reduce(jnp.square(error), mask), {}


def comparison(
    first_scores: Array,
    second_scores: Array,
    differences: Array,
    mask: Array | None = None,
    *,
    reduce: Reduction = masked.mean,
) -> Loss:
    """(difference - (second score - first score))² of each pair.

    Gradients flow to the scores only.

    Args:
      first_scores: [...].
      second_scores: [...].
      differences: [...], by how much people found the second response better.
      mask: [...] bool, False for the rows that only fill a batch; None when all pairs are real.
      reduce: from the losses of pairs to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: empty.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences (its released code).
    """
    mask = _pairs.all_real(first_scores) if mask is None else mask
    chex.assert_equal_shape([first_scores, second_scores, differences, mask])
    given = masked.fill(second_scores, mask) - masked.fill(first_scores, mask)
    error = jax.lax.stop_gradient(masked.fill(differences, mask)) - given
    return reduce(jnp.square(error), mask), {}


def classifier(
    scores: Array, labels: Array, mask: Array | None = None, *, reduce: Reduction = masked.mean
) -> Loss:
    """Binary cross-entropy: -y·log sigmoid(s) - (1 - y)·log sigmoid(-s) of each response.

    The score s is the log-odds of a good response, and so itself a reward. Gradients flow to
    `scores` only.

    Args:
      scores: [...], s.
      labels: [...], y, the probability that a response is good: bool, 0 and 1, or between.
      mask: [...] bool, False for the rows that only fill a batch; None when all are real.
      reduce: from the losses of responses to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: `accuracy`, responses with s > 0 where y > ½ and s ≤ 0 elsewhere.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    mask = _pairs.all_real(scores) if mask is None else mask
    chex.assert_equal_shape([scores, labels, mask])
    scores, labels = masked.fill(scores, mask), jax.lax.stop_gradient(masked.fill(labels, mask))
    accuracy = masked.mean((scores > 0) == (labels > 0.5), mask)
    loss = reduce(_pairs.logistic(scores, 1.0 - labels), mask)
    return loss, {"accuracy": jax.lax.stop_gradient(accuracy)}


def log_odds(logits: Array, *, wanted: int | Array) -> Array:
    """The reward of a classifier: log p(wanted) - log(1 - p(wanted)), p = softmax(logits).

    This is the logit of the wanted class less the log-sum-exp of the others; of two classes it is
    the difference of their logits.

    Args:
      logits: [..., C], C ≥ 2.
      wanted: the class that is rewarded.

    Returns:
      [...] float32.

    Raises:
      AssertionError: fewer than two classes.
    """
    chex.assert_axis_dimension_gt(logits, -1, 1)
    logits = jnp.asarray(logits, jnp.float32)
    others = jnp.where(jnp.arange(logits.shape[-1]) == wanted, -jnp.inf, logits)
    return logits[..., wanted] - jax.nn.logsumexp(others, axis=-1)


def ordinal(
    scores: Array,
    levels: Array,
    thresholds: Array,
    mask: Array | None = None,
    *,
    reduce: Reduction = masked.mean,
) -> Loss:
    """Ordered logit: -log P(level) of each response, where P(level ≤ k) = sigmoid(θₖ - s).

    The levels are those of single responses, such as one to five stars; of pairs that were
    preferred by more or less, use the `margin` of `pairwise`. Gradients flow to `scores` and
    `thresholds`.

    Args:
      scores: [...], s.
      levels: [...] int, 0 … L - 1, the best last.
      thresholds: [L - 1], θ, increasing; the cumulative sum of a first one and positive steps if
        they are learnt.
      mask: [...] bool, False for the rows that only fill a batch; None when all are real.
      reduce: from the losses of responses to the loss.

    Returns:
      loss: float32, what `reduce` gives; infinite, but with a finite gradient, where the thresholds
        around a level do not increase.
      metrics: `accuracy`, responses whose score lies between the thresholds of their level.

    Raises:
      AssertionError: shapes differ, `mask` is not bool, `levels` not of integers, or no threshold.

    References:
      McCullagh 1980, Regression Models for Ordinal Data.
    """
    mask = _pairs.all_real(scores) if mask is None else mask
    chex.assert_equal_shape([scores, levels, mask])
    chex.assert_type([levels, mask], [int, bool])
    chex.assert_rank(thresholds, 1)
    chex.assert_axis_dimension_gt(thresholds, 0, 0)
    scores, levels = masked.fill(scores, mask), jnp.where(mask, levels, 0)
    thresholds = jnp.asarray(thresholds, jnp.float32)
    has_lower, has_upper = levels > 0, levels < len(thresholds)
    lower = thresholds[jnp.maximum(levels - 1, 0)]
    upper = thresholds[jnp.minimum(levels, len(thresholds) - 1)]
    # sigmoid(a) - sigmoid(b) = sigmoid(a)·sigmoid(-b)·(1 - exp(b - a)), without cancellation.
    step = upper - lower
    log_share = jnp.log(-jnp.expm1(-jnp.where(step > 0, step, 1.0)))
    log_share = jnp.where(step > 0, log_share, -jnp.inf)
    log_p = (
        jnp.where(has_upper, jax.nn.log_sigmoid(upper - scores), 0.0)
        + jnp.where(has_lower, jax.nn.log_sigmoid(scores - lower), 0.0)
        + jnp.where(has_lower & has_upper, log_share, 0.0)
    )
    within = (~has_lower | (scores > lower)) & (~has_upper | (scores <= upper))
    return reduce(-log_p, mask), {"accuracy": jax.lax.stop_gradient(masked.mean(within, mask))}
