"""From the loss of every token to the loss of a batch: the ways that RLHF systems differ in.

Each function takes `(x [..., T], mask [..., T])`, rows being sequences, and so fits the argument
`reduce` of every loss; options are bound by `functools.partial`. To average losses of micro-batches
or devices again, weight each with `num_tokens` or `num_sequences` of its mask, whichever the
reduction divides by. Sequences packed into one row are told apart by `by_segment`.
"""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def token_mean(x: Array, mask: Array) -> Array:
    """Σ x·mask / max(Σ mask, 1): every token weighs the same (DAPO, TRL's `bnpo`).

    Args:
      x: [..., T].
      mask: [..., T] bool.

    Returns:
      scalar float32; 0 where nothing is True. Its weight is `num_tokens`.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Yu et al. 2025, DAPO, §3.3.
    """
    return masked.mean(x, mask)


def sequence_mean(x: Array, mask: Array, *, count_empty: bool = False) -> Array:
    """The mean over sequences of their token means: every sequence weighs the same (GRPO).

    Args:
      x: [..., T].
      mask: [..., T] bool.
      count_empty: a sequence without a True token counts as one of mean 0 (TRL) instead of being
        left out (verl, OpenRLHF, Tunix).

    Returns:
      scalar float32. Its weight is `num_sequences`.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Shao et al. 2024, DeepSeekMath, eq. 3.
    """
    return _over_sequences(masked.mean(x, mask, axis=-1), mask, count_empty)


def sequence_sum(x: Array, mask: Array, *, count_empty: bool = False) -> Array:
    """The mean over sequences of their token sums.

    Args:
      x: [..., T].
      mask: [..., T] bool.
      count_empty: a sequence without a True token counts, as 0, instead of being left out.

    Returns:
      scalar float32. Its weight is `num_sequences`.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return _over_sequences(masked.sum(x, mask, axis=-1), mask, count_empty)


def constant_length(
    x: Array, mask: Array, *, length: float | Array, count_empty: bool = False
) -> Array:
    """The mean over sequences of Σₜ x·mask / length, whatever their own lengths (Dr.GRPO).

    Args:
      x: [..., T].
      mask: [..., T] bool.
      length: the divisor, such as the longest response that may be sampled.
      count_empty: a sequence without a True token counts, as 0 (TRL), instead of being left out
        (Tunix).

    Returns:
      scalar float32. Its weight is `num_sequences`.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Liu et al. 2025, Understanding R1-Zero-Like Training (Dr.GRPO).
    """
    return sequence_sum(x, mask, count_empty=count_empty) / length


def constant_total(x: Array, mask: Array, *, total: float | Array) -> Array:
    """Σ x·mask / total, whatever the number of sequences (verl's form of Dr.GRPO).

    Losses of micro-batches with the same `total` add up to that of the whole.

    Args:
      x: [..., T].
      mask: [..., T] bool.
      total: the divisor.

    Returns:
      scalar float32.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return masked.sum(x, mask) / total


def num_tokens(mask: Array) -> Array:
    """Σ mask, the weight of a token mean.

    Args:
      mask: [..., T] bool.

    Returns:
      scalar float32.

    Raises:
      AssertionError: `mask` is not bool.
    """
    chex.assert_type(mask, bool)
    return jnp.sum(mask, dtype=jnp.float32)


def num_sequences(mask: Array, *, count_empty: bool = False) -> Array:
    """The number of sequences, the weight of a mean over sequences.

    Args:
      mask: [..., T] bool.
      count_empty: as in the reduction.

    Returns:
      scalar float32.

    Raises:
      AssertionError: `mask` is not bool.
    """
    chex.assert_type(mask, bool)
    return jnp.sum(mask.any(axis=-1) | count_empty, dtype=jnp.float32)


def weighted_sum(terms: Sequence[Array], weights: Sequence[float | Array]) -> Array:
    """Σ wᵢ·lossᵢ: one objective of several losses.

    Args:
      terms: reduced losses.
      weights: as many.

    Returns:
      float32, the shape of the terms.

    Raises:
      AssertionError: the shapes of the terms differ.
      ValueError: there are not as many weights as terms.
    """
    chex.assert_equal_shape(terms)
    products = (w * x.astype(jnp.float32) for x, w in zip(terms, weights, strict=True))
    return sum(products, jnp.zeros((), jnp.float32))


def by_segment(
    x: Array, mask: Array, segment_ids: Array, *, num_segments: int
) -> tuple[Array, Array]:
    """Packed rows as one row a segment: maskₖ = mask ∧ (segment = k), and x there, 0 elsewhere.

    Any function of sequences then serves for packed ones, `sequence_mean(*by_segment(…))`, at K
    times the size.

    Args:
      x: [..., T].
      mask: [..., T] bool.
      segment_ids: [..., T] int, 1 … num_segments; other tokens (0, padding) belong to none.
      num_segments: K, the most that a row holds. Static.

    Returns:
      x and mask, [..., K, T].

    Raises:
      AssertionError: shapes differ, `mask` is not bool or `segment_ids` not integer.
    """
    chex.assert_equal_shape([x, mask, segment_ids])
    chex.assert_type([mask, segment_ids], [bool, int])
    numbers = jnp.arange(1, num_segments + 1)[:, None]
    of_segment = mask[..., None, :] & (segment_ids[..., None, :] == numbers)
    return masked.fill(jnp.broadcast_to(x[..., None, :], of_segment.shape), of_segment), of_segment


def _over_sequences(each: Array, mask: Array, count_empty: bool) -> Array:
    return masked.mean(each, mask.any(axis=-1) | count_empty)
