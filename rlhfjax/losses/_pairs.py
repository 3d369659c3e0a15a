"""What the losses of preferences share: log ratios, the logistic loss, weights, metrics."""

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.types import Loss, Reduction


def log_ratio(log_probs: Array, ref_log_probs: Array, mask: Array) -> Array:
    """log π - log π_ref, 0 where masked; gradients flow to `log_probs` only."""
    return masked.fill(log_probs, mask) - jax.lax.stop_gradient(masked.fill(ref_log_probs, mask))


def log_ratios(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None,
) -> tuple[Array, Array, Array]:
    """The log ratios of both responses of each pair, and the mask."""
    mask = all_real(chosen_log_probs) if mask is None else mask
    chosen = log_ratio(chosen_log_probs, ref_chosen_log_probs, mask)
    return chosen, log_ratio(rejected_log_probs, ref_rejected_log_probs, mask), mask


def all_real(x: Array) -> Array:
    return jnp.ones(x.shape, bool)


def logistic(margins: Array, label_smoothing: float | Array) -> Array:
    """-(1 - ε)·log σ(m) - ε·log σ(-m)."""
    kept = (1.0 - label_smoothing) * jax.nn.log_sigmoid(margins)
    return -kept - label_smoothing * jax.nn.log_sigmoid(-margins)


def weighted(losses: Array, mask: Array, weights: float | Array) -> Array:
    weights = masked.fill(jnp.broadcast_to(weights, mask.shape), mask)
    return jax.lax.stop_gradient(weights) * losses


def result(
    losses: Array,
    chosen_rewards: Array,
    rejected_rewards: Array,
    mask: Array,
    weights: float | Array,
    reduce: Reduction,
) -> Loss:
    """The reduced loss, and the metrics that all losses of pairs have."""
    metrics = {
        "rewards/chosen": masked.mean(chosen_rewards, mask),
        "rewards/rejected": masked.mean(rejected_rewards, mask),
        "rewards/accuracies": masked.mean(chosen_rewards > rejected_rewards, mask),
        "rewards/margins": masked.mean(chosen_rewards - rejected_rewards, mask),
    }
    return reduce(weighted(losses, mask, weights), mask), jax.lax.stop_gradient(metrics)
