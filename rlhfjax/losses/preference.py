"""Losses of preference pairs that ask for a margin between the chosen and the rejected response.

They read log-probabilities of whole responses. How these come from the tokens' is the caller's
choice: `masked.sum(log_probs, mask, axis=-1)` as in DPO, `masked.mean(log_probs, mask, axis=-1)`
as in the length-normalised IPO of TRL and HALOs, or `responses.length_desensitised`.

The implicit reward of a response is r = β·(log π - log π_ref), the margin of a pair is
m = r_chosen - r_rejected. Gradients flow to the policy's log-probabilities only. Without a
reference, pass zeros. Losses that hold each reward to an anchor are in `anchored`, those that never
have a reference in `reference_free`, those of single responses in `unpaired`. An objective of
several losses is their `reductions.weighted_sum`.

Every loss takes two more arguments. `weights` multiply the loss of each pair, such as those of
`responses.wpo_weights`; `reduce` says how pairs are averaged, and `masked.fill` leaves them as they
are.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import _pairs
from rlhfjax.types import Loss, Reduction


def dpo(
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
    """-log σ(m) of each pair.

    Args:
      chosen_log_probs: [...] of the chosen responses under the policy that is trained.
      rejected_log_probs: [...] of the rejected responses.
      ref_chosen_log_probs: [...] of the chosen responses under the reference.
      ref_rejected_log_probs: [...] of the rejected responses under the reference.
      mask: [...] bool, False for the rows that only fill a batch; None when all pairs are real.
      beta: β of the implicit reward.
      weights: broadcastable to [...]; numbers, without a gradient.
      reduce: from the losses of pairs to the loss.

    Returns:
      loss: float32, what `reduce` gives.
      metrics: means over the pairs. `rewards/chosen` and `rewards/rejected`, the implicit
        rewards; `rewards/accuracies`, pairs whose chosen response has the larger one;
        `rewards/margins`, m.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Rafailov et al. 2023, Direct Preference Optimization, eq. 7.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    losses = -jax.nn.log_sigmoid(beta * (chosen - rejected))
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def cdpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    label_smoothing: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-(1 - ε)·log σ(m) - ε·log σ(-m) of each pair: labels that are wrong with probability ε.

    The loss is least at the finite margin log((1 - ε)/ε).

    Args:
      chosen_log_probs … reduce: as in `dpo`.
      label_smoothing: ε in [0, ½].

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    losses = _pairs.logistic(beta * (chosen - rejected), label_smoothing)
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def robust(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    label_smoothing: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """(-(1 - ε)·log σ(m) + ε·log σ(-m)) / (1 - 2·ε) of each pair.

    If labels are flipped with probability ε, its expectation is the loss of `dpo` on the true ones.

    Args:
      chosen_log_probs … reduce: as in `dpo`.
      label_smoothing: ε in [0, ½).

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Chowdhury et al. 2024, Provably Robust DPO: Aligning Language Models with Noisy Feedback.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    margins = beta * (chosen - rejected)
    kept, flipped = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    losses = ((1.0 - label_smoothing) * kept - label_smoothing * flipped) / (
        1.0 - 2.0 * label_smoothing
    )
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def hinge(
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
    """max(0, 1 - m) of each pair.

    Args:
      chosen_log_probs … reduce: as in `dpo`.

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Zhao et al. 2023, SLiC-HF; Liu et al. 2024, Statistical Rejection Sampling Improves Preference
      Optimization.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    losses = jax.nn.relu(1.0 - beta * (chosen - rejected))
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def ipo(
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
    """(m/β - 1/(2·β))² of each pair: the difference of the log ratios is led to 1/(2·β).

    On sums of log-probabilities it is the loss of the paper (and of DPO's code, OpenRLHF), on means
    the length-normalised one (TRL, HALOs), whose rewards are then per token.

    Args:
      chosen_log_probs … reduce: as in `dpo`.

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human
      Preferences, eq. 17.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    losses = jnp.square(chosen - rejected - 0.5 / beta)
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def exo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    label_smoothing: float | Array,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """KL(σ(m) ‖ 1 - ε) of each pair, between Bernoulli distributions.

    Args:
      chosen_log_probs … reduce: as in `dpo`.
      label_smoothing: ε in (0, 1); at 0 the loss is infinite.

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Ji et al. 2024, Towards Efficient Exact Optimization of Language Model Alignment.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    margins = beta * (chosen - rejected)
    win, lose = jax.nn.log_sigmoid(margins), jax.nn.log_sigmoid(-margins)
    losses = jnp.exp(win) * (win - jnp.log1p(-label_smoothing)) + jnp.exp(lose) * (
        lose - jnp.log(label_smoothing)
    )
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def discopop(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    temperature: float | Array = 0.05,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-(1 - g)·log σ(m) + g·exp(-m) of each pair, g = σ(m/τ).

    Args:
      chosen_log_probs … reduce: as in `dpo`.
      temperature: τ < 1.

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Lu et al. 2024, Discovering Preference Optimization Algorithms with and for Large Language
      Models.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    margins = beta * (chosen - rejected)
    gates = margins / temperature
    # The exponents are added, since exp(-m) alone overflows where g vanishes.
    exponential = jnp.exp(jax.nn.log_sigmoid(gates) - margins)
    losses = exponential - jax.nn.sigmoid(-gates) * jax.nn.log_sigmoid(margins)
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def aot(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    label_smoothing: float | Array = 0.0,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(m), smoothed as in `cdpo`, with margins and reference margins matched by rank.

    The margins of the policy, β·(log π(chosen) - log π(rejected)), and those of the reference are
    sorted along the last axis, and the k-th of one meets the k-th of the other: the distribution of
    margins is to dominate that of the reference. A pair keeps the place of its policy's margin.

    Args:
      chosen_log_probs … reduce: as in `dpo`.
      label_smoothing: ε of `cdpo`.

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    policy = masked.fill(chosen_log_probs, mask) - masked.fill(rejected_log_probs, mask)
    reference = _pairs.log_ratio(ref_chosen_log_probs, ref_rejected_log_probs, mask)
    reference = jax.lax.stop_gradient(_of_same_rank(reference, policy, mask))
    losses = _pairs.logistic(beta * (policy - reference), label_smoothing)
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def aot_unpaired(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    label_smoothing: float | Array = 0.0,
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(m), smoothed as in `cdpo`, with chosen and rejected rewards matched by rank.

    Both are sorted along the last axis, and the k-th chosen meets the k-th rejected reward, whether
    or not they answer one prompt. A pair keeps the place of its chosen response.

    Args:
      chosen_log_probs … reduce: as in `dpo`.
      label_smoothing: ε of `cdpo`.

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Melnyk et al. 2024, Distributional Preference Alignment of LLMs via Optimal Transport.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    margins = beta * (chosen - _of_same_rank(rejected, chosen, mask))
    losses = _pairs.logistic(margins, label_smoothing)
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def f_dpo(
    chosen_log_probs: Array,
    rejected_log_probs: Array,
    ref_chosen_log_probs: Array,
    ref_rejected_log_probs: Array,
    mask: Array | None = None,
    *,
    beta: float | Array,
    derivative: Callable[[Array], Array],
    weights: float | Array = 1.0,
    reduce: Reduction = masked.mean,
) -> Loss:
    """-log σ(β·(f'(u_chosen) - f'(u_rejected))) of each pair, u = π/π_ref.

    DPO with another f-divergence to the reference in place of the reverse KL divergence.

    Args:
      chosen_log_probs … reduce: as in `dpo`.
      derivative: log u [...] ↦ f'(u) [...], up to a constant: `js_derivative`, or
        `alpha_derivative` with its α bound.

    Returns:
      as `dpo`.

    Raises:
      AssertionError: as `dpo`.

    References:
      Wang et al. 2023, Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints.
    """
    chosen, rejected, mask = _pairs.log_ratios(
        chosen_log_probs, rejected_log_probs, ref_chosen_log_probs, ref_rejected_log_probs, mask
    )
    losses = -jax.nn.log_sigmoid(beta * (derivative(chosen) - derivative(rejected)))
    return _pairs.result(losses, beta * chosen, beta * rejected, mask, weights, reduce)


def alpha_derivative(log_ratios: Array, *, alpha: float | Array) -> Array:
    """(u^(α - 1) - 1) / (α - 1) of u = π/π_ref: f' of the α-divergences, for `f_dpo`.

    α = 1 is log u, the reverse KL divergence of DPO; α = 0 is 1 - 1/u, the forward one. The paper's
    α is 1 - α here. Constant where (α - 1)·log u exceeds 80, so that nothing overflows.

    Args:
      log_ratios: [...], log u.
      alpha: α.

    Returns:
      [...] float32.

    References:
      Wang et al. 2023, Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints.
    """
    log_ratios = log_ratios.astype(jnp.float32)
    power = jnp.asarray(alpha, jnp.float32) - 1.0
    divisor = jnp.where(power == 0, 1.0, power)
    powered = jnp.expm1(jnp.minimum(divisor * log_ratios, 80.0)) / divisor
    return jnp.where(power == 0, log_ratios, powered)


def js_derivative(log_ratios: Array) -> Array:
    """log σ(log u) of u = π/π_ref: f' of the Jensen-Shannon divergence but for log 2, for `f_dpo`.

    Args:
      log_ratios: [...], log u.

    Returns:
      [...] float32.

    References:
      Wang et al. 2023, Beyond Reverse KL: Generalizing DPO with Diverse Divergence Constraints.
    """
    return jax.nn.log_sigmoid(log_ratios.astype(jnp.float32))


def implicit_rewards(
    log_probs: Array, ref_log_probs: Array, mask: Array | None = None, *, beta: float | Array
) -> Array:
    """β·(log π - log π_ref) of each response.

    Args:
      log_probs: [...] of responses under the policy.
      ref_log_probs: [...] under the reference; no gradient flows there.
      mask: [...] bool; None when all responses are real.
      beta: β.

    Returns:
      [...] float32; 0 where masked.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.

    References:
      Rafailov et al. 2023, Direct Preference Optimization, §4.
    """
    mask = _pairs.all_real(log_probs) if mask is None else mask
    return beta * _pairs.log_ratio(log_probs, ref_log_probs, mask)


def _of_same_rank(x: Array, ranked: Array, mask: Array) -> Array:
    """The entries of x that have, among the True ones, the ranks of those of `ranked`."""
    order = jnp.lexsort((x, ~mask))
    ranks = jnp.argsort(jnp.lexsort((ranked, ~mask)))
    return jnp.take_along_axis(x, jnp.take_along_axis(order, ranks, axis=-1), axis=-1)
