"""Losses of policies and values of the peers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from peer_case import Case, Given, estimator, first_of, floats, ones, reduction, zeros

from rlhfjax import advantages, kl, masked
from rlhfjax.log_probs import token_log_probs
from rlhfjax.losses import policy, reductions, sequence_policy, value


def with_gradient(
    loss_of: Callable[..., tuple[jax.Array, Given]], *arrays: Any, names: tuple[str, ...]
) -> Given:
    """What the loss gives besides, its value as `loss`, its gradients under their names."""
    (loss, given), grads = jax.value_and_grad(
        loss_of, argnums=tuple(range(len(arrays))), has_aux=True
    )(*(floats(array) for array in arrays))
    return {"loss": loss, **given, **dict(zip(names, grads, strict=True))}


def clip_options(case: Case) -> Given:
    """The ranges of the ratio, whichever names the peer has for them."""
    inputs = case.inputs
    return {
        "clip_range": first_of(inputs, "clip_low", "eps_low", "clip", "eps", "epsilon"),
        "clip_range_high": first_of(inputs, "clip_high", "eps_high", "clip", "eps", "epsilon"),
    }


def clamped(case: Case) -> float | None:
    """The bound of the log ratio that the peer has."""
    if case.peer == "tunix":
        return 20.0 if case.function == "grpo_loss" else None
    return 20.0 if case.peer in ("verl", "openrlhf") else None


def negative_kl(case: Case, old: Any, new: Any, mask: Any) -> jax.Array:
    """The mean of -(log ratio), the drift that verl, OpenRLHF and Tunix report."""
    bound = 20.0 if case.peer == "verl" else None
    return masked.mean(kl.k1(floats(old), new, bound=bound), mask)


def ppo_clip_loss(case: Case) -> Given:
    inputs = case.inputs
    if case.peer == "rlax":
        ratios = jnp.log(inputs["ratios"])
        per_row = partial(masked.mean, axis=-1)
        loss, _ = policy.ppo_clip(
            ratios,
            zeros(ratios),
            inputs["advantages"],
            ones(ratios),
            clip_range=inputs["epsilon"],
            reduce=per_row,
        )
        return {"loss": loss}

    old, mask, reduce = inputs["old_logprobs"], inputs["mask"], reduction(case)
    weights: Any = 1.0
    if "rollout_logprobs" in inputs:
        weights = sampler_weights(case)

    def loss_of(new: jax.Array) -> tuple[jax.Array, Given]:
        loss, metrics = policy.ppo_clip(
            new,
            old,
            inputs["advantages"],
            mask,
            **clip_options(case),
            dual_clip=inputs.get("dual_clip"),
            log_ratio_clip=clamped(case),
            weights=weights,
            reduce=reduce,
        )
        terms, coefs = [loss], [1.0]
        if inputs.get("kl_coef") is not None:
            terms.append(masked.mean(kl.k1(new, floats(inputs["ref_logprobs"])), mask))
            coefs.append(inputs["kl_coef"])
        if inputs.get("entropy_coef") is not None:
            terms.append(policy.entropy_loss(floats(inputs["entropies"]), mask)[0])
            coefs.append(inputs["entropy_coef"])
        given = {
            "clip_frac": metrics["clip_fraction"],
            "clip_frac_lower": metrics.get("dual_clip_fraction"),
            "ppo_kl": negative_kl(case, old, new, mask),
        }
        if "rollout_logprobs" in inputs:
            given["rollout_kl"] = masked.mean(kl.k1(inputs["rollout_logprobs"], old), mask)
        return reductions.weighted_sum(terms, coefs), given

    return with_gradient(loss_of, inputs["logprobs"], names=("grad_logprobs",))


def sampler_weights(case: Case) -> jax.Array:
    """OpenRLHF: of tokens, bounded or rejected one by one, or by the mean of their response."""
    inputs, mask = case.inputs, jnp.asarray(case.inputs["mask"])
    learner_and_sampler = (inputs["old_logprobs"], inputs["rollout_logprobs"])
    bounds = dict(zip(("low", "high"), inputs["is_threshold"], strict=True))
    weights = advantages.token_importance_weights(*learner_and_sampler, mask)
    if inputs["is_type"] == "seq-mask-tis":
        means = (masked.mean(x, mask, axis=-1) for x in learner_and_sampler)
        of_rows = advantages.token_importance_weights(*means, mask.any(-1))
        kept = advantages.reject_weights(of_rows, **bounds) > 0
        return masked.fill(weights, jnp.broadcast_to(kept[:, None], mask.shape))
    bound = {"tis": advantages.truncate_weights, "icepop": advantages.reject_weights}
    return bound[inputs["is_type"]](weights, **bounds)


def ppo_clip_loss_rollout_correction(case: Case) -> Given:
    return ppo_clip_loss(case)


def value_loss(case: Case) -> Given:
    inputs, mask = case.inputs, case.inputs["mask"]

    def loss_of(values: jax.Array) -> tuple[jax.Array, Given]:
        loss, metrics = value_term(case, values, mask, reduce=reduction(case))
        return loss, {"clip_frac": metrics.get("clip_fraction")}

    return with_gradient(loss_of, inputs["values"], names=("grad_values",))


def value_term(
    case: Case, values: jax.Array, mask: Any, *, reduce: Callable[..., jax.Array] = masked.mean
) -> tuple[jax.Array, Given]:
    """Clipped where the peer clips."""
    inputs, clip_range = case.inputs, case.inputs.get("clip_value")
    if clip_range is None:
        return value.value_loss(values, inputs["returns"], mask, reduce=reduce)
    return value.clipped_value_loss(
        values, inputs["old_values"], inputs["returns"], mask, clip_range=clip_range, reduce=reduce
    )


def ppo_combined_loss(case: Case) -> Given:
    inputs, old = case.inputs, floats(case.inputs["old_logprobs"])
    everywhere = ones(old)
    mask = everywhere if case.peer == "lmhp-details" else jnp.asarray(inputs["mask"])
    value_mask = jnp.asarray(inputs["value_mask"]) if case.peer == "trl" else mask

    def loss_of(new: jax.Array, values: jax.Array) -> tuple[jax.Array, Given]:
        policy_loss, metrics = policy.ppo_clip(
            new, old, inputs["advantages"], mask, **clip_options(case)
        )
        value_loss, of_value = value_term(case, values, value_mask)
        terms, coefs = [policy_loss, value_loss], [1.0, inputs["vf_coef"]]
        if "kl_coef" in inputs:
            terms.append(masked.mean(kl.k1(new, old), mask))
            coefs.append(inputs["kl_coef"])
        drift = kl.k3(masked.fill(old, mask), masked.fill(new, mask))
        return reductions.weighted_sum(terms, coefs), {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "clip_frac": metrics["clip_fraction"],
            "value_clip_frac": of_value.get("clip_fraction"),
            "approx_kl": masked.mean(drift, everywhere),
            "policy_kl": negative_kl(case, old, new, mask),
        }

    names = ("grad_logprobs", "grad_values")
    return with_gradient(loss_of, inputs["logprobs"], inputs["values"], names=names)


def ppo_full_loss(case: Case) -> Given:
    inputs, old_values = case.inputs, floats(case.inputs["old_values"])
    rewards, everywhere = floats(inputs["rewards"]), ones(old_values)
    if inputs["whiten_rewards"]:
        rewards = masked.whiten(rewards, everywhere, shift_mean=False)
    result, returns = advantages.gae(
        rewards, old_values, everywhere, gamma=inputs["gamma"], gae_lambda=inputs["lam"]
    )
    policy_loss, metrics = policy.ppo_clip(
        floats(inputs["logprobs"]),
        floats(inputs["old_logprobs"]),
        masked.whiten(result, everywhere),
        everywhere,
        clip_range=inputs["clip"],
    )
    value_loss, of_value = value.clipped_value_loss(
        floats(inputs["values"]), old_values, returns, everywhere, clip_range=inputs["clip_value"]
    )
    return {
        "loss": reductions.weighted_sum([policy_loss, value_loss], [1.0, inputs["vf_coef"]]),
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "clip_frac": metrics["clip_fraction"],
        "approx_kl": metrics["approx_kl"],
        "entropy": masked.mean(inputs["entropies"], everywhere),
        "value_clip_frac": of_value["clip_fraction"],
        "returns_mean": masked.mean(returns, everywhere),
        "returns_var": masked.var(returns, everywhere),
    }


def policy_gradient_loss(case: Case) -> Given:
    inputs = case.inputs
    log_probs = token_log_probs(inputs["logits"], inputs["actions"])
    loss, _ = policy.policy_gradient(
        log_probs,
        inputs["advantages"],
        ones(log_probs),
        weights=inputs["weights"],
        reduce=partial(masked.mean, axis=-1),
    )
    return {"loss": loss}


def rloo_loss(case: Case) -> Given:
    inputs = case.inputs

    def loss_of(new: jax.Array) -> tuple[jax.Array, Given]:
        return sequence_policy.rloo_clip(
            new, inputs["old_logprobs"], inputs["advantages"], inputs["mask"], **clip_options(case)
        )

    return with_gradient(loss_of, inputs["logprobs"], names=("grad_logprobs",))


def grpo_loss(case: Case) -> Given:
    """The policy term of the peer, and beta times its KL term under the same reduction."""
    inputs, mask = case.inputs, case.inputs["mask"]
    old = floats(first_of(inputs, "old_logprobs", "ref_logprobs"))
    ref = floats(inputs.get("ref_logprobs", old))
    term, reduce = grpo_term(case)
    estimate_kl = kl.k3 if case.peer in ("trl", "halos") else estimator(case)

    def loss_of(new: jax.Array) -> tuple[jax.Array, Given]:
        policy_loss, metrics = term(new, old)
        divergence = estimate_kl(masked.fill(new, mask), masked.fill(ref, mask))
        kl_loss = reduce(divergence, mask)
        drift = negative_kl(case, old, new, mask)
        if case.peer == "verl" and loss_of_verl(case) == "kl_cov":
            drift = masked.mean(kl.absolute(new, old, bound=20.0), mask)
        coef = inputs.get("beta") or 0.0
        loss = reductions.weighted_sum([policy_loss, kl_loss], [1.0, coef]) if coef else policy_loss
        clip_frac = metrics.get("clip_fraction")
        lower = metrics.get("dual_clip_fraction", jnp.float32(0))
        return loss, {
            "clip_frac": clip_frac,
            "ppo_kl": drift,
            "kl_loss": kl_loss,
            "kl_mean": masked.mean(divergence, mask),
            "metric_pg_clipfrac": clip_frac,
            "metric_ppo_kl": drift,
            "metric_pg_clipfrac_lower": lower,
            "reduced_pg_loss": counting_empty(case, new, old) if case.peer == "tunix" else None,
        }

    return with_gradient(loss_of, inputs["logprobs"], names=("grad_logprobs",))


def counting_empty(case: Case, new: jax.Array, old: jax.Array) -> jax.Array:
    """Tunix logs the loss once more, with empty rows counted."""
    term, _ = grpo_term(case, count_empty=True)
    return term(new, old)[0]


def grpo_term(
    case: Case, *, count_empty: bool = False
) -> tuple[Callable[[jax.Array, jax.Array], tuple[jax.Array, Given]], Callable[..., jax.Array]]:
    inputs, mask = case.inputs, case.inputs["mask"]
    of_rows = floats(inputs["advantages"])
    by_token = advantages.spread(of_rows, mask) if of_rows.ndim == 1 else of_rows
    ranges = clip_options(case)
    bound = {"log_ratio_clip": clamped(case)}

    if case.peer == "halos":
        reduce = reductions.token_mean
    elif case.peer == "openrlhf":
        reduce = reductions.sequence_mean
    elif case.peer == "trl":
        length = inputs.get("max_completion_length")
        reduce = {
            "grpo": partial(reductions.sequence_mean, count_empty=True),
            "sapo": partial(reductions.sequence_mean, count_empty=True),
            "luspo": partial(reductions.sequence_sum, count_empty=True),
            "bnpo": reductions.token_mean,
            "dapo": reductions.token_mean,
            "cispo": reductions.token_mean,
            "dr_grpo": partial(reductions.constant_length, length=length, count_empty=True),
        }[inputs["loss_type"]]
    else:
        reduce = reduction(case, count_empty=count_empty)

    def ppo(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        dual_clip = first_of(inputs, "dual_clip", "delta")
        if case.peer == "verl":
            dual_clip = 10.0
        return policy.ppo_clip(
            new, old, by_token, mask, **ranges, **bound, dual_clip=dual_clip, reduce=reduce
        )

    def sequence(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        if inputs.get("delta") is None:
            return sequence_policy.gspo(new, old, of_rows, mask, **ranges, reduce=reduce)
        means = (masked.mean(x, mask, axis=-1) for x in (new, old))
        by_row = {"dual_clip": inputs["delta"], "reduce": reduce_rows}
        return policy.ppo_clip(*means, of_rows, jnp.any(mask, -1), **ranges, **by_row)

    def reduce_rows(of_rows: jax.Array, _: Any) -> jax.Array:
        return reduce(advantages.spread(of_rows, mask), mask)

    def sequence_token(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        mean = reduction(case, count_empty=count_empty)
        if case.peer in ("verl", "openrlhf"):
            mean = reductions.sequence_mean
        return sequence_policy.gspo_token(new, old, by_token, mask, **ranges, reduce=mean)

    def sapo(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        mean = reduce if case.peer == "trl" else reductions.sequence_mean
        return policy.sapo(new, old, by_token, mask, **bound, reduce=mean)

    def capped(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        weights = advantages.token_importance_weights(new, old, mask)
        weights = advantages.truncate_weights(weights, high=inputs["eps_high"])
        return policy.policy_gradient(new, by_token, mask, weights=weights, reduce=reduce)

    def cispo(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        return policy.cispo(new, old, by_token, mask, **ranges, **bound, reduce=reduce)

    def gmpo(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        mean = partial(reductions.sequence_mean, count_empty=True)
        return sequence_policy.gmpo(new, old, of_rows, mask, **ranges, reduce=mean)

    def kl_cov(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        options = {"fraction": 0.2, "kl_coef": 0.5}
        return policy.kl_cov(new, old, by_token, mask, **options, **bound, reduce=reduce)

    def plain(new: jax.Array, old: jax.Array) -> tuple[jax.Array, Given]:
        return policy.policy_gradient(new, by_token, mask, reduce=reduce)

    if case.peer == "trl":
        named = {"sapo": sapo, "cispo": capped}
        by_sequence = inputs["importance_sampling_level"] == "sequence"
        return named.get(inputs["loss_type"], sequence if by_sequence else ppo), reduce
    if case.peer == "tunix":
        return (ppo if inputs["loss_algo"] == "grpo" else sequence_token), reduce
    if case.peer == "openrlhf":
        return sequence_token, reduce
    if case.peer == "halos":
        return ppo, reduce
    of_verl = {
        "gspo": sequence_token,
        "cispo": cispo,
        "geo_mean": gmpo,
        "sapo": sapo,
        "kl_cov": kl_cov,
        "gpg": plain,
    }
    return of_verl.get(loss_of_verl(case), ppo), reduce


def loss_of_verl(case: Case) -> str:
    """verl's functions are named after their losses; cases that do not say so have the name."""
    _, found, name = case.source.rpartition("compute_policy_loss_")
    return name if found else case.convention or case.id.rsplit("/", 1)[-1]
