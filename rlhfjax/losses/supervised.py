"""Losses of language-model training."""

import chex
from jax import Array

from rlhfjax import masked
from rlhfjax.types import Reduction


def language_model(log_probs: Array, mask: Array, *, reduce: Reduction = masked.mean) -> Array:
    """-log p of each token.

    Args:
      log_probs: [..., T] of the tokens that were seen.
      mask: [..., T] bool, True where a token is to be learned.
      reduce: from the tokens' losses to the loss, see `reductions`; by default every token of the
        batch weighs the same, under `reductions.sequence_mean` every text.

    Returns:
      float32, what `reduce` gives.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    chex.assert_equal_shape([log_probs, mask])
    return reduce(-masked.fill(log_probs, mask), mask)
