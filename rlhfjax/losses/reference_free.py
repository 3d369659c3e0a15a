"""Losses of preference pairs that have no reference.

The reward of a response is β·log π, the margin m that of the chosen one less that of the rejected.
SimPO and ORPO read means over the tokens of a response, CPO and SLiC sums. CPO, ORPO and SLiC are
trained together with the negative log-likelihood of the chosen responses,
`supervised.language_model`, by `reductions.weighted_sum`. Any loss of `preference` has a form
without a reference too: pass zeros.
"""

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _pairs, preference
from rlhfjax.types import Loss, Reduction


def simpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    margin: float | Array,
    label_smoothing: float | Array = 0.0,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(m - γ) of each pair, smoothed as in `preference.cdpo`.

    Args:
      chosen_log_probs: [...], means over the tokens of the chosen responses.
      rejected_log_probs: [...] of the rejected responses.
      mask: [...] bool, False for the rows that only fill a batch; None when all pairs are real.
      beta: β of the reward.
      margin: γ, by how much the rewards should differ (TRL's `simpo_gamma`). Where a ratio γ/β is
        given (`gamma_beta_ratio` of SimPO's code and HALOs), β times that.
      label_smoothing: ε in [0, ½].
      weights: broadcastable to [...]; numbers, without a gradient.
      reduce: from the losses of pairs to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: those of `preference.dpo`, of the rewards β·log π.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward.
    """
    chosen, rejected, mask = _log_probs(chosen_log_probs, rejected_log_probs, mask)
    losses = _pairs.logistic(beta * (chosen - rejected) - margin, label_smoothing)
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def cpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    label_smoothing: float | Array = 0.0,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(m) of each pair, smoothed as in `preference.cdpo`.

    Args:
      chosen_log_probs … reduce: as in `simpo`, but sums over the tokens.

    Returns:
      as `simpo`.

    Raises:
      AssertionError: as `simpo`.

    References:
      Xu et al. 2024, Contrastive Preference Optimization.
    """
    return simpo(
        chosen_log_probs,
        rejected_log_probs,
        mask,
        beta=beta,
        margin=0.0,
        label_smoothing=label_smoothing,
        weights=weights,
        reduce=reduce,
    )


def orpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    label_smoothing: float | Array = 0.0,
    log_prob_max: float | Array = -1e-7,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-β·log σ(log odds(p_chosen) - log odds(p_rejected)) of each pair, odds(p) = p / (1 - p).

    Smoothed as in `preference.cdpo`. The term of ORPO that is added to the likelihood of the chosen
    response.

    Args:
      chosen_log_probs … reduce: as in `simpo`, but here β is the weight of the loss.
      log_prob_max: log p is at most this, so that the odds of a certain response are finite; above
        it there is no gradient.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: those of `simpo`, and means over pairs: `log_odds_chosen`, of the log of the odds
        ratio; `log_odds_ratio`, of its log σ; `odds_ratio`, infinite when one exceeds e^88.

    Raises:
      AssertionError: as `simpo`.

    References:
      Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model.
    """
    chosen, rejected, mask = _log_probs(chosen_log_probs, rejected_log_probs, mask)
    log_odds = _log_odds(chosen, log_prob_max) - _log_odds(rejected, log_prob_max)
    losses = beta * _pairs.logistic(log_odds, label_smoothing)
    loss, metrics = _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)
    odds = {
        "log_odds_chosen": masked.mean(log_odds, mask),
        "log_odds_ratio": masked.mean(jax.nn.log_sigmoid(log_odds), mask),
        "odds_ratio": masked.mean(jnp.exp(log_odds), mask),
    }
    return loss, metrics | jax.lax.stop_gradient(odds)


def slic(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    margin: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """max(0, δ - (log π(chosen) - log π(rejected))) of each pair.

    Args:
      chosen_log_probs … reduce: as in `simpo`, but sums over the tokens and β = 1.
      margin: δ, by how much the log-probabilities should differ.

    Returns:
      as `simpo`.

    Raises:
      AssertionError: as `simpo`.

    References:
      Zhao et al. 2023, SLiC-HF: Sequence Likelihood Calibration with Human Feedback.
    """
    chosen, rejected, mask = _log_probs(chosen_log_probs, rejected_log_probs, mask)
    losses = jax.nn.relu(margin - (chosen - rejected))
    return _pairs.result(losses, chosen, rejected, mask, weights, reduce)


def alpha_rewards(log_probs: Array, *, alpha: float | Array) -> Array:
    """(1 - p^(-α)) / α, the rewards that make AlphaPO of SimPO when they replace log p.

    α = 0 is log p. Constant where -α·log p exceeds 80, so that nothing overflows.

    Args:
      log_probs: [...], means over the tokens of responses.
      alpha: α.

    Returns:
      [...] float32.

    References:
      Gupta et al. 2025, AlphaPO: Reward Shape Matters for LLM Alignment.
    """
    return preference.alpha_derivative(log_probs, alpha=1.0 - alpha)


def _log_probs(chosen: Array, rejected: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    mask = _pairs.all_real(chosen) if mask is None else mask
    return masked.fill(chosen, mask), masked.fill(rejected, mask), mask


def _log_odds(log_probs: Array, log_prob_max: float | Array) -> Array:
    bounded = jnp.minimum(log_probs, log_prob_max)
    return bounded - jax.nn.log1mexp(-bounded)
