"""Losses of the value function."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def clipped_value_loss(
    values: Array, old_values: Array, returns: Array, mask: Array, *, clip_range: float | Array
) -> tuple[Array, dict[str, Array]]:
    """½·mean over tokens of max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²).

    Gradients flow to `values` only.

    Args:
      values: [..., T] of the model that is trained.
      old_values: [..., T] at the time of sampling.
      returns: [..., T], R.
      mask: [..., T] bool.
      clip_range: ε.

    Returns:
      loss: scalar float32.
      metrics: `clip_fraction`, tokens whose clipped error is the larger one.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      The PPO2 implementation of OpenAI Baselines; Ziegler et al. 2019 (its released code).
    """
    chex.assert_equal_shape([values, old_values, returns, mask])
    chex.assert_type(mask, bool)
    values = jnp.where(mask, values, 0).astype(jnp.float32)
    old_values = jax.lax.stop_gradient(jnp.where(mask, old_values, 0)).astype(jnp.float32)
    returns = jax.lax.stop_gradient(jnp.where(mask, returns, 0)).astype(jnp.float32)

    clipped = jnp.clip(values, old_values - clip_range, old_values + clip_range)
    error = jnp.square(values - returns)
    clipped_error = jnp.square(clipped - returns)
    loss = 0.5 * masked.mean(jnp.maximum(error, clipped_error), mask)
    clip_fraction = masked.mean(clipped_error > error, mask)
    return loss, {"clip_fraction": jax.lax.stop_gradient(clip_fraction)}


def value_loss(values: Array, returns: Array, mask: Array) -> tuple[Array, dict[str, Array]]:
    """½·mean over tokens of (V - R)².

    Gradients flow to `values` only.

    Args:
      values: [..., T] of the model that is trained.
      returns: [..., T], R.
      mask: [..., T] bool.

    Returns:
      loss: scalar float32.
      metrics: empty.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 9.
    """
    chex.assert_equal_shape([values, returns, mask])
    chex.assert_type(mask, bool)
    values = jnp.where(mask, values, 0).astype(jnp.float32)
    returns = jax.lax.stop_gradient(jnp.where(mask, returns, 0)).astype(jnp.float32)
    return 0.5 * masked.mean(jnp.square(values - returns), mask), {}
