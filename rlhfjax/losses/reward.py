"""Losses of reward models."""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def pairwise(
    chosen_scores: Array,
    rejected_scores: Array,
    mask: Array | None = None,
    *,
    margin: float | Array = 0.0,
    center_coef: float | Array = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Bradley-Terry: mean of -log sigmoid(c - r - margin), + center_coef · mean of (c + r)².

    Args:
      chosen_scores: [...], c.
      rejected_scores: [...], r.
      mask: [...] bool, False for the rows that only fill a batch; None when all pairs are real.
      margin: scalar or [...], by how much c should exceed r.
      center_coef: weight of the term that keeps scores near 0.

    Returns:
      loss: scalar float32.
      metrics: `accuracy`, pairs with c > r; `margin`, mean of c - r.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Bradley and Terry 1952; Touvron et al. 2023, Llama 2, eq. 2 (margin); Eisenstein et al.
      2023, Helping or Herding?, appendix (centring).
    """
    if mask is None:
        mask = jnp.ones(chosen_scores.shape, bool)
    chex.assert_equal_shape([chosen_scores, rejected_scores, mask])
    chex.assert_type(mask, bool)
    chosen = jnp.where(mask, chosen_scores, 0).astype(jnp.float32)
    rejected = jnp.where(mask, rejected_scores, 0).astype(jnp.float32)
    margin = jnp.where(mask, margin, 0)
    difference = chosen - rejected
    loss = masked.mean(-jax.nn.log_sigmoid(difference - margin), mask)
    loss += center_coef * masked.mean(jnp.square(chosen + rejected), mask)
    metrics = {
        "accuracy": masked.mean(difference > 0, mask),
        "margin": masked.mean(difference, mask),
    }
    return loss, jax.lax.stop_gradient(metrics)
