"""Losses of the value function."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.types import Loss, Reduction


def clipped_value_loss(
    values: Array,
    old_values: Array,
    returns: Array,
    mask: Array,
    *,
    clip_range: float | Array,
    reduce: Reduction = masked.mean,
) -> Loss:
    """½·max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²) of each token.

    Gradients flow to `values` only.

    Args:
      values: [..., T] of the model that is trained.
      old_values: [..., T] at the time of sampling.
      returns: [..., T], R.
      mask: [..., T] bool.
      clip_range: ε.
      reduce: from the tokens' losses to the loss, see `reductions`.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: `clip_fraction`, tokens whose clipped error is the larger one.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      The PPO2 implementation of OpenAI Baselines; Ziegler et al. 2019 (its released code).
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    values = masked.fill(values, mask)
    old_values = jax.lax.stop_gradient(masked.fill(old_values, mask))
    returns = jax.lax.stop_gradient(masked.fill(returns, mask))
    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
    is_clipped = clipped_error > error
    loss = reduce(0.5 * jnp.where(is_clipped, clipped_error, error), mask)
    return loss, {"clip_fraction": masked.mean(is_clipped, mask)}


def value_loss(
    values: Array, returns: Array, mask: Array, *, reduce: Reduction = masked.mean
) -> Loss:
    """½·(V - R)² of each token.

    Gradients flow to `values` only.

    Args:
      values: [..., T] of the model that is trained.
      returns: [..., T], R.
      mask: [..., T] bool.
      reduce: from the tokens' losses to the loss, see `reductions`.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: empty.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 9.
    """
    chex.assert_equal_shape([values, returns, mask])
    error = masked.fill(values, mask) - jax.lax.stop_gradient(masked.fill(returns, mask))
    return reduce(0.5 * jnp.square(error), mask), {}
