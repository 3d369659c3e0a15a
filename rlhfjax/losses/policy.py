"""Policy-gradient losses on the tokens of responses."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def ppo_clip(
    log_probs: Array,
    old_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    clip_range: float | Array = 0.2,
    clip_range_high: float | Array | None = None,
    dual_clip: float | Array | None = None,
    log_ratio_clip: float | Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """-mean over tokens of min(ratio·A, clip(ratio, 1 - ε, 1 + ε_high)·A).

    ratio = exp(log_probs - old_log_probs) = π / π_old. With a dual clip c the objective is at
    least c·A where A < 0. Gradients flow to `log_probs` only. The bounds are applied to the log
    ratio, the input of the exponential, so that a ratio which overflows where it is clipped
    anyway costs neither value nor gradient.

    Args:
      log_probs: [..., T] under the policy that is trained.
      old_log_probs: [..., T] under the policy that sampled.
      advantages: [..., T].
      mask: [..., T] bool.
      clip_range: ε.
      clip_range_high: ε_high; None takes ε.
      dual_clip: c > 1; None for no such bound.
      log_ratio_clip: |log ratio| is bounded by it before anything else; None for no bound.

    Returns:
      loss: scalar float32.
      metrics: scalars. `clip_fraction`, tokens whose clipped term is the smaller one;
        `approx_kl`, mean of ½·(log ratio)² before `log_ratio_clip`; `ratio` and `ratio_var`,
        mean and biased variance of the ratio.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 7; Ye et al. 2020,
      Mastering Complex Control in MOBA Games (dual clip); Yu et al. 2025, DAPO (ε_high).
    """
    chex.assert_equal_shape([log_probs, old_log_probs, advantages, mask])
    chex.assert_type(mask, bool)
    log_probs = jnp.where(mask, log_probs, 0).astype(jnp.float32)
    old_log_probs = jax.lax.stop_gradient(jnp.where(mask, old_log_probs, 0)).astype(jnp.float32)
    advantages = jax.lax.stop_gradient(jnp.where(mask, advantages, 0)).astype(jnp.float32)

    unbounded_log_ratio = log_probs - old_log_probs
    log_ratio = unbounded_log_ratio
    if log_ratio_clip is not None:
        log_ratio = jnp.clip(log_ratio, -log_ratio_clip, log_ratio_clip)

    high = jnp.log1p(clip_range if clip_range_high is None else clip_range_high)
    low = jnp.log(jnp.maximum(1.0 - clip_range, 0.0))
    gain = advantages >= 0
    clipped = jnp.where(gain, jnp.minimum(log_ratio, high), jnp.maximum(log_ratio, low))
    is_clipped = jnp.where(gain, log_ratio > high, log_ratio < low) & (advantages != 0)
    if dual_clip is not None:
        clipped = jnp.where(gain, clipped, jnp.minimum(clipped, jnp.log(dual_clip)))
    loss = masked.mean(-advantages * jnp.exp(clipped), mask)

    ratio = jnp.exp(log_ratio)
    metrics = {
        "clip_fraction": masked.mean(is_clipped, mask),
        "approx_kl": masked.mean(0.5 * jnp.square(unbounded_log_ratio), mask),
        "ratio": masked.mean(ratio, mask),
        "ratio_var": masked.var(ratio, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)
