"""KL(π ‖ π_ref): estimators from samples, the exact divergence, and the coefficient's controller.

With l = log π(a) - log π_ref(a) at a token a sampled from π, k1 and k3 have the expectation
KL(π ‖ π_ref); k2 and |l| are biased, with a smaller variance while the policies are close.

Subtracted from a *reward*, an estimate is a number, and the policy gradient does the rest. k1 gives
the gradient of the divergence itself; k2 and k3 hardly pull near the reference, see
docs/fixed_points.md. Added to a *loss*, it is differentiated:

| estimator | ∂/∂log π at a sampled token | its expectation under π, as a gradient of the policy |
|---|---|---|
| k1 | 1 | 0: π_ref no longer appears, k1 in a loss pulls nowhere |
| k2 | l | ∇KL(π ‖ π_ref) |
| k3 | 1 - exp(-l) | ∇KL(π_ref ‖ π), the other direction |
| absolute | sign l | 2·∇TV(π, π_ref), the total variation |
| straight_through(k3, k2) | l | ∇KL(π ‖ π_ref), with the value of k3 |

The functions of samples see no mask. Where padding may hold infinities, replace the
log-probabilities there before the call: masking the output is too late for the gradient.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def k1(log_probs: Array, ref_log_probs: Array, *, bound: float | Array | None = None) -> Array:
    """l = log π - log π_ref. Unbiased, may be negative, high variance.

    Args:
      log_probs: [...] of the sampled tokens under the policy.
      ref_log_probs: [...] of the same tokens under the reference.
      bound: the estimate is held in ±bound (OpenRLHF), without a gradient beyond; None for none.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.

    References:
      Schulman 2020, Approximating KL Divergence.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    return _bounded(log_probs.astype(jnp.float32) - ref_log_probs.astype(jnp.float32), bound)


def k2(log_probs: Array, ref_log_probs: Array, *, bound: float | Array | None = None) -> Array:
    """½·l², l = log π - log π_ref. Biased, never negative, low variance while l is small.

    Args:
      log_probs: [...] of the sampled tokens under the policy.
      ref_log_probs: [...] of the same tokens under the reference.
      bound: the estimate is at most this, without a gradient beyond; None for no bound.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.

    References:
      Schulman 2020, Approximating KL Divergence.
    """
    # Where only the result is bounded, the gradient of an infinite square is NaN.
    log_ratio = k1(log_probs, ref_log_probs, bound=None if bound is None else 1e18)
    return _bounded(0.5 * jnp.square(log_ratio), bound)


def k3(
    log_probs: Array,
    ref_log_probs: Array,
    *,
    log_ratio_clip: float | Array | None = None,
    bound: float | Array | None = None,
) -> Array:
    """exp(-l) - 1 + l, l = log π - log π_ref. Unbiased, never negative.

    Without a bound it is infinite when -l exceeds 88, and so is its gradient, except at l = -inf,
    where it has none. A bound holds the input of the exponential too: where only the result is
    bounded, the gradient is NaN.

    Args:
      log_probs: [...] of the sampled tokens under the policy.
      ref_log_probs: [...] of the same tokens under the reference.
      log_ratio_clip: l is held in ±log_ratio_clip first (verl: 20), without a gradient beyond.
      bound: the estimate is at most this (verl, OpenRLHF: 10), without a gradient beyond.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.

    References:
      Schulman 2020, Approximating KL Divergence.
    """
    log_ratio = k1(log_probs, ref_log_probs, bound=log_ratio_clip)
    floor = -1e30 if bound is None else -80.0
    log_ratio = jnp.where(log_ratio < floor, floor, log_ratio)
    # Of a small l, exp(-l) - 1 + l would lose nearly all digits; with expm1 half of them stay.
    return _bounded(jnp.expm1(-log_ratio) + log_ratio, bound)


def absolute(
    log_probs: Array, ref_log_probs: Array, *, bound: float | Array | None = None
) -> Array:
    """|l|, l = log π - log π_ref. Biased, never negative.

    Args:
      log_probs: [...] of the sampled tokens under the policy.
      ref_log_probs: [...] of the same tokens under the reference.
      bound: the estimate is at most this, without a gradient beyond; None for no bound.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.
    """
    log_ratio = k1(log_probs, ref_log_probs)
    # Not jnp.abs: its gradient at 0, where a policy starts that is its own reference, is 1.
    return _bounded(jnp.sign(log_ratio) * log_ratio, bound)


def straight_through(value: Array, gradient: Array) -> Array:
    """The value of one estimate with the gradient of another.

    Args:
      value: [...], such as k3: unbiased.
      gradient: [...], such as k2: its gradient is that of the divergence, in expectation.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes differ.
    """
    chex.assert_equal_shape([value, gradient])
    value, gradient = value.astype(jnp.float32), gradient.astype(jnp.float32)
    # Of (value - gradient) + gradient, a small value would lose its digits.
    return jax.lax.stop_gradient(value) + (gradient - jax.lax.stop_gradient(gradient))


def categorical(*, logits: Array, ref_logits: Array) -> Array:
    """KL(π ‖ π_ref) of π = softmax(logits), π_ref = softmax(ref_logits); exact.

    Args:
      logits: [..., V] of the policy; -inf marks tokens outside the vocabulary.
      ref_logits: [..., V] of the reference.

    Returns:
      [...] float32; infinite, without a gradient, where π allows a token that π_ref excludes.

    Raises:
      AssertionError: shapes differ.
    """
    return of_distributions(log_probs=_log_softmax(logits), ref_log_probs=_log_softmax(ref_logits))


def of_distributions(*, log_probs: Array, ref_log_probs: Array) -> Array:
    """KL(π ‖ π_ref) = Σ_a π(a)·(log π(a) - log π_ref(a)), exact.

    Systems disagree on the order of the arguments (rlax: π first; optax: π_ref first), so they
    are named. A token of no probability under π adds 0, whatever π_ref says of it.

    Args:
      log_probs: [..., V] of every token under the policy; -inf where it has no probability.
      ref_log_probs: [..., V] under the reference.

    Returns:
      [...] float32; infinite, without a gradient, where π allows a token that π_ref excludes.

    Raises:
      AssertionError: shapes differ.
    """
    chex.assert_equal_shape([log_probs, ref_log_probs])
    possible = ~jnp.isneginf(log_probs)
    excluded = (possible & jnp.isneginf(ref_log_probs)).any(-1)
    counted = possible & ~excluded[..., None]
    own = jnp.where(counted, log_probs, 0.0).astype(jnp.float32)
    log_ratio = own - jnp.where(counted, ref_log_probs, 0.0).astype(jnp.float32)
    divergence = jnp.sum(jnp.where(counted, jnp.exp(own), 0.0) * log_ratio, axis=-1)
    return jnp.where(excluded, jnp.inf, divergence)


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

    An infinite horizon is the fixed coefficient.

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


def _bounded(estimate: Array, bound: float | Array | None) -> Array:
    return estimate if bound is None else jnp.clip(estimate, -bound, bound)


def _log_softmax(logits: Array) -> Array:
    """log softmax that stays -inf, with a gradient of 0, where the logits are -inf."""
    possible = ~jnp.isneginf(logits)
    finite = jnp.where(possible, logits, 0.0).astype(jnp.float32)
    top = jnp.max(jnp.where(possible, finite, -jnp.inf), axis=-1, keepdims=True)
    shifted = finite - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    total = jax.nn.logsumexp(shifted, axis=-1, keepdims=True, where=possible)
    return jnp.where(possible, shifted - total, -jnp.inf)
