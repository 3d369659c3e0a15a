"""What the losses of ratios π / π_old share: their inputs, the clip, the surrogate, the metrics."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def prepare(
    log_probs: Array, old_log_probs: Array, advantages: Array, mask: Array, weights: float | Array
) -> tuple[Array, Array, Array]:
    """Log ratio, advantages and weights of the tokens, 0 where masked, gradients where they go."""
    chex.assert_equal_shape([log_probs, old_log_probs, advantages, mask])
    old = jax.lax.stop_gradient(masked.fill(old_log_probs, mask))
    return (
        masked.fill(log_probs, mask) - old,
        jax.lax.stop_gradient(masked.fill(advantages, mask)),
        token_weights(weights, mask),
    )


def token_weights(weights: float | Array, mask: Array) -> Array:
    weights = masked.fill(jnp.broadcast_to(weights, mask.shape), mask)
    return jax.lax.stop_gradient(weights)


def spread(per_response: Array, mask: Array) -> Array:
    chex.assert_shape(per_response, mask.shape[:-1])
    return jnp.broadcast_to(per_response[..., None], mask.shape)


def bounded(log_ratio: Array, bound: float | Array | None) -> Array:
    return log_ratio if bound is None else jnp.clip(log_ratio, -bound, bound)


def log_bounds(
    clip_range: float | Array, clip_range_high: float | Array | None
) -> tuple[Array, Array]:
    high = clip_range if clip_range_high is None else clip_range_high
    return jnp.log1p(-jnp.minimum(clip_range, 1.0)), jnp.log1p(high)


def clip(
    log_ratio: Array, advantages: Array, low: float | Array, high: float | Array
) -> tuple[Array, Array]:
    """The log ratio whose exponential times A is the smaller of both terms, and where it clips.

    A log ratio that equals a bound is not clipped and keeps its gradient: on the policy that
    sampled, even a range of 0 gives that of the policy.
    """
    gain = advantages >= 0
    beyond = jnp.where(gain, log_ratio > high, log_ratio < low)
    clipped = jnp.where(beyond, jnp.where(gain, high, low), log_ratio)
    return clipped, beyond & (advantages != 0)


def surrogate(log_ratio: Array, scale: Array) -> Array:
    """scale·exp(log ratio), 0 where the scale is 0, even where the ratio overflows."""
    return scale * jnp.exp(jnp.where(scale != 0, log_ratio, 0.0))


def metrics(log_ratio: Array, bounded: Array, is_clipped: Array, mask: Array) -> dict[str, Array]:
    ratio = jnp.exp(bounded)
    mean = masked.mean(ratio, mask)
    metrics = {
        "clip_fraction": masked.mean(is_clipped, mask),
        "approx_kl": masked.mean(0.5 * jnp.square(log_ratio), mask),
        "ratio": mean,
        "ratio_var": jnp.where(jnp.isinf(mean), mean, masked.var(ratio, mask)),
    }
    return jax.lax.stop_gradient(metrics)
