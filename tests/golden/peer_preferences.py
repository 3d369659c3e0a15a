"""Losses of preferences of the peers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peer_case import Case, Given

from rlhfjax import log_probs, masked
from rlhfjax.losses import anchored, preference, reference_free, responses, supervised, unpaired
from rlhfjax.losses.reductions import weighted_sum

# Tunix bounds log-probabilities by -1e-7, and in float32 its 1 - exp(-1e-7) is 2⁻²³.
TUNIX_LOG_PROB_MAX = -1.1920929e-07

TRL_LOSSES: dict[str, Callable[..., Any]] = {
    "sigmoid": preference.dpo,
    "sigmoid_norm": preference.dpo,
    "hinge": preference.hinge,
    "ipo": preference.ipo,
    "exo_pair": preference.exo,
    "robust": preference.robust,
    "discopop": preference.discopop,
    "aot": preference.aot,
    "aot_pair": preference.aot,
    "aot_unpaired": preference.aot_unpaired,
    "sppo_hard": anchored.sppo,
    "nca_pair": anchored.nca,
    "apo_zero": anchored.apo_zero,
    "apo_down": anchored.apo_down,
    "bco_pair": anchored.bco_pair,
}
TRL_SMOOTHED = {"robust", "exo_pair", "aot", "aot_pair", "aot_unpaired"}
TRL_BY_MEANS = {"ipo", "sigmoid_norm"}


def everywhere(like: Any) -> jax.Array:
    return jnp.ones(np.shape(like), bool)


def halves(x: Any) -> tuple[Any, Any]:
    middle = len(x) // 2
    return x[:middle], x[middle:]


def as_one_token(sums: Any, mask: Any) -> jax.Array:
    """Tokens whose sum over a row is given: all of it on the row's first True token."""
    return jnp.zeros(mask.shape).at[jnp.arange(len(mask)), mask.argmax(-1)].set(sums)


def averaged(sums: Any, mask: Any) -> jax.Array:
    return masked.mean(as_one_token(sums, mask), mask, axis=-1)


def rewards(new: Any, ref: Any, beta: float) -> jax.Array:
    return preference.implicit_rewards(new, ref, beta=beta)


def dpo_loss(case: Case) -> Given:
    inputs, beta = case.inputs, case.inputs["beta"]
    pair = (inputs["policy_chosen"], inputs["policy_rejected"])
    nothing = (jnp.zeros_like(pair[0]), jnp.zeros_like(pair[1]))
    refs = (inputs.get("ref_chosen", nothing[0]), inputs.get("ref_rejected", nothing[1]))
    in_loss = nothing if inputs.get("reference_free") else refs
    loss = (
        preference.ipo
        if inputs.get("ipo")
        else functools.partial(preference.cdpo, label_smoothing=inputs.get("label_smoothing", 0.0))
    )

    def loss_of(*pair: Any, reduce: Any = masked.mean) -> tuple[jax.Array, Given]:
        return loss(*pair, *in_loss, beta=beta, reduce=reduce)

    total = masked.sum if "losses" in case.expected else masked.mean
    grads, _ = jax.grad(functools.partial(loss_of, reduce=total), (0, 1), has_aux=True)(*pair)
    mean, metrics = loss_of(*pair)
    given = {
        "loss": mean,
        "losses": loss_of(*pair, reduce=masked.fill)[0],
        "chosen_rewards": rewards(pair[0], refs[0], beta),
        "rejected_rewards": rewards(pair[1], refs[1], beta),
        "grad_policy_chosen": grads[0],
        "grad_policy_rejected": grads[1],
        "reward_margin_mean": metrics["rewards/margins"],
        "accuracy": metrics["rewards/accuracies"],
    }
    return given


def trl_loss(
    loss_type: str, inputs: dict[str, Any], sums: Any, means: Any, **options: Any
) -> tuple[jax.Array, Given]:
    """One of TRL's losses of pairs, from the sums or the means of tokens, as it wants."""
    loss = TRL_LOSSES[loss_type]
    f_divergence = inputs.get("f_divergence") or "reverse_kl"
    if loss_type == "sigmoid" and f_divergence != "reverse_kl":
        loss = functools.partial(preference.f_dpo, derivative=derivatives(inputs)[f_divergence])
    if loss_type in TRL_SMOOTHED:
        loss = functools.partial(loss, label_smoothing=inputs.get("label_smoothing", 0.0))
    pairs = means if loss_type in TRL_BY_MEANS else sums
    return loss(*pairs, beta=inputs["beta"], **options)


def derivatives(inputs: dict[str, Any]) -> dict[str, Callable[..., jax.Array]]:
    power = functools.partial(preference.alpha_derivative, alpha=inputs.get("alpha_coef"))
    return {
        "forward_kl": functools.partial(preference.alpha_derivative, alpha=0.0),
        "js_divergence": preference.js_derivative,
        "alpha_divergence": power,
    }


def dpo_loss_token_level(case: Case) -> Given:
    inputs, mask = case.inputs, case.inputs["completion_mask"][:, 1:]
    if case.peer == "halos":
        return halos_token_level(case)

    def quadruple(new: Any, each: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        return (*each(new), *each(inputs["ref_logprobs"]))

    def sums(x: Any) -> tuple[jax.Array, ...]:
        if inputs.get("ld_alpha") is None:
            return halves(masked.sum(x, mask, axis=-1))
        (chosen, rejected), (its, other) = halves(x), halves(mask)
        coef = inputs["ld_alpha"]
        return (
            responses.length_desensitised(chosen, its, other, length_coef=coef),
            responses.length_desensitised(rejected, other, its, length_coef=coef),
        )

    def means(x: Any) -> tuple[jax.Array, ...]:
        return halves(averaged(jnp.concatenate(sums(x)), mask))

    def loss_of(new: Any) -> tuple[jax.Array, Given]:
        of_sums = quadruple(new, sums)
        loss, _ = trl_loss(inputs["loss_type"], inputs, of_sums, quadruple(new, means))
        return loss, preference.dpo(*of_sums, beta=inputs["beta"])[1]

    (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(inputs["policy_logprobs"])
    given = {
        "loss": loss,
        "grad_policy_logprobs": grad,
        "reward_chosen_mean": metrics["rewards/chosen"],
        "reward_rejected_mean": metrics["rewards/rejected"],
        "accuracy": metrics["rewards/accuracies"],
    }
    return given


def halos_token_level(case: Case) -> Given:
    """HALOs counts the tokens whose log ratio is not 0; its IPO's rewards are per token."""
    inputs, mask = case.inputs, case.inputs["completion_mask"][:, 1:]
    new, ref = inputs["policy_logprobs"], inputs["ref_logprobs"]
    if "tau" in inputs:
        counted = mask & (new != ref)
        of, reward_scale = functools.partial(masked.mean, mask=counted, axis=-1), 1.0
        loss = functools.partial(preference.ipo, beta=inputs["tau"])
    else:
        of, reward_scale = functools.partial(masked.sum, mask=mask, axis=-1), inputs["beta"]
        loss = functools.partial(
            preference.cdpo, beta=inputs["beta"], label_smoothing=inputs.get("epsilon", 0.0)
        )
    (chosen, rejected), (ref_chosen, ref_rejected) = halves(of(new)), halves(of(ref))
    return {
        "losses": loss(chosen, rejected, ref_chosen, ref_rejected, reduce=masked.fill)[0],
        "chosen_rewards": rewards(chosen, ref_chosen, reward_scale),
        "rejected_rewards": rewards(rejected, ref_rejected, reward_scale),
    }


def dpo_loss_from_logits(case: Case) -> Given:
    inputs, mask = case.inputs, case.inputs["completion_mask"][:, 1:]
    logits, targets = inputs["logits"][:, :-1], inputs["input_ids"][:, 1:]
    scored, entropies = log_probs.token_log_probs_and_entropy(logits, targets)
    (chosen, rejected), (chosen_mask, rejected_mask) = halves(scored), halves(mask)
    sums = halves(masked.sum(scored, mask, axis=-1))
    refs = (inputs["ref_chosen"], inputs["ref_rejected"])
    both = np.concatenate(refs)
    means = (*halves(masked.mean(scored, mask, axis=-1)), *halves(averaged(both, mask)))
    weights: float | jax.Array = 1.0
    if inputs["use_weighting"]:
        collisions = halves(responses.log_collision(logits))
        weights = responses.wpo_weights(chosen, rejected, *collisions, chosen_mask, rejected_mask)
    terms = [
        supervised.language_model(chosen, chosen_mask)
        if loss_type == "sft"
        else trl_loss(loss_type, inputs, (*sums, *refs), means, weights=weights)[0]
        for loss_type in inputs["loss_types"]
    ]
    given = {
        "loss": weighted_sum(terms, list(inputs["loss_weights"])),
        "logps_chosen_mean": masked.mean(sums[0], everywhere(sums[0])),
        "logps_rejected_mean": masked.mean(sums[1], everywhere(sums[1])),
        "entropy": masked.mean(entropies, mask),
        "token_accuracy": masked.mean(halves(logits.argmax(-1) == targets)[0], chosen_mask),
    }
    return given


def simpo_loss_token_level(case: Case) -> Given:
    inputs, new = case.inputs, case.inputs["policy_logprobs"]
    counted = inputs["completion_mask"][:, 1:] & (new != 0)
    chosen, rejected = halves(masked.mean(new, counted, axis=-1))
    losses, _ = reference_free.simpo(
        chosen,
        rejected,
        beta=inputs["beta"],
        margin=margin_of_ratio(inputs),
        reduce=masked.fill,
    )
    return {
        "losses": losses,
        "chosen_rewards": rewards(chosen, jnp.zeros_like(chosen), 1.0),
        "rejected_rewards": rewards(rejected, jnp.zeros_like(rejected), 1.0),
    }


def margin_of_ratio(inputs: dict[str, Any]) -> jax.Array:
    return weighted_sum([jnp.asarray(inputs["gamma_beta_ratio"])], [inputs["beta"]])


def simpo_loss(case: Case) -> Given:
    return cpo_loss(case)


def cpo_loss(case: Case) -> Given:
    """SimPO's code, and TRL's CPO trainer, which has SimPO and AlphaPO in it."""
    inputs, beta = case.inputs, case.inputs["beta"]
    chosen, rejected = (
        reference_free.alpha_rewards(inputs[name], alpha=inputs.get("alpha", 0.0))
        for name in ("chosen", "rejected")
    )
    nothing = jnp.zeros_like(chosen)
    # To a loss of log ratios, a ratio of margin and β is a reference that is constant.
    offset = jnp.full_like(chosen, inputs.get("gamma_beta_ratio", 0.0))
    smoothed = {"label_smoothing": inputs.get("label_smoothing", 0.0)}
    if inputs["loss_type"] == "ipo":
        loss = functools.partial(preference.ipo, chosen, rejected, offset, nothing)
    elif inputs["loss_type"] == "hinge":
        loss = functools.partial(preference.hinge, chosen, rejected, offset, nothing)
    elif case.peer == "simpo":
        margin = margin_of_ratio(inputs)
        loss = functools.partial(reference_free.simpo, chosen, rejected, margin=margin, **smoothed)
    elif inputs["loss_type"] == "simpo":
        margin = inputs["simpo_gamma"]
        loss = functools.partial(reference_free.simpo, chosen, rejected, margin=margin, **smoothed)
    else:
        loss = functools.partial(reference_free.cpo, chosen, rejected, **smoothed)
    return {
        "losses": loss(beta=beta, reduce=masked.fill)[0],
        "chosen_rewards": rewards(chosen, nothing, beta),
        "rejected_rewards": rewards(rejected, nothing, beta),
    }


def orpo_odds_ratio(case: Case) -> Given:
    pair, beta = (case.inputs["chosen"], case.inputs["rejected"]), case.inputs.get("beta", 1.0)
    nothing = jnp.zeros_like(pair[0])

    def reward_of(*pair: Any, reduce: Any) -> jax.Array:
        """What the peers subtract from the likelihood's loss."""
        loss, _ = reference_free.orpo(*pair, beta=beta, reduce=reduce)
        return weighted_sum([loss], [-1.0])

    _, metrics = reference_free.orpo(*pair, beta=beta)
    grads = jax.grad(functools.partial(reward_of, reduce=masked.sum), (0, 1))(*pair)
    each = reward_of(*pair, reduce=masked.fill)
    given = {
        "weighted_log_sigmoid": each,
        "log_sigmoid": each,
        "chosen_rewards": rewards(pair[0], nothing, beta),
        "rejected_rewards": rewards(pair[1], nothing, beta),
        "mean_log_sigmoid": metrics["log_odds_ratio"],
        "mean_log_odds": metrics["log_odds_chosen"],
        "grad_chosen": grads[0],
        "grad_rejected": grads[1],
    }
    return given


def orpo_loss_from_logits(case: Case) -> Given:
    inputs = case.inputs
    scored = log_probs.token_log_probs(inputs["logits"][:, :-1], inputs["input_ids"][:, 1:])
    attended, _ = halves(inputs["attention_mask"][:, 1:])
    means = halves(masked.mean(scored, inputs["labels"][:, 1:] != -100, axis=-1))
    nll = supervised.language_model(halves(scored)[0], attended)
    odds_loss, _ = reference_free.orpo(*means, beta=inputs["beta"])
    return {
        "chosen_avg_logps": means[0],
        "rejected_avg_logps": means[1],
        "nll": nll,
        "loss": weighted_sum([nll, odds_loss], [1.0, 1.0]),
    }


def orpo_average_logprob(case: Case) -> Given:
    """Its mask ends one token too late where a row is padded."""
    inputs = case.inputs
    scored = log_probs.token_log_probs(inputs["logits"][:, :-1], inputs["input_ids"][:, 1:])
    mask = inputs["attention_mask"][:, :-1] & ~inputs["prompt_attention_mask"][:, 1:]
    return {"avg_logps": masked.mean(scored, mask, axis=-1)}


def orpo_loss(case: Case) -> Given:
    inputs, smoothing = case.inputs, case.inputs["label_smoothing"]
    chosen_mask, rejected_mask = halves(inputs["completion_mask"])
    full_mask = halves(inputs["full_mask"])[0][:, 1:]

    def loss_of(*sums: Any) -> tuple[jax.Array, Given]:
        chosen, rejected = sums
        if inputs["average"]:
            chosen, rejected = averaged(chosen, chosen_mask), averaged(rejected, rejected_mask)
        learned = averaged(inputs["full_chosen"], full_mask) if inputs["prompt_loss"] else chosen
        nll = supervised.language_model(learned, everywhere(learned))
        odds = functools.partial(
            reference_free.orpo,
            chosen,
            rejected,
            label_smoothing=smoothing,
            log_prob_max=TUNIX_LOG_PROB_MAX,
        )
        odds_loss, _ = odds(beta=1.0)
        _, metrics = odds(beta=inputs["lambda_orpo"])
        return weighted_sum([nll, odds_loss], [1.0, inputs["lambda_orpo"]]), {
            "reward_margin_mean": metrics["rewards/margins"],
            "accuracy": metrics["rewards/accuracies"],
            "or_loss_mean": odds_loss,
            "sft_loss_mean": nll,
            "odds_ratio_mean": metrics["odds_ratio"],
        }

    (loss, extra), grads = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
        inputs["policy_chosen"], inputs["policy_rejected"]
    )
    given = {
        "loss": loss,
        "grad_policy_chosen": grads[0],
        "grad_policy_rejected": grads[1],
        **extra,
    }
    return given


def kto_loss(case: Case) -> Given:
    inputs, beta, desirable = case.inputs, case.inputs["beta"], case.inputs["label"] == 1
    new, ref = inputs["policy_logps"], inputs["ref_logps"]
    mismatched = (inputs["kl_policy_logps"], inputs["kl_ref_logps"])
    counted = mismatched[0] != mismatched[1] if case.peer == "halos" else None
    if inputs.get("loss_type") == "apo_zero_unpaired":
        kl = jnp.zeros(())
    else:
        kl = unpaired.reference_kl(*mismatched, counted)

    def loss_of(new: Any) -> jax.Array:
        return unpaired.kto(
            new,
            ref,
            desirable,
            kl,
            beta=beta,
            desirable_weight=inputs["desirable_weight"],
            undesirable_weight=inputs["undesirable_weight"],
        )[0]

    loss, grad = jax.value_and_grad(loss_of)(new)
    implicit = rewards(new, ref, beta)
    given = {
        "loss": loss,
        "kl": kl,
        "grad_policy_logps": grad,
        "chosen_rewards": implicit[desirable],
        "rejected_rewards": implicit[~desirable],
    }
    return given


def kto_loss_paired(case: Case) -> Given:
    inputs = case.inputs
    loss, _ = anchored.kto_pair(
        inputs["policy_chosen"],
        inputs["policy_rejected"],
        inputs["ref_chosen"],
        inputs["ref_rejected"],
        beta=inputs["beta"],
    )
    return {"loss": loss}


def bco_loss(case: Case) -> Given:
    """Of the first batch, after which the running mean is that of the batch."""
    inputs, beta = case.inputs, case.inputs["beta"]
    new = jnp.concatenate([inputs["policy_chosen"], inputs["policy_rejected"]])
    ref = jnp.concatenate([inputs["ref_chosen"], inputs["ref_rejected"]])
    desirable = jnp.arange(len(new)) < len(inputs["policy_chosen"])
    shift = masked.mean(rewards(new, ref, beta), everywhere(new))
    losses, _ = unpaired.bco(new, ref, desirable, shift, beta=beta, reduce=masked.fill)
    return {"losses": losses, "delta": shift}


def slic_loss(case: Case) -> Given:
    tokens = jnp.zeros(tuple(case.inputs["shape"]))
    sums = masked.sum(tokens, everywhere(tokens), axis=-1)
    return {"raises": reference_free.slic(sums, sums, margin=1.0)[0]}


def sequence_logprobs(case: Case) -> Given:
    labels = case.inputs["labels"][:, 1:]
    mask = labels != -100
    scored = log_probs.token_log_probs(case.inputs["logits"][:, :-1], jnp.where(mask, labels, 0))
    total = masked.mean if case.inputs["average"] else masked.sum
    return {"logps": total(scored, mask, axis=-1)}
