"""Losses of language-model training."""

import chex
from jax import Array

from rlhfjax import masked


def language_model(log_probs: Array, mask: Array) -> Array:
    """-mean of log p over all True tokens of the batch.

    Args:
      log_probs: [..., T] of the tokens that were seen.
      mask: [..., T] bool, True where a token is to be learned.

    Returns:
      scalar float32.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    chex.assert_equal_shape([log_probs, mask])
    return -masked.mean(log_probs, mask)


def language_model_by_sequence(log_probs: Array, mask: Array) -> Array:
    """-mean over sequences of the mean of log p over their True tokens.

    Short sequences weigh as much as long ones. A sequence without a True token is left out.

    Args:
      log_probs: [..., T] of the tokens that were seen.
      mask: [..., T] bool, True where a token is to be learned.

    Returns:
      scalar float32.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    chex.assert_equal_shape([log_probs, mask])
    return -masked.mean(masked.mean(log_probs, mask, axis=-1), mask.any(axis=-1))
