"""Statistics over the True entries of a mask.

Entries outside the mask are replaced before any arithmetic, so that NaN or infinity there reaches
neither values nor gradients. A statistic of no entries at all is 0. Results are float32.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def sum(x: Array, mask: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    """Σ x over the True entries.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      axis: axes that are summed; None sums all of them.

    Returns:
      float32, the shape of `x` without `axis`.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return jnp.sum(_fill(x, mask), axis=axis)


def mean(x: Array, mask: Array, *, axis: int | tuple[int, ...] | None = None) -> Array:
    """Σ x·mask / max(Σ mask, 1).

    To average such means again, over micro-batches or devices, weight each with its Σ mask.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      axis: axes that are averaged; None averages over all of them.

    Returns:
      float32, the shape of `x` without `axis`; 0 where nothing is True.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return jnp.sum(_fill(x, mask), axis=axis) / jnp.maximum(_count(mask, axis=axis), 1.0)


def var(
    x: Array, mask: Array, *, axis: int | tuple[int, ...] | None = None, ddof: int = 0
) -> Array:
    """σ² = Σ (x - μ)²·mask / (N - ddof), where N = Σ mask and μ is the masked mean.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      axis: axes that are reduced; None reduces all of them.
      ddof: 0 is the biased variance (OpenAI, OpenRLHF), 1 the unbiased one (TRL, verl, Tunix).

    Returns:
      float32, the shape of `x` without `axis`; 0 where N - ddof ≤ 0.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    filled = _fill(x, mask)
    count = _count(mask, axis=axis, keepdims=True)
    centre = jnp.sum(filled, axis=axis, keepdims=True) / jnp.maximum(count, 1.0)
    squares = jnp.sum(jnp.where(mask, jnp.square(filled - centre), 0.0), axis=axis)
    freedom = count.reshape(squares.shape) - ddof
    return jnp.where(freedom > 0, squares, 0.0) / jnp.where(freedom > 0, freedom, 1.0)


def whiten(
    x: Array, mask: Array, *, shift_mean: bool = True, ddof: int = 0, eps: float | Array = 1e-8
) -> Array:
    """(x - μ) / √(σ² + eps), and + μ when the mean is kept.

    The statistics are taken over all True entries together, whatever the number of axes.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      shift_mean: False keeps the mean (as for rewards) and scales around it.
      ddof: 0 divides by N, 1 by N - 1.
      eps: added to the variance.

    Returns:
      [...] float32; 0 at masked entries.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences (its released code).
    """
    filled = _fill(x, mask)
    centre = mean(x, mask)
    whitened = (filled - centre) * jax.lax.rsqrt(var(x, mask, ddof=ddof) + eps)
    return jnp.where(mask, whitened if shift_mean else whitened + centre, 0.0)


def positions(attention_mask: Array) -> Array:
    """Position ids of a padded sequence: pₜ = Σ_{s<t} maskₛ.

    Left pads get 0 and the first real token gets 0; a pad after real tokens gets their number.

    Args:
      attention_mask: [..., S] bool.

    Returns:
      [..., S] int32.

    Raises:
      AssertionError: `attention_mask` is a scalar or not bool.
    """
    chex.assert_rank(attention_mask, set(range(1, attention_mask.ndim + 1)))
    chex.assert_type(attention_mask, bool)
    real = attention_mask.astype(jnp.int32)
    return jnp.cumsum(real, axis=-1) - real


def _fill(x: Array, mask: Array) -> Array:
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    return jnp.where(mask, x, 0).astype(jnp.float32)


def _count(mask: Array, *, axis: int | tuple[int, ...] | None, keepdims: bool = False) -> Array:
    return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)
