"""Estimators of KL(π ‖ π_ref) from samples of π, and the controller of its coefficient.

With l = log π(a) - log π_ref(a) at a token a sampled from π, k1 and k3 have the expectation
KL(π ‖ π_ref) and k2 is biased with a small variance.

In a *reward* any of them may be used: the reward is a number, and the policy gradient does the
rest. In a *loss* k1 must not: ∂k1/∂log π = 1, in which π_ref no longer appears and whose
expected gradient is 0. The gradient of k2 is l, whose expectation is the gradient of the
divergence.

The functions see no mask. Where padding may hold infinities, replace the log-probabilities there
before the call: masking the output afterwards is too late for the gradient.
"""

import chex
import jax.numpy as jnp
from jax import Array


def k1(log_probs: Array, ref_log_probs: Array) -> Array:
    """l = log π - log π_ref. Unbiased, may be negative, high variance.

    Args:
      log_probs: [...] of the sampled tokens under the policy.
      ref_log_probs: [...] of the same tokens under the reference.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.

    References:
      Schulman 2020, Approximating KL Divergence.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    return log_probs.astype(jnp.float32) - ref_log_probs.astype(jnp.float32)


def k2(log_probs: Array, ref_log_probs: Array) -> Array:
    """½·l², l = log π - log π_ref. Biased, never negative, low variance.

    Args:
      log_probs: [...] of the sampled tokens under the policy.
      ref_log_probs: [...] of the same tokens under the reference.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.

    References:
      Schulman 2020, Approximating KL Divergence.
    """
    return 0.5 * jnp.square(k1(log_probs, ref_log_probs))


def k3(log_probs: Array, ref_log_probs: Array) -> Array:
    """exp(-l) - 1 + l, l = log π - log π_ref. Unbiased, never negative.

    Infinite when -l exceeds 88. To bound it, bound the input of the exponential, as in
    `k3(jnp.maximum(l, -20.0), jnp.zeros_like(l))`: where only the result is bounded, the gradient
    is NaN.

    Args:
      log_probs: [...] of the sampled tokens under the policy.
      ref_log_probs: [...] of the same tokens under the reference.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.

    References:
      Schulman 2020, Approximating KL Divergence.
    """
    log_ratio = k1(log_probs, ref_log_probs)
    # Of a small l, exp(-l) - 1 + l would lose nearly all digits; with expm1 half of them stay.
    return jnp.expm1(-log_ratio) + log_ratio


def adaptive_coef(
    kl_coef: float | Array,
    kl: float | Array,
    *,
    target: float | Array,
    horizon: float | Array,
    num_samples: float | Array,
    clip: float | Array = 0.2,
) -> Array:
    """β ← β·(1 + clip(kl/target - 1, ±clip)·num_samples/horizon).

    Args:
      kl_coef: scalar β in use.
      kl: scalar divergence that was measured under β, in the unit of `target` (the original: the
        sum over a response, averaged over responses).
      target: divergence to hold.
      horizon: number of samples over which β changes by at most a factor of about exp(±clip).
      num_samples: number of samples since the last update.
      clip: bound of the proportional error.

    Returns:
      scalar float32, the next β.

    Raises:
      AssertionError: `kl_coef` or `kl` is not a scalar.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, §2.2.
    """
    chex.assert_rank([kl_coef, kl], 0)
    error = jnp.clip(jnp.asarray(kl, jnp.float32) / target - 1.0, -clip, clip)
    return jnp.asarray(kl_coef, jnp.float32) * (1.0 + error * num_samples / horizon)
