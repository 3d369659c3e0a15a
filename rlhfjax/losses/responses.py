"""From the tokens of responses to the numbers that losses of preferences read.

Sums are `masked.sum(log_probs, mask, axis=-1)`, means `masked.mean(log_probs, mask, axis=-1)`.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _pairs


def length_desensitised(
    log_probs: Array, mask: Array, other_mask: Array, *, length_coef: float | Array
) -> Array:
    """Σₜ log p over as many tokens as the other response has, + α·Σₜ log p over those beyond.

    α = 1 is the sum over all tokens; α = 0 cuts both responses of a pair to the same length.

    Args:
      log_probs: [..., T] of the tokens of a response.
      mask: [..., T] bool, its tokens.
      other_mask: [..., T'] bool, the tokens of the other response of the pair.
      length_coef: α.

    Returns:
      [...] float32.

    Raises:
      AssertionError: shapes do not fit or a mask is not bool.

    References:
      Liu et al. 2024, Length Desensitization in Direct Preference Optimization.
    """
    chex.assert_type(other_mask, bool)
    chex.assert_equal_shape_prefix([mask, other_mask], mask.ndim - 1)
    shared = masked.positions(mask) < other_mask.sum(axis=-1, keepdims=True)
    coefs = jnp.where(shared, 1.0, length_coef)
    return masked.sum(coefs * masked.fill(log_probs, mask), mask, axis=-1)


def log_collision(logits: Array) -> Array:
    """log Σ_v p(v)² of p = softmax(logits): two draws agree with this probability.

    Args:
      logits: [..., V]; -inf marks tokens outside the vocabulary.

    Returns:
      [...] float32.
    """
    return jax.nn.logsumexp(2.0 * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def wpo_weights(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    chosen_log_collisions: Array,
    rejected_log_collisions: Array,
    chosen_mask: Array,
    rejected_mask: Array,
) -> Array:
    """w_chosen·w_rejected, w = exp(mean over tokens of log π(y) - log Σ_v π(v)²), as `weights`.

    Pairs that the policy could have given itself weigh more. Numbers, without a gradient.

    Args:
      chosen_log_probs: [..., T] of the tokens of the chosen responses under the policy.
      rejected_log_probs: [..., T'] of the tokens of the rejected ones.
      chosen_log_collisions: [..., T] of the distributions they were scored by, `log_collision`.
      rejected_log_collisions: [..., T'].
      chosen_mask: [..., T] bool.
      rejected_mask: [..., T'] bool.

    Returns:
      [...] float32; a response without a token has w = 1.

    Raises:
      AssertionError: shapes do not fit or a mask is not bool.

    References:
      Zhou et al. 2024, WPO: Enhancing RLHF with Weighted Preference Optimization, eq. 2.
    """
    chosen = _pairs.log_ratio(chosen_log_probs, chosen_log_collisions, chosen_mask)
    rejected = _pairs.log_ratio(rejected_log_probs, rejected_log_collisions, rejected_mask)
    log_weights = masked.mean(chosen, chosen_mask, axis=-1)
    log_weights += masked.mean(rejected, rejected_mask, axis=-1)
    return jax.lax.stop_gradient(jnp.exp(log_weights))
