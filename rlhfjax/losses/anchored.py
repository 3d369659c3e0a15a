"""Losses of preference pairs that hold the reward of each response to an anchor of its own.

Where only the margin counts, as in `preference`, both rewards may fall together. Here each also has
a place to go: 0, a reference point, ±½. Arguments, rewards and metrics are those of `preference`.
"""

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _pairs
from rlhfjax.types import Loss, Reduction


def sppo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """(r_chosen/β - 1/(2·β))² + (r_rejected/β + 1/(2·β))² of each pair.

    The labels are hard: the chosen response always wins.

    Args:
      chosen_log_probs … reduce: as in `preference.dpo`.

    Returns:
      as `preference.dpo`.

    Raises:
      AssertionError: as `preference.dpo`.

    References:
      Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    losses = jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def nca(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(r_chosen) - ½·log σ(-r_chosen) - ½·log σ(-r_rejected) of each pair.

    Args:
      chosen_log_probs … reduce: as in `preference.dpo`.

    Returns:
      as `preference.dpo`.

    Raises:
      AssertionError: as `preference.dpo`.

    References:
      Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = -jax.nn.log_sigmoid(chosen) - 0.5 * (
        jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    )
    return _pairs.result(losses, chosen, rejected, mask, weights, reduce)


def apo_zero(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """1 - σ(r_chosen) + σ(r_rejected) of each pair: the one goes up, the other down.

    For chosen responses that are better than what the policy gives.

    Args:
      chosen_log_probs … reduce: as in `preference.dpo`.

    Returns:
      as `preference.dpo`.

    Raises:
      AssertionError: as `preference.dpo`.

    References:
      D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)
    return _pairs.result(losses, chosen, rejected, mask, weights, reduce)


def apo_down(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """σ(r_chosen) + 1 - σ(r_chosen - r_rejected) of each pair: both go down, the other more.

    For chosen responses that are worse than what the policy gives.

    Args:
      chosen_log_probs … reduce: as in `preference.dpo`.

    Returns:
      as `preference.dpo`.

    Raises:
      AssertionError: as `preference.dpo`.

    References:
      D'Oosterlinck et al. 2024, Anchored Preference Optimization and Contrastive Revisions.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)
    return _pairs.result(losses, chosen, rejected, mask, weights, reduce)


def bco_pair(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(r_chosen) - log σ(-r_rejected) of each pair: `unpaired.bco` without a shift.

    Args:
      chosen_log_probs … reduce: as in `preference.dpo`.

    Returns:
      as `preference.dpo`.

    Raises:
      AssertionError: as `preference.dpo`.

    References:
      Jung et al. 2024, Binary Classifier Optimization for Large Language Model Alignment.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    chosen, rejected = beta * chosen, beta * rejected
    losses = -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)
    return _pairs.result(losses, chosen, rejected, mask, weights, reduce)


def kto_pair(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """½·(1 - σ(r_chosen - z_rejected)) + ½·(1 - σ(z_chosen - r_rejected)) of each pair.

    z = max(0, mean of r over the batch), of the other kind of responses. Here the gradient flows
    through z, unlike in `unpaired.kto` (OpenRLHF's first form of KTO).

    Args:
      chosen_log_probs … reduce: as in `preference.dpo`.

    Returns:
      as `preference.dpo`.

    Raises:
      AssertionError: as `preference.dpo`.

    References:
      Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    chosen, rejected = beta * chosen, beta * rejected
    chosen_kl = jax.nn.relu(masked.mean(chosen, mask))
    rejected_kl = jax.nn.relu(masked.mean(rejected, mask))
    losses = 0.5 * (jax.nn.sigmoid(rejected_kl - chosen) + jax.nn.sigmoid(rejected - chosen_kl))
    return _pairs.result(losses, chosen, rejected, mask, weights, reduce)
