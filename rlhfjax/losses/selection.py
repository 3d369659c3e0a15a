"""Which tokens take part in a loss."""

import chex
import jax.numpy as jnp
from jax import Array


def high_entropy_mask(entropies: Array, mask: Array, *, quantile: float | Array) -> Array:
    """True at real tokens whose entropy is at least the given quantile over all real tokens.

    The quantile is interpolated linearly between the two values next to it, as NumPy and torch do
    by default. All tokens that tie with it are selected.

    Args:
      entropies: [..., T].
      mask: [..., T] bool.
      quantile: in [0, 1]; 0.8 selects the highest fifth.

    Returns:
      [..., T] bool; all False where nothing is real.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Wang et al. 2025, Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective RL.
    """
    chex.assert_equal_shape([entropies, mask])
    chex.assert_type(mask, bool)
    real = jnp.where(mask, entropies, jnp.nan).astype(jnp.float32)
    return real >= jnp.nanquantile(real, quantile)
