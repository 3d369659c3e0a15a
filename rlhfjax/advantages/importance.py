"""Weights for samples of a policy that is not the learner: w = π_learner / π_sampler.

The sampler's numbers differ from the learner's where it is stale, quantised or another engine. The
weights are numbers: no gradient flows through them. They multiply losses by the argument `weights`.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def token_importance_weights(
    log_probs: Array,
    sampler_log_probs: Array,
    mask: Array,
    *,
    log_ratio_clip: float | Array | None = None,
) -> Array:
    """wₜ = exp(log π - log π_sampler).

    Args:
      log_probs: [..., T] under the learner, before the update.
      sampler_log_probs: [..., T] as the sampler reported them.
      mask: [..., T] bool.
      log_ratio_clip: the log ratio is held in ± this (verl: 20); None for no bound.

    Returns:
      [..., T] float32; 1 at masked tokens.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Yao et al. 2025, Your Efficient RL Framework Secretly Brings You Off-Policy RL Training.
    """
    return jnp.exp(_bounded(_log_ratio(log_probs, sampler_log_probs, mask), log_ratio_clip))


def sequence_importance_weights(
    log_probs: Array,
    sampler_log_probs: Array,
    mask: Array,
    *,
    log_ratio_clip: float | Array | None = None,
) -> Array:
    """w = exp(Σₜ log π - log π_sampler), one for a whole response.

    Args:
      log_probs: [..., T] under the learner, before the update.
      sampler_log_probs: [..., T] as the sampler reported them.
      mask: [..., T] bool.
      log_ratio_clip: the sum is held in ± this (verl: 20); None for no bound.

    Returns:
      [...] float32; 1 for a response without a True token.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    log_ratio = _log_ratio(log_probs, sampler_log_probs, mask).sum(-1)
    return jnp.exp(_bounded(log_ratio, log_ratio_clip))


def truncate_weights(
    weights: Array, *, low: float | Array = 0.0, high: float | Array = jnp.inf
) -> Array:
    """min(max(w, low), high): truncated importance sampling.

    Args:
      weights: [...].
      low: the least (TRL, OpenRLHF); 0 for none (verl).
      high: the largest.

    Returns:
      [...] float32.

    References:
      Ionides 2008, Truncated Importance Sampling.
    """
    return jnp.clip(weights.astype(jnp.float32), low, high)


def reject_weights(
    weights: Array, *, low: float | Array = 0.0, high: float | Array = jnp.inf
) -> Array:
    """w where low ≤ w ≤ high, else 0: what drifted too far does not count (IcePop).

    Args:
      weights: [...].
      low: the least that counts.
      high: the largest that counts.

    Returns:
      [...] float32.
    """
    weights = weights.astype(jnp.float32)
    return jnp.where((weights >= low) & (weights <= high), weights, 0.0)


def normalize_weights(weights: Array, mask: Array) -> Array:
    """w / mean of w over the True entries, so that their mean is 1.

    Args:
      weights: [...] of tokens or of responses, finite: bound them before.
      mask: [...] bool, the shape of `weights`.

    Returns:
      [...] float32; 0 at masked entries, and everywhere if all weights are 0.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    mean = masked.mean(weights, mask)
    return masked.fill(weights, mask) / jnp.where(mean > 0, mean, 1.0)


def on_policy_sequences(
    log_probs: Array,
    sampler_log_probs: Array,
    advantages: Array,
    mask: Array,
    *,
    max_kl: float | Array,
) -> Array:
    """True where A ≥ 0 or the mean over tokens of log π_sampler - log π is at most `max_kl`.

    Bad responses that the learner would hardly give any more teach it nothing.

    Args:
      log_probs: [..., T] under the learner.
      sampler_log_probs: [..., T] as the sampler reported them.
      advantages: [...] one a response.
      mask: [..., T] bool.
      max_kl: the threshold, nats a token.

    Returns:
      [...] bool.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.

    References:
      DeepSeek-AI 2025, DeepSeek-V3.2, §3.1 (off-policy sequence masking).
    """
    chex.assert_shape(advantages, mask.shape[:-1])
    drift = -masked.mean(_log_ratio(log_probs, sampler_log_probs, mask), mask, axis=-1)
    return (advantages >= 0) | (drift <= max_kl)


def _log_ratio(log_probs: Array, sampler_log_probs: Array, mask: Array) -> Array:
    chex.assert_equal_shape([log_probs, sampler_log_probs, mask])
    log_ratio = masked.fill(log_probs, mask) - masked.fill(sampler_log_probs, mask)
    return jax.lax.stop_gradient(log_ratio)


def _bounded(log_ratio: Array, bound: float | Array | None) -> Array:
    return log_ratio if bound is None else jnp.clip(log_ratio, -bound, bound)
