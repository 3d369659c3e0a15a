"""Which pairs to ask about, and how far to trust an answer: ensembles of reward heads.

An ensemble is K heads on the same states. What they agree on is known; what they disagree on is
worth a question, and not worth a policy's trust. Functions read scores [K, …], the members' first,
whatever the ensemble is of.

References:
  Christiano et al. 2017, Deep Reinforcement Learning from Human Preferences (pairs by the
  disagreement of an ensemble).
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.types import Params


def members(init: Callable[[Array], Params], key: Array, *, num_members: int) -> Params:
    """K independent initialisations, stacked.

    Args:
      init: `(key) -> params`, such as `ScalarHead.init`.
      key: a typed key; consumed.
      num_members: K.

    Returns:
      the parameters, their arrays [K, …].
    """
    return jax.vmap(init)(jax.random.split(key, num_members))


def each(function: Callable[..., Array], params: Params, *args: Array) -> Array:
    """What each member says: the shared part is computed once.

    Args:
      function: `(params, *args) -> result`, such as `partial(reward_model.score, scorer)`.
      params: `{"backbone", "head"}` of a `scalar_model`, the arrays of the head [K, …].
      *args: of the function.

    Returns:
      the results, [K, …].
    """

    def of_member(head: Params) -> Array:
        return function({**params, "head": head}, *args)

    return jax.vmap(of_member)(params["head"])


def anchored(params: Params, anchors: Params, *, precision: float | Array) -> Array:
    """½·precision·Σ (θ - θ₀)²: what keeps a member near where it began.

    Members that begin at draws θ₀ from a prior of that precision, and descend the sum of their
    losses with it, end as draws from the posterior: exactly so of a linear model with normal noise.
    Without it all members of a convex loss would end at the same place.

    Args:
      params: θ.
      anchors: θ₀, the same structure.
      precision: 1/σ² of the prior; divided by the number of pairs where the loss is their mean.

    Returns:
      [] float32.

    Raises:
      AssertionError: structures or shapes differ.

    References:
      Osband et al. 2018, Randomized Prior Functions for Deep Reinforcement Learning; Pearce et al.
      2020, Uncertainty in Neural Networks: Approximately Bayesian Ensembling.
    """
    chex.assert_trees_all_equal_shapes(params, anchors)
    squares = jax.tree.map(lambda x, x0: jnp.sum(jnp.square(x - x0)), params, anchors)
    return 0.5 * precision * jnp.sum(jnp.stack(jax.tree.leaves(squares)))


def disagreement(differences: Array) -> Array:
    """The standard deviation over members of σ(d), the probability that the first one wins.

    Args:
      differences: [K, …], d, the first score less the second one of each pair.

    Returns:
      [...] float32, 0 … ½.

    Raises:
      AssertionError: `differences` is a scalar.

    References:
      Christiano et al. 2017, §2.2.4, take the variance.
    """
    chex.assert_rank(differences, set(range(1, jnp.ndim(differences) + 1)))
    return _std(jax.nn.sigmoid(differences.astype(jnp.float32)))


def mutual_information(differences: Array) -> Array:
    """BALD: H[mean p] - mean H[p] in nats, p = σ(d): what an answer says of the members.

    Pairs that every member finds even are as uncertain as pairs on which they contradict each
    other, but only the answer to the latter teaches anything.

    Args:
      differences: [K, …], d, the first score less the second one of each pair.

    Returns:
      [...] float32, 0 … log 2.

    Raises:
      AssertionError: `differences` is a scalar.

    References:
      Houlsby et al. 2011, Bayesian Active Learning for Classification and Preference Learning.
    """
    chex.assert_rank(differences, set(range(1, jnp.ndim(differences) + 1)))
    d = differences.astype(jnp.float32)
    first, second = jax.nn.sigmoid(d), jax.nn.sigmoid(-d)
    of_mean = _entropy(first.mean(0)) + _entropy(second.mean(0))
    of_each = _entropy(first) + _entropy(second)
    return jnp.maximum(of_mean - of_each.mean(0), 0.0)


def most(values: Array, mask: Array | None = None, *, num: int) -> tuple[Array, Array]:
    """The places of the greatest values, the greatest first, no place twice, ties in their order.

    Args:
      values: [N], such as `mutual_information`; one that is NaN is the least.
      mask: [N] bool, the pairs that may be chosen; None for all.
      num: M, static, at most N.

    Returns:
      places [M] int32; whether each may be chosen, [M] bool: False where fewer than M may.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
      ValueError: M is more than N, or less than 0.
    """
    mask = jnp.ones(values.shape, bool) if mask is None else mask
    chex.assert_rank(values, 1)
    chex.assert_equal_shape([values, mask])
    chex.assert_type(mask, bool)
    _enough(len(values), num)
    values = jnp.where(mask & ~jnp.isnan(values), values.astype(jnp.float32), -jnp.inf)
    # What may be chosen comes first, whatever its value.
    places = jnp.lexsort((-values, ~mask))[:num].astype(jnp.int32)
    return places, mask[places]


def spread(
    predictions: Array, mask: Array | None = None, *, num: int, noise: float | Array = 0.1
) -> tuple[Array, Array]:
    """Pairs chosen one after the other by what the members still disagree on, given those before.

    Over members, predictions of all pairs have a covariance C; an answer has the noise ν:

        i = argmax Cᵢᵢ,  C ← C - C·ᵢ Cᵢ· / (Cᵢᵢ + ν),  again.

    So a batch of M questions does not ask the same thing M times, as the M greatest values of any
    score of single pairs do where pairs resemble one another.

    Args:
      predictions: [K, N], such as σ(d) of each pair; a pair of which one is not finite may not be
        chosen.
      mask: [N] bool, the pairs that may be chosen; None for all.
      num: M, static, at most N.
      noise: ν, the variance of an answer around the prediction. Of probabilities it is p·(1 - p),
        between 0 where people are sure and ¼.

    Returns:
      places [M] int32, none twice, ties in their order; whether each may be chosen, [M] bool.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
      ValueError: M is more than N, or less than 0.

    References:
      Kirsch et al. 2019, BatchBALD: Efficient and Diverse Batch Acquisition (the aim); Krause et
      al. 2008, Near-Optimal Sensor Placements in Gaussian Processes (the greedy choice).
    """
    mask = jnp.ones(predictions.shape[1:], bool) if mask is None else mask
    chex.assert_rank(predictions, 2)
    chex.assert_shape(mask, predictions.shape[1:])
    chex.assert_type(mask, bool)
    _enough(len(mask), num)
    known = jnp.isfinite(predictions)
    mask = mask & known.all(0)
    x = masked.fill(predictions, known & mask)
    centred = (x - x.mean(0)) / jnp.sqrt(jnp.float32(len(x)))

    def choose(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        centred, left = carry
        variance = jnp.sum(jnp.square(centred), axis=0)
        place = jnp.argmax(jnp.where(left, jnp.where(mask, variance, -1.0), -2.0))
        column, own = centred[:, place], variance[place]
        # C = XᵀX stays so with X ← (1 - γ·x·xᵀ)·X, where (1 - γ·|x|²)² = ν / (|x|² + ν).
        shrunk = 1.0 - jnp.sqrt(noise / (own + noise))
        gain = jnp.where(own > 0, shrunk, 0.0) / jnp.where(own > 0, own, 1.0)
        centred = centred - gain * jnp.outer(column, column @ centred)
        return (centred, left.at[place].set(False)), place

    begin = centred, jnp.ones(len(mask), bool)
    _, places = jax.lax.scan(choose, begin, length=num)
    return places.astype(jnp.int32), mask[places]


def lower_bound(scores: Array, *, coef: float | Array = 1.0) -> Array:
    """mean - coef·σ over members: a reward that a policy cannot raise by what nobody knows.

    Args:
      scores: [K, …] of the members.
      coef: how dear uncertainty is; 0 is the mean of the ensemble.

    Returns:
      [...] float32, the biased σ.

    Raises:
      AssertionError: `scores` is a scalar.

    References:
      Coste et al. 2023, Reward Model Ensembles Help Mitigate Overoptimization (its
      uncertainty-weighted optimisation takes σ² for σ).
    """
    chex.assert_rank(scores, set(range(1, jnp.ndim(scores) + 1)))
    x = scores.astype(jnp.float32)
    return x.mean(0) - coef * _std(x)


def _std(x: Array) -> Array:
    """σ over members; the gradient of a root at 0 is infinite, of members that agree it is 0."""
    variance = jnp.var(x, axis=0)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def _entropy(p: Array) -> Array:
    """-p·log p, whose gradient is infinite at 0: there, and where p underflows, both are 0."""
    some = ~(p < jnp.finfo(p.dtype).tiny)  # What is NaN stays so.
    p = jnp.where(some, p, 1.0)
    return -p * jnp.log(p)


def _enough(size: int, num: int) -> None:
    if num < 0:
        raise ValueError(f"{num} pairs cannot be chosen: ask for 0 or more")
    if num > size:
        raise ValueError(f"{num} pairs cannot be chosen from {size}: sample more, or ask for fewer")
