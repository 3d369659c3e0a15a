"""Statistics over the True entries of a mask.

Entries outside the mask are replaced before any arithmetic, so that NaN or infinity there reaches
neither values nor gradients. A statistic of no entries at all is 0. Results are float32.
"""

from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
from jax import Array


def fill(x: Array, mask: Array, *, value: float | Array = 0.0) -> Array:
    """x at the True entries, `value` elsewhere.

    The way to take entries out *before* an exponential, a logarithm or a division: masking the
    result instead would leave NaN in the gradient.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      value: what masked entries become.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    chex.assert_equal_shape([x, mask])
    chex.assert_type(mask, bool)
    return jnp.where(mask, jnp.asarray(x, jnp.float32), value).astype(jnp.float32)


def sum(
    x: Array, mask: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> Array:
    """Σ x over the True entries.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      axis: axes that are summed; None sums all of them.
      keepdims: summed axes stay, with size 1.

    Returns:
      float32, the shape of `x` without `axis`.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return jnp.sum(fill(x, mask), axis=axis, keepdims=keepdims)


def mean(
    x: Array, mask: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> Array:
    """Σ x·mask / max(Σ mask, 1).

    To average such means again, over micro-batches or devices, weight each with its Σ mask.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      axis: axes that are averaged; None averages over all of them.
      keepdims: averaged axes stay, with size 1.

    Returns:
      float32, the shape of `x` without `axis`; 0 where nothing is True.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    total = sum(x, mask, axis=axis, keepdims=keepdims)
    return total / jnp.maximum(_count(mask, axis=axis, keepdims=keepdims), 1.0)


def var(
    x: Array,
    mask: Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    ddof: int = 0,
    keepdims: bool = False,
) -> Array:
    """σ² = Σ (x - μ)²·mask / (N - ddof), where N = Σ mask and μ is the masked mean.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.
      axis: axes that are reduced; None reduces all of them.
      ddof: 0 is the biased variance (OpenAI, OpenRLHF), 1 the unbiased one (TRL, verl, Tunix).
      keepdims: reduced axes stay, with size 1.

    Returns:
      float32, the shape of `x` without `axis`; 0 where N - ddof ≤ 0.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    deviations = fill(x, mask) - _centre(x, mask, axis=axis)
    squares = sum(jnp.square(deviations), mask, axis=axis, keepdims=keepdims)
    freedom = _count(mask, axis=axis, keepdims=keepdims) - ddof
    return jnp.where(freedom > 0, squares, 0.0) / jnp.where(freedom > 0, freedom, 1.0)


def whiten(
    x: Array,
    mask: Array,
    *,
    axis: int | tuple[int, ...] | None = None,
    shift_mean: bool = True,
    ddof: int = 0,
    eps: float | Array = 1e-8,
    std_eps: float | Array = 0.0,
    min_var: float | Array = 0.0,
) -> Array:
    """`standardize` with the mean and the variance of the True entries; 0 elsewhere.

    Equal entries become 0, or stay what they are where the mean is kept, whatever the eps.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`. A mask of ones takes all entries (OpenAI, trlx).
      axis: the axes of one set of statistics: None whitens everything together, -1 each row.
      shift_mean: as in `standardize`.
      ddof: 0 divides by N, 1 by N - 1, see `var`.
      eps: as in `standardize`.
      std_eps: as in `standardize`.
      min_var: as in `standardize`.

    Returns:
      [...] float32; 0 at masked entries.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences (its released code).
    """
    whitened = standardize(
        fill(x, mask),
        _centre(x, mask, axis=axis),
        var(x, mask, axis=axis, ddof=ddof, keepdims=True),
        shift_mean=shift_mean,
        eps=eps,
        std_eps=std_eps,
        min_var=min_var,
    )
    return fill(whitened, mask)


def standardize(
    x: Array,
    mean: Array,
    var: Array,
    *,
    shift_mean: bool = True,
    eps: float | Array = 1e-8,
    std_eps: float | Array = 0.0,
    min_var: float | Array = 0.0,
) -> Array:
    """(x - μ) / (√(max(σ², min_var) + eps) + std_eps), and + μ when the mean is kept.

    Args:
      x: [...], any real dtype.
      mean: μ, broadcastable to `x`; of a batch, of a row, or running.
      var: σ², likewise.
      shift_mean: False keeps the mean (as for rewards) and scales around it.
      eps: added to the variance (most systems).
      std_eps: added to the standard deviation (alpaca_farm).
      min_var: the variance is at least this (OpenRLHF).

    Returns:
      [...] float32; 0, or μ where it is kept, if the divisor is 0.

    Raises:
      AssertionError: `mean` or `var` does not broadcast to `x`.
    """
    chex.assert_is_broadcastable(jnp.shape(mean), jnp.shape(x))
    chex.assert_is_broadcastable(jnp.shape(var), jnp.shape(x))
    variance = jnp.maximum(jnp.asarray(var, jnp.float32), min_var) + eps
    std = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0) + std_eps
    centred = x.astype(jnp.float32) - mean
    scaled = jnp.where(std > 0, centred / jnp.where(std > 0, std, 1.0), 0.0)
    return scaled if shift_mean else scaled + mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Moments:
    """Running statistics of numbers that come in batches.

    Attributes:
      mean: [] float32.
      var: [] float32, biased (divided by n).
      num_values: [] float32, n.
    """

    mean: Array
    var: Array
    num_values: Array


def moments(x: Array, mask: Array) -> Moments:
    """Mean, biased variance and number of the True entries.

    Args:
      x: [...], any real dtype.
      mask: [...] bool, the shape of `x`.

    Returns:
      their `Moments`; zeros where nothing is True.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    return Moments(mean(x, mask), var(x, mask), _count(mask))


def merge_moments(moments: Moments, other: Moments) -> Moments:
    """The moments of two batches together; associative, so micro-batches and devices merge too.

    With n = n₁ + n₂ and δ = μ₂ - μ₁:  μ = μ₁ + δ·n₂/n,  σ² = (n₁σ₁² + n₂σ₂² + δ²·n₁n₂/n) / n.

    Args:
      moments: of one batch, or of all before it.
      other: of the next.

    Returns:
      the `Moments` of both.

    References:
      Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance.
    """
    count = moments.num_values + other.num_values
    divisor = jnp.where(count > 0, count, 1.0)
    share, other_share = moments.num_values / divisor, other.num_values / divisor
    delta = other.mean - moments.mean
    within = share * moments.var + other_share * other.var
    between = share * other_share * jnp.square(delta)
    return Moments(moments.mean + other_share * delta, within + between, count)


def moments_std(moments: Moments, *, ddof: int = 0) -> Array:
    """√(σ²·n / (n - ddof)).

    Args:
      moments: running statistics.
      ddof: 0 for the biased, 1 for the unbiased standard deviation.

    Returns:
      [] float32; 0 where n - ddof ≤ 0.
    """
    freedom = moments.num_values - ddof
    variance = moments.var * moments.num_values / jnp.where(freedom > 0, freedom, 1.0)
    positive = (freedom > 0) & (variance > 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)


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


def _centre(x: Array, mask: Array, *, axis: int | tuple[int, ...] | None) -> Array:
    """The mean, taken around the largest entry: that of equal entries is the entry to the bit."""
    top = jnp.max(fill(x, mask, value=-jnp.inf), axis=axis, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    return top + mean(fill(x, mask) - top, mask, axis=axis, keepdims=True)


def _count(
    mask: Array, *, axis: int | tuple[int, ...] | None = None, keepdims: bool = False
) -> Array:
    return jnp.sum(mask, axis=axis, keepdims=keepdims, dtype=jnp.float32)
