"""Rows of tokens and their masks: where they end, what is real, on which side the padding is."""

import chex
import jax.numpy as jnp
from jax import Array


def first_true(mask: Array) -> Array:
    """The index of the first True entry of each row; L where there is none.

    Args:
      mask: [..., L] bool.

    Returns:
      [...] int32.

    Raises:
      AssertionError: `mask` is a scalar or not bool.
    """
    columns = _columns(mask)
    return jnp.min(jnp.where(mask, columns, columns.size), axis=-1, initial=columns.size)


def last_true(mask: Array) -> Array:
    """The index of the last True entry of each row; -1 where there is none.

    Args:
      mask: [..., L] bool.

    Returns:
      [...] int32.

    Raises:
      AssertionError: `mask` is a scalar or not bool.
    """
    return jnp.max(jnp.where(mask, _columns(mask), -1), axis=-1, initial=-1)


def lengths(mask: Array) -> Array:
    """Σ mask: the number of True entries of each row.

    Args:
      mask: [..., L] bool.

    Returns:
      [...] int32.

    Raises:
      AssertionError: `mask` is a scalar or not bool.
    """
    _columns(mask)
    return jnp.sum(mask, axis=-1, dtype=jnp.int32)


def mask_of_lengths(lengths: Array, *, size: int) -> Array:
    """True at the first entries of a row, as many as its length: t < length.

    Args:
      lengths: [...] int.
      size: L, static.

    Returns:
      [..., L] bool.

    Raises:
      AssertionError: `lengths` is not of integers.
    """
    chex.assert_type(lengths, int)
    return jnp.arange(size) < jnp.asarray(lengths)[..., None]


def mask_up_to(last: Array, *, size: int) -> Array:
    """True up to and including the last index of a row: t ≤ last.

    Args:
      last: [...] int; -1 for an empty row.
      size: L, static.

    Returns:
      [..., L] bool.

    Raises:
      AssertionError: `last` is not of integers.
    """
    chex.assert_type(last, int)
    return jnp.arange(size) <= jnp.asarray(last)[..., None]


def one_past(mask: Array) -> Array:
    """The True entries and the first position after the last of them, where the row has one.

    It is the mask of values that a score one past the end of a response needs (TRL, the code of
    Huang et al. 2024, The N+ Implementation Details of RLHF with PPO).

    Args:
      mask: [..., L] bool.

    Returns:
      [..., L] bool; a row without a True entry stays so.

    Raises:
      AssertionError: `mask` is a scalar or not bool.
    """
    after = _columns(mask) == last_true(mask)[..., None] + 1
    return mask | (after & mask.any(axis=-1, keepdims=True))


def truncate(
    responses: Array, *, stop_token: int | Array, pad_token: int | Array, start: int | Array = 0
) -> tuple[Array, Array, Array]:
    """Responses up to and including the first stop token at or after `start`, then padding.

    The mask and not the padding says what is real: the padding token may be the stop token.

    Args:
      responses: [..., T] int.
      stop_token: its id, or several [N] of which any stops a response.
      pad_token: what takes the place of tokens behind the stop token.
      start: stop tokens before it do not count.

    Returns:
      responses [..., T]; their mask [..., T] bool, True up to and including the stop token, or
      everywhere if there is none; whether there is one, [...] bool.

    Raises:
      AssertionError: `responses` is a scalar or not of integers.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences (its released code).
    """
    chex.assert_type(responses, int)
    stops = jnp.isin(responses, jnp.asarray(stop_token))
    stop = first_true(stops & (_columns(stops) >= start))
    size = responses.shape[-1]
    mask = mask_up_to(stop, size=size)
    return jnp.where(mask, responses, pad_token), mask, stop < size


def pad_left(x: Array, mask: Array, *, pad_value: float | Array = 0) -> tuple[Array, Array]:
    """Real entries moved to the end of each row, in their order; padding before them.

    Padding between real entries is moved too.

    Args:
      x: [..., L], tokens or anything else a token has.
      mask: [..., L] bool.
      pad_value: what padding becomes, such as the padding token.

    Returns:
      x, as integers or float32, and mask, moved alike.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return _moved(x, mask, mask, pad_value)


def pad_right(x: Array, mask: Array, *, pad_value: float | Array = 0) -> tuple[Array, Array]:
    """Real entries moved to the start of each row, in their order; padding after them.

    Padding between real entries is moved too.

    Args:
      x: [..., L], tokens or anything else a token has.
      mask: [..., L] bool.
      pad_value: what padding becomes, such as the padding token.

    Returns:
      x, as integers or float32, and mask, moved alike.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return _moved(x, mask, ~mask, pad_value)


def causal_mask(attention_mask: Array) -> Array:
    """True where the query at i may attend to the key at j: j ≤ i and j is real.

    The row of a query that is padding is not blanked; with padding on the left it is empty.

    Args:
      attention_mask: [..., L] bool.

    Returns:
      [..., L, L] bool, queries before keys.

    Raises:
      AssertionError: `attention_mask` is a scalar or not bool.
    """
    columns = _columns(attention_mask)
    return attention_mask[..., None, :] & (columns <= columns[:, None])


def held_positions(attention_mask: Array) -> Array:
    """Position ids where padding holds the position of the real token before it (Tunix).

    pₜ = max(Σ_{s≤t} maskₛ - 1, 0). At real tokens the same as `masked.positions`, where padding
    has the next position instead.

    Args:
      attention_mask: [..., L] bool.

    Returns:
      [..., L] int32.

    Raises:
      AssertionError: `attention_mask` is a scalar or not bool.
    """
    _columns(attention_mask)
    counts = jnp.cumsum(attention_mask, axis=-1, dtype=jnp.int32)
    return jnp.maximum(counts - 1, 0)


def _columns(mask: Array) -> Array:
    chex.assert_rank(mask, set(range(1, mask.ndim + 1)))
    chex.assert_type(mask, bool)
    return jnp.arange(mask.shape[-1], dtype=jnp.int32)


def _moved(x: Array, mask: Array, key: Array, pad_value: float | Array) -> tuple[Array, Array]:
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    x = jnp.where(mask, x, pad_value)
    x = x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x
    order = jnp.argsort(key, axis=-1, stable=True)
    return jnp.take_along_axis(x, order, axis=-1), jnp.take_along_axis(mask, order, axis=-1)
