"""The library gives the peers' numbers, once their conventions are spelled out as compositions.

`EXPRESSED` holds, for each function of the golden file, the composition that gives what a peer
computes. Every field of every case must be given by it, except for the cases of `DIFFERENT`,
which the library answers otherwise on purpose.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_cases import Case

from rlhfjax import advantages, kl, log_probs, losses, masked, sampling

BIASED = {"halos", "sff-details", "lmhp-openai", "lmhp-details", "alpaca_farm", "openrlhf"}
# Formula-dependent at logits of 3e4: x - logsumexp(x) loses what log_softmax keeps.
LARGE_LOGITS_ATOL = 1e-3


class At(NamedTuple):
    """A value that the convention defines at some entries only."""

    value: Any
    valid: np.ndarray


def ddof(case: Case) -> int:
    return 0 if case.peer in BIASED else 1


def ones(like: Any) -> jax.Array:
    return jnp.ones(np.shape(like), bool)


def masked_mean(case: Case) -> dict[str, Any]:
    x, mask = case.inputs["x"], case.inputs["mask"]
    if "mean_axis1" in case.expected:
        return {"mean_all": masked.mean(x, mask), "mean_axis1": masked.mean(x, mask, axis=1)}
    return {"mean": masked.mean(x, mask, axis=case.inputs.get("axis"))}


def masked_var(case: Case) -> dict[str, Any]:
    return {"var": masked.var(case.inputs["x"], case.inputs["mask"], ddof=ddof(case))}


def masked_whiten(case: Case) -> dict[str, Any]:
    """Peers leave something at masked entries; the library has 0 there."""
    x, mask = case.inputs["x"], case.inputs["mask"]
    shift_mean = case.inputs.get("shift_mean", True)
    return {"whitened": At(masked.whiten(x, mask, shift_mean=shift_mean, ddof=ddof(case)), mask)}


def whiten(case: Case) -> dict[str, Any]:
    x = case.inputs["x"]
    return {
        "whitened": masked.whiten(
            x,
            ones(x),
            shift_mean=case.inputs["shift_mean"],
            ddof=ddof(case),
            # alpaca_farm adds its eps to the standard deviation, where 1e-8 is out of sight.
            eps=0.0 if case.peer == "alpaca_farm" else 1e-8,
        )
    }


def gae(case: Case) -> dict[str, Any]:
    inputs = case.inputs
    if case.peer == "rlax":
        values = inputs["values"]
        result, _ = advantages.gae(
            inputs["r_t"],
            values[:, :-1],
            ones(inputs["r_t"]),
            gamma=inputs["discount_t"],
            gae_lambda=inputs["lambda_"],
            bootstrap_value=values[:, -1],
        )
        return {"advantages": result}

    rewards, values = inputs["rewards"], inputs["values"]
    decays = {"gamma": inputs["gamma"], "gae_lambda": inputs["lam"]}
    if case.peer == "trlx":
        mask = ones(rewards)
        result, returns = advantages.gae(rewards, values, mask, **decays)
        if inputs["whiten"]:
            result = masked.whiten(result, mask, ddof=1)
        return {"advantages": result, "returns": returns}

    mask = inputs["mask"]
    if case.convention.startswith("zero_masked"):
        rewards, values = rewards * mask, values * mask
        result, returns = advantages.gae(rewards, values, ones(mask), **decays)
        if case.peer == "openrlhf":
            return {"advantages": result, "returns": returns}
        to_go, _ = advantages.gae(
            rewards, 0 * values, ones(mask), gamma=inputs["gamma"], gae_lambda=1.0
        )
        return {
            "advantages": masked.whiten(result, mask, ddof=0),
            "returns": returns * mask,
            "discounted_returns": to_go * mask,
        }

    result, returns = advantages.gae(rewards, values, mask, **decays)
    if "whiten" in case.convention:
        result = masked.whiten(result, mask, ddof=1)
    return {"advantages": At(result, mask), "returns": At(returns, mask)}


def adaptive_kl_controller(case: Case) -> dict[str, Any]:
    inputs = case.inputs

    def step(kl_coef: jax.Array, measured: jax.Array) -> tuple[jax.Array, jax.Array]:
        kl_coef = kl.adaptive_coef(
            kl_coef,
            measured,
            target=inputs["target"],
            horizon=inputs["horizon"],
            num_samples=inputs["n_steps"],
        )
        return kl_coef, kl_coef

    return {"coefficients": jax.lax.scan(step, jnp.float32(inputs["init"]), inputs["kl"])[1]}


def straight_through(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    """The value of k3 with the gradient of k2."""
    k2 = kl.k2(log_probs, ref_log_probs)
    return k2 + jax.lax.stop_gradient(kl.k3(log_probs, ref_log_probs) - k2)


def bounded_k3(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    log_ratio = jnp.maximum(kl.k1(log_probs, ref_log_probs), -20.0)
    return kl.k3(log_ratio, jnp.zeros_like(log_ratio))


ESTIMATORS = {
    "k1": kl.k1,
    "k2": kl.k2,
    "k3": kl.k3,
    "k3+": straight_through,
    "abs": lambda log_probs, ref_log_probs: jnp.abs(kl.k1(log_probs, ref_log_probs)),
    "kl": kl.k1,
    "mse_kl": kl.k2,
    "low_var_kl": kl.k3,
}


def kl_estimator(case: Case) -> dict[str, Any]:
    inputs = case.inputs
    if case.peer == "trlx":
        estimate = kl.k3(inputs["logprobs"], inputs["ref_logprobs"])
        return {
            "kl": estimate,
            "mean_kl_per_sequence": estimate.sum(-1).mean(),
            "mean_kl_per_token": estimate.mean(),
        }
    estimator = ESTIMATORS[inputs.get("estimator") or inputs["method"]]
    bound = 10.0 if case.peer == "openrlhf" else inputs.get("clamp_value")
    if bound is not None and estimator is kl.k3:
        estimator = bounded_k3

    def total(log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        estimate = estimator(log_probs, inputs["ref_logprobs"])
        if bound is not None:
            estimate = jnp.clip(estimate, -bound, bound)
        return estimate.sum(), estimate

    grad, estimate = jax.grad(total, has_aux=True)(inputs["logprobs"])
    return {"kl": estimate, "grad_logprobs": grad}


def penalised_everywhere(scores: Any, kl_: Any, mask: Any, *, kl_coef: float) -> jax.Array:
    """The penalty also counts at masked columns (OpenRLHF, alpaca_farm)."""
    return advantages.token_rewards(scores, kl_, mask, kl_coef=kl_coef) - kl_coef * kl_ * ~mask


def token_rewards(case: Case) -> dict[str, Any]:
    inputs, kl_coef = case.inputs, case.inputs["kl_coef"]
    estimate = ESTIMATORS[inputs.get("estimator", "k1")](inputs["logprobs"], inputs["ref_logprobs"])
    if case.peer == "lmhp-openai":
        mask, scores = ones(estimate), inputs["scores"]
        return {
            "rewards": advantages.token_rewards(scores, estimate, mask, kl_coef=kl_coef),
            "non_score_reward": advantages.token_rewards(
                0 * scores, estimate, mask, kl_coef=kl_coef
            ),
        }
    mask = inputs["mask"]
    if case.peer == "openrlhf":
        scores, bounds = inputs["scores"], inputs["reward_clip_range"]
        if bounds is not None:
            scores = jnp.clip(scores, bounds[0], bounds[1])
        return {"rewards": penalised_everywhere(scores, estimate, mask, kl_coef=kl_coef)}
    if case.peer == "tunix":
        return {
            "rewards": advantages.token_rewards(inputs["scores"], estimate, mask, kl_coef=kl_coef)
        }
    scores = inputs["token_level_scores"].sum(-1)
    measured = masked.mean(estimate, mask, axis=-1).mean()
    return {
        "rewards": advantages.token_rewards(scores, estimate, mask, kl_coef=kl_coef),
        "kl_for_controller": measured,
        "kl_coef_after": kl.adaptive_coef(
            kl_coef,
            measured,
            target=inputs["target"],
            horizon=inputs["horizon"],
            num_samples=len(scores),
        ),
    }


def over_sequences(token_means: jax.Array, mask: Any, mode: str) -> jax.Array:
    """From each sequence's mean to the reductions that verl and OpenRLHF name."""
    sums = token_means * mask.sum(-1)
    if mode == "seq-mean-token-mean":
        return token_means.mean()
    return sums.mean() if mode == "seq-mean-token-sum" else sums.sum() / mask.shape[-1]


def ppo_clip_loss(case: Case) -> dict[str, Any]:
    inputs = case.inputs
    if case.peer == "rlax":
        log_ratios = np.log(inputs["ratios"])

        def row(log_ratio: jax.Array, advantage: jax.Array) -> jax.Array:
            zeros = jnp.zeros_like(log_ratio)
            return losses.policy.ppo_clip(
                log_ratio, zeros, advantage, ones(zeros), clip_range=inputs["epsilon"]
            )[0]

        return {"loss": jax.vmap(row)(log_ratios, inputs["advantages"])}

    def either(*names: str) -> float | None:
        return next((inputs[name] for name in names if inputs.get(name) is not None), None)

    new, mask = inputs["logprobs"], inputs["mask"]
    old, mode = inputs["old_logprobs"], inputs.get("mode", "token-mean")
    options = {
        "clip_range": either("clip_low", "eps_low", "clip"),
        "clip_range_high": either("clip_high", "eps_high", "clip"),
        "dual_clip": inputs["dual_clip"],
        "log_ratio_clip": None if case.peer == "tunix" else 20.0,
    }

    def loss_of(new: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        arrays = (new, old, inputs["advantages"], mask)
        loss, metrics = losses.policy.ppo_clip(*arrays, **options)
        if mode != "token-mean":
            means, _ = jax.vmap(lambda *rows: losses.policy.ppo_clip(*rows, **options))(*arrays)
            loss = over_sequences(means, mask, mode)
        if "kl_coef" in inputs:
            loss += inputs["kl_coef"] * masked.mean(kl.k1(new, inputs["ref_logprobs"]), mask)
        return loss, metrics

    (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(new)
    bound = 20.0 if case.peer == "verl" else np.inf
    given = {
        "loss": loss,
        "clip_frac": metrics["clip_fraction"],
        "ppo_kl": masked.mean(jnp.clip(kl.k1(old, new), -bound, bound), mask),
        "grad_logprobs": grad,
        # The share of tokens that only the second bound holds: the two losses differ there.
        "clip_frac_lower": dual_clipped(case, options),
    }
    return {name: given[name] for name in case.expected}


def dual_clipped(case: Case, options: dict[str, Any]) -> jax.Array:
    inputs = case.inputs

    def tokens(dual_clip: float | None) -> jax.Array:
        token = jax.vmap(
            jax.vmap(
                lambda *arrays: losses.policy.ppo_clip(
                    *arrays, **{**options, "dual_clip": dual_clip}
                )[0]
            )
        )
        return token(
            inputs["logprobs"], inputs["old_logprobs"], inputs["advantages"], inputs["mask"]
        )

    return masked.mean(tokens(inputs["dual_clip"]) < tokens(None), inputs["mask"])


def value_loss(case: Case) -> dict[str, Any]:
    inputs, mask = case.inputs, case.inputs["mask"]
    by_token = inputs.get("token_level_loss", inputs.get("mode", "token-mean") == "token-mean")
    clip_range = inputs["clip_value"]

    def loss_of(values: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        arrays = (values, inputs["old_values"], inputs["returns"], mask)
        loss, metrics = losses.value.clipped_value_loss(*arrays, clip_range=clip_range)
        if not by_token:
            means, _ = jax.vmap(
                lambda *rows: losses.value.clipped_value_loss(*rows, clip_range=clip_range)
            )(*arrays)
            loss = over_sequences(means, mask, "seq-mean-token-mean")
        return loss, metrics

    (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(inputs["values"])
    given = {"loss": loss, "clip_frac": metrics["clip_fraction"], "grad_values": grad}
    return {name: given[name] for name in case.expected}


def pairwise_reward_loss(case: Case) -> dict[str, Any]:
    inputs = case.inputs
    if case.peer == "halos":
        chosen, rejected = inputs["chosen_logits"][:, 1], inputs["rejected_logits"][:, 1]
    else:
        chosen, rejected = inputs["chosen"], inputs["rejected"]
    margin = inputs.get("margin")
    if margin is None or case.convention == "log_exp":
        margin = 0.0

    def loss_of(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return losses.reward.pairwise(
            chosen, rejected, margin=margin, center_coef=inputs.get("center") or 0.0
        )

    (loss, metrics), grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
        chosen, rejected
    )
    given = {
        "loss": loss,
        "accuracy": metrics["accuracy"],
        "grad_chosen": grads[0],
        "grad_rejected": grads[1],
    }
    return {name: given[name] for name in case.expected}


def sft_loss(case: Case) -> dict[str, Any]:
    assert not case.inputs["token_level_loss"]
    loss = losses.supervised.language_model_by_sequence(
        case.inputs["logprobs"], case.inputs["mask"]
    )
    return {"loss": loss}


def response_mask(case: Case) -> dict[str, Any]:
    """Several end tokens are one, once they are given the same id."""
    ids, ends = case.inputs["ids"], np.atleast_1d(case.inputs["eos"])
    ids = jnp.where(jnp.isin(ids, ends), ends[0], ids)
    return {"mask": sampling.response_mask(ids, end_token=int(ends[0]))}


def filled(case: Case, logits: jax.Array) -> jax.Array:
    """OpenAI marks removed tokens by -1e10 instead of -inf."""
    return jnp.where(jnp.isneginf(logits), -1e10, logits) if case.peer == "lmhp-openai" else logits


def top_k_filter(case: Case) -> dict[str, Any]:
    return {"filtered": filled(case, sampling.top_k(case.inputs["logits"], k=case.inputs["k"]))}


def top_p_filter(case: Case) -> dict[str, Any]:
    logits, k = case.inputs["logits"].astype(np.float32), case.inputs.get("k")
    if k is not None:
        logits = sampling.top_k(logits, k=k)
    kept = sampling.top_p(logits, p=case.inputs["p"])
    given = {"filtered": filled(case, kept), "kept_count": jnp.isfinite(kept).sum(-1)}
    return {name: given[name] for name in case.expected if name in given} or {"filtered": kept}


def min_p_filter(case: Case) -> dict[str, Any]:
    return {"filtered": sampling.min_p(case.inputs["logits"], p=case.inputs["p"])}


def temperature(case: Case) -> dict[str, Any]:
    """Log-probabilities at a temperature are the scaled logits but for a constant a row."""
    logits, degrees = case.inputs["logits"], case.inputs["temperature"]
    everywhere = jnp.broadcast_to(logits[:, None], (*logits.shape, logits.shape[-1]))
    tokens = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    scaled = log_probs.token_log_probs(everywhere, tokens, temperature=degrees)
    return {"scaled": scaled - scaled[:, :1] + logits[:, :1] / degrees}


def logprobs_from_logits(case: Case) -> dict[str, Any]:
    inputs = case.inputs
    return {
        "logprobs": log_probs.token_log_probs(
            inputs["logits"], inputs["labels"], temperature=inputs.get("temperature", 1.0)
        )
    }


def entropy_from_logits(case: Case) -> dict[str, Any]:
    return {"entropy": log_probs.entropy(case.inputs["logits"])}


def positions_from_mask(case: Case) -> dict[str, Any]:
    """A pad after real tokens has another position in Tunix; nothing attends to it."""
    real = case.inputs["ids"] != case.inputs["pad"]
    positions = masked.positions(real)
    return {"positions": At(positions, real) if case.peer == "tunix" else positions}


def ppo_rollout_to_advantage(case: Case) -> dict[str, Any]:
    inputs, kl_coef = case.inputs, case.inputs["kl_coef"]
    new, ref = inputs["logprobs"], inputs["ref_logprobs"]
    scores, values = inputs["scores"], inputs["values"]
    whole = ones(values)
    decays = {"gamma": inputs["gamma"], "gae_lambda": inputs["lam"]}

    if case.convention == "terminal_one_past_end":
        columns = jnp.arange(values.shape[-1])
        last = inputs["sequence_lengths"][:, None]
        mask, mask_and_one = columns <= last, columns <= last + 1
        estimate = ESTIMATORS[inputs["kl_estimator"]](
            jnp.where(mask, new, 1.0), jnp.where(mask, ref, 1.0)
        )
        rewards = advantages.token_rewards(scores, estimate, mask_and_one, kl_coef=kl_coef)
        values = jnp.where(mask_and_one, values, 0.0)
        result, returns = advantages.gae(rewards, values, whole, **decays)
        return {
            "rewards": rewards,
            "advantages": masked.whiten(result, mask, ddof=ddof(case)),
            "returns": returns,
            "values_used": values,
            "padding_mask": ~mask,
            "padding_mask_p1": ~mask_and_one,
            "kl": estimate,
        }

    if case.peer == "alpaca_farm":
        mask = inputs["responses"] != inputs["pad_id"]
        estimate = jnp.maximum(kl.k1(new, ref), 0.0)
        shaped = penalised_everywhere(scores, estimate, mask, kl_coef=kl_coef)
        rewards = masked.whiten(shaped, whole, shift_mean=False)
        extra = {"shaped_rewards": shaped, "kl": estimate}
    else:
        estimate = kl.k1(new, ref)
        rewards = advantages.token_rewards(scores, estimate, whole, kl_coef=kl_coef)
        if inputs["whiten_rewards"]:
            rewards = masked.whiten(rewards, whole, shift_mean=False)
        extra = {
            "rewards": rewards,
            "non_score_reward": advantages.token_rewards(
                0 * scores, estimate, whole, kl_coef=kl_coef
            ),
        }
    result, returns = advantages.gae(rewards, values, whole, **decays)
    return {"advantages": masked.whiten(result, whole), "returns": returns, **extra}


EXPRESSED: dict[str, Callable[[Case], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        masked_mean,
        masked_var,
        masked_whiten,
        whiten,
        gae,
        adaptive_kl_controller,
        kl_estimator,
        token_rewards,
        ppo_clip_loss,
        value_loss,
        pairwise_reward_loss,
        sft_loss,
        response_mask,
        top_k_filter,
        top_p_filter,
        min_p_filter,
        temperature,
        logprobs_from_logits,
        entropy_from_logits,
        positions_from_mask,
        ppo_rollout_to_advantage,
    )
}
CASES = [case for function in EXPRESSED for case in golden_cases.select(function)]


class Difference(NamedTuple):
    """Why the library does not follow a peer, and what it gives instead."""

    reason: str
    ours: dict[str, Any]


def peer_says(case_id: str, *names: str) -> dict[str, Any]:
    return {name: golden_cases.find(case_id).expected[name] for name in names}


def but(case_id: str, name: str, **entries: Any) -> dict[str, Any]:
    """What the peer says, with one row or entry, `at`, replaced by `value`."""
    changed = golden_cases.find(case_id).expected[name].copy()
    changed[entries["at"]] = entries["value"]
    return {name: changed}


EMPTY_ROW = {"mean": [0.257666667, 0.0, 0.097]}
WHITENED_TO_0 = {"whitened": At(np.zeros((1, 2)), np.ones((1, 2), bool))}
DROPS_CROSSING = "OpenAI drops the token that crosses p; the library keeps it, as HF and Tunix do"
K3_LOG_RATIOS = np.array([0.0, 30.0, -30.0, 100.0, -100.0, 15.0])
BOUNDED_GRADIENT = {"grad_logprobs": [[0.0, 1.0, 0.0, 1.0, 0.0, 0.999999702]]}

DIFFERENT: dict[str, Difference] = {
    "masked_mean/halos/axis1_empty_row": Difference("a mean of nothing is 0, not NaN", EMPTY_ROW),
    "masked_mean/openrlhf/axis1_empty_row": Difference(
        "a mean of nothing is 0, not NaN", EMPTY_ROW
    ),
    "masked_mean/trl/axis1_empty_row": Difference("a mean of nothing is 0, not NaN", EMPTY_ROW),
    "masked_mean/trl/nan_outside_mask": Difference(
        "NaN at a masked entry is not read", {"mean": 0.872571429}
    ),
    "masked_whiten/tunix/one_token": Difference(
        "the unbiased variance of one token is 0, not NaN",
        WHITENED_TO_0,
    ),
    "raises/trl/masked_whiten_no_token": Difference("no token: zeros, no error", WHITENED_TO_0),
    "raises/verl/masked_whiten_no_token": Difference("no token: zeros, no error", WHITENED_TO_0),
    "kl_estimator/openrlhf/k3/extreme": Difference(
        "the input of exp is bounded, so that the gradient at the overflow is 0, not NaN",
        {
            **peer_says("kl_estimator/openrlhf/k3/extreme", "kl"),
            "grad_logprobs": [[0.0, 0.0, 0.0, 0.0, 0.0, 0.0]],
        },
    ),
    "kl_estimator/tunix/k3/extreme_clamp": Difference(
        "the input of exp is bounded, so that the gradient at the overflow is 0, not NaN",
        {**peer_says("kl_estimator/tunix/k3/extreme_clamp", "kl"), **BOUNDED_GRADIENT},
    ),
    "kl_estimator/trlx/k3_reversed": Difference(
        "trlx inverts the ratio; the library estimates KL(policy ‖ reference)",
        {
            **peer_says("kl_estimator/verl/k3/normal", "kl"),
            "mean_kl_per_sequence": golden_cases.find("kl_estimator/verl/k3/normal")
            .expected["kl"]
            .sum(-1)
            .mean(),
            "mean_kl_per_token": golden_cases.find("kl_estimator/verl/k3/normal")
            .expected["kl"]
            .mean(),
        },
    ),
    "raises/verl/kl_penalty_k3_plus": Difference(
        "the straight-through estimator is a composition: exp(-0.2) - 1 + 0.2, gradient 0.2",
        {"kl": [0.018730753], "grad_logprobs": [0.2]},
    ),
    "token_rewards/openrlhf/clip_emptyrow_obs": Difference(
        "a row without a valid token gets no score",
        but("token_rewards/openrlhf/clip_emptyrow_obs", "rewards", at=(1, 4), value=0.15 * 0.3312),
    ),
    "token_rewards/tunix/beta0.15": Difference(
        "Tunix truncates scores to integers",
        peer_says("token_rewards/tunix/intended", "rewards"),
    ),
    "reward_loss/openrlhf/logexp_extreme": Difference(
        "log(1 + exp(x)) overflows, log sigmoid does not",
        peer_says("reward_loss/trl/extreme", "loss"),
    ),
    "top_k/tunix/ties": Difference(
        "all tokens that tie with the k-th are kept",
        peer_says("top_k/transformers/ties", "filtered"),
    ),
    "top_p/lmhp-openai/p0.5": Difference(
        DROPS_CROSSING,
        but("top_p/lmhp-openai/p0.5", "filtered", at=(1, 0, 6), value=1.64),
    ),
    "top_p/lmhp-openai/test_p0.5": Difference(
        DROPS_CROSSING,
        but("top_p/lmhp-openai/test_p0.5", "filtered", at=(0, 0, 1), value=1.01),
    ),
    "top_p/lmhp-openai/test_p0.7": Difference(
        DROPS_CROSSING,
        but("top_p/lmhp-openai/test_p0.7", "filtered", at=(0, 0, 0), value=1.0),
    ),
    "top_p/transformers/ties": Difference(
        "tokens that tie with the last one kept all stay, whatever the order of a sort",
        {
            "filtered": [
                [2.0, 1.0, 1.0, 1.0] + [-np.inf] * 4,
                [0.0] * 8,
                [5.0, 5.0] + [-np.inf] * 6,
            ],
            "kept_count": [4, 8, 2],
        },
    ),
    "raises/lmhp-openai/take_top_p_batch2": Difference(
        "a batch is no different from one row; four equal logits tie",
        {"filtered": np.zeros((2, 1, 4))},
    ),
    "entropy/verl/neg_inf_logit": Difference(
        "a token of no probability adds 0 to the entropy, not NaN",
        {
            "entropy": [
                [
                    -sum(p * np.log(p) for p in np.exp(row) / np.exp(row).sum() if p > 0)
                    for row in rows
                ]
                for rows in golden_cases.find("entropy/verl/neg_inf_logit")
                .inputs["logits"]
                .astype(np.float64)
            ]
        },
    ),
}


def run(case: Case) -> dict[str, Any]:
    return jax.jit(lambda: EXPRESSED[case.function](case))()


def assert_agrees(case: Case, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert given.keys() == wanted.keys()
    atol = case.atol
    if case.function in ("logprobs_from_logits", "entropy_from_logits") and (
        "large_logits" in case.tags
    ):
        atol = LARGE_LOGITS_ATOL
    for name, value in given.items():
        target = wanted[name]
        if isinstance(target, At):
            target, value = target.value, value.value
        elif isinstance(value, At):
            value, target = value.value[value.valid], target[value.valid]
        assert value.dtype in (jnp.float32, jnp.int32, jnp.bool_)
        np.testing.assert_allclose(
            value, target, rtol=golden_cases.RTOL, atol=atol, err_msg=f"{case.id}: {name}"
        )


@pytest.mark.parametrize("case", [case for case in CASES if case.id not in DIFFERENT], ids=str)
def test_agrees_with_the_peer_under_its_convention(case: Case) -> None:
    assert_agrees(case, run(case), case.expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.id in DIFFERENT], ids=str)
def test_differs_from_the_peer_on_purpose(case: Case) -> None:
    given, difference = run(case), DIFFERENT[case.id]
    assert_agrees(case, given, difference.ours)
    with pytest.raises(AssertionError):
        assert_agrees(case, given, case.expected)


def test_every_case_is_expressed_or_listed_as_different() -> None:
    assert len(CASES) == 153
    assert DIFFERENT.keys() <= {case.id for case in CASES}
    must_differ = {case.id for case in CASES if {"peer_bug", "raises"} & set(case.tags)}
    assert must_differ <= DIFFERENT.keys()


def test_the_suite_runs_in_float32() -> None:
    assert not jax.config.jax_enable_x64
