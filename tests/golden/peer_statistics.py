"""Statistics, reductions, KL, token rewards and returns of the peers."""

import jax
import jax.numpy as jnp
from peer_case import (
    Case,
    Given,
    ddof,
    estimator,
    floats,
    ones,
    reduction,
    reward_to_go,
    whitened,
    zeros,
)

from rlhfjax import advantages, kl, masked, sequences
from rlhfjax.losses import reductions


def masked_mean(case: Case) -> Given:
    x, mask = case.inputs["x"], case.inputs["mask"]
    return {
        "mean_all": masked.mean(x, mask),
        "mean_axis1": masked.mean(x, mask, axis=-1),
        "mean": masked.mean(x, mask, axis=case.inputs.get("axis")),
    }


def masked_var(case: Case) -> Given:
    return {"var": masked.var(case.inputs["x"], case.inputs["mask"], ddof=ddof(case))}


def masked_whiten(case: Case) -> Given:
    x, mask = case.inputs["x"], case.inputs["mask"]
    shift_mean = case.inputs.get("shift_mean", True)
    return {"whitened": whitened(x, mask, shift_mean=shift_mean, ddof=ddof(case))}


def whiten(case: Case) -> Given:
    x = case.inputs["x"]
    on_std = {"eps": 0.0, "std_eps": 1e-8} if case.peer == "alpaca_farm" else {}
    shift_mean = case.inputs.get("shift_mean", True)
    return {"whitened": masked.whiten(x, ones(x), shift_mean=shift_mean, ddof=ddof(case), **on_std)}


def masked_normalize(case: Case) -> Given:
    x, mask = case.inputs["x"], case.inputs["mask"]
    return {"normalized": masked.whiten(x, mask, axis=-1, eps=0.0, min_var=1e-8)}


def running_moments(case: Case) -> Given:
    running = masked.Moments(*(jnp.float32(x) for x in (0.0, 1.0, 1e-24)))
    rows = []
    for batch in case.inputs.values():
        new = masked.moments(batch, ones(batch))
        running = masked.merge_moments(running, new)
        stds = [masked.moments_std(moments, ddof=1) for moments in (new, running)]
        rows.append([new.mean, stds[0], running.mean, stds[1], running.var, running.num_values])
    return {"trace": jnp.array(rows)}


def aggregate_loss(case: Case) -> Given:
    """Tunix has a second form, of the same name, that counts empty rows."""
    reduce = reduction(case, count_empty="reduced" in case.id + case.source)
    return {"loss": reduce(case.inputs["loss"], case.inputs["mask"])}


def aggregate_loss_packed(case: Case) -> Given:
    """By default the divisor of the constant form is the number of segments."""
    inputs, reduce = case.inputs, reduction(case)
    if case.inputs["mode"].endswith("sum-norm") and inputs.get("norm") is None:
        reduce = reductions.sequence_sum
    segments = reductions.by_segment(
        jnp.asarray(inputs["loss"]),
        jnp.asarray(inputs["mask"]),
        jnp.asarray(inputs["segment_ids"]),
        num_segments=inputs["num_segments"],
    )
    return {"loss": reduce(*segments)}


def kl_estimator(case: Case) -> Given:
    inputs = case.inputs
    if case.peer == "trlx":
        # The ratio is inverted: an estimate of KL(ref ‖ policy) with samples of the policy.
        estimate = kl.k3(inputs["ref_logprobs"], inputs["logprobs"])
        everywhere = ones(estimate)
        return {
            "kl": estimate,
            "mean_kl_per_sequence": reductions.sequence_sum(estimate, everywhere),
            "mean_kl_per_token": masked.mean(estimate, everywhere),
        }

    def total(log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        estimate = estimator(case)(log_probs, inputs["ref_logprobs"])
        return estimate.sum(), estimate

    grad, estimate = jax.grad(total, has_aux=True)(inputs["logprobs"])
    return {"kl": estimate, "grad_logprobs": grad}


def categorical_kl(case: Case) -> Given:
    inputs = case.inputs
    return {"kl": kl.categorical(logits=inputs["p_logits"], ref_logits=inputs["q_logits"])}


def categorical_kl_from_probs(case: Case) -> Given:
    divergence = kl.of_distributions(
        log_probs=jnp.log(case.inputs["targets"]), ref_log_probs=case.inputs["log_predictions"]
    )
    return {"kl": divergence}


def adaptive_kl_controller(case: Case) -> Given:
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


def token_rewards(case: Case) -> Given:
    inputs, kl_coef = case.inputs, case.inputs["kl_coef"]
    estimate = estimator(case)(inputs["logprobs"], inputs["ref_logprobs"])
    everywhere = ones(estimate)
    if case.peer == "lmhp-openai":
        return {
            "rewards": advantages.token_rewards(
                inputs["scores"], estimate, everywhere, kl_coef=kl_coef
            ),
            "non_score_reward": advantages.penalize_kl(
                zeros(estimate), estimate, everywhere, kl_coef=kl_coef
            ),
        }
    mask = inputs["mask"]
    if case.peer == "openrlhf":
        scores, bounds = floats(inputs["scores"]), inputs.get("reward_clip_range")
        if bounds is not None:
            scores = advantages.bound_scores(scores, low=bounds[0], high=bounds[1])
        placed = advantages.score_at_end(scores, mask)
        rewards = advantages.penalize_kl(placed, estimate, everywhere, kl_coef=kl_coef)
        return {"rewards": rewards}
    if case.peer == "tunix":
        rewards = advantages.token_rewards(inputs["scores"], estimate, mask, kl_coef=kl_coef)
        return {"rewards": rewards}
    scores = floats(inputs["token_level_scores"])
    measured = reductions.sequence_mean(estimate, mask, count_empty=True)
    return {
        "rewards": advantages.penalize_kl(
            scores, masked.fill(estimate, mask), everywhere, kl_coef=kl_coef
        ),
        "kl_for_controller": measured,
        "kl_coef_after": kl.adaptive_coef(
            kl_coef,
            measured,
            target=inputs["target"],
            horizon=inputs["horizon"],
            num_samples=len(scores),
        ),
    }


def gae(case: Case) -> Given:
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
    everywhere = ones(rewards)
    if case.peer == "trlx":
        result, returns = advantages.gae(rewards, values, everywhere, **decays)
        if inputs["whiten"]:
            result = masked.whiten(result, everywhere, ddof=1)
        return {"advantages": result, "returns": returns}

    mask = inputs["mask"]
    if case.peer in ("openrlhf", "halos"):
        rewards, values = masked.fill(rewards, mask), masked.fill(values, mask)
        result, returns = advantages.gae(rewards, values, everywhere, **decays)
        if case.peer == "openrlhf":
            return {"advantages": result, "returns": returns}
        to_go = advantages.discounted_returns(rewards, everywhere, gamma=inputs["gamma"])
        return {
            "advantages": masked.whiten(result, mask),
            "returns": masked.fill(returns, mask),
            "discounted_returns": masked.fill(to_go, mask),
        }

    result, _ = advantages.gae(rewards, values, mask, **decays)
    result = advantages.carry_back(result, mask)
    returns = advantages.value_targets(result, values)
    if "whiten" in case.convention:
        result = whitened(result, mask, ddof=1)
    return {"advantages": result, "returns": returns}


def discounted_returns(case: Case) -> Given:
    inputs = case.inputs
    if case.peer == "rlax":
        returns = advantages.discounted_returns(
            inputs["r_t"],
            ones(inputs["r_t"]),
            gamma=inputs["discount_t"],
            bootstrap_value=inputs["bootstrap"],
        )
        return {"returns": returns}
    return {"returns": reward_to_go(inputs["rewards"], inputs["mask"], gamma=inputs["gamma"])}


def lambda_returns(case: Case) -> Given:
    inputs = case.inputs
    returns = advantages.lambda_returns(
        inputs["r_t"],
        inputs["v_t"],
        ones(inputs["r_t"]),
        gamma=inputs["discount_t"],
        gae_lambda=inputs["lambda_"],
    )
    return {"returns": returns}


def n_step_returns(case: Case) -> Given:
    inputs = case.inputs
    returns = advantages.n_step_returns(
        inputs["r_t"],
        inputs["v_t"],
        ones(inputs["r_t"]),
        gamma=inputs["discount_t"],
        num_steps=inputs["n"],
    )
    return {"returns": returns}


def reinforce_plus_plus_advantage(case: Case) -> Given:
    """A masked token ends the episode before it: no return passes from its column to the left."""
    rewards, mask = floats(case.inputs["rewards"]), jnp.asarray(case.inputs["mask"])
    following = jnp.roll(mask, -1, axis=-1)
    gamma = masked.fill(jnp.full(mask.shape, case.inputs["gamma"]), following)
    returns = advantages.discounted_returns(rewards, ones(mask), gamma=gamma)
    return {"advantages": masked.whiten(returns, mask, ddof=1), "returns": returns}


def ppo_rollout_to_advantage(case: Case) -> Given:
    inputs, kl_coef = case.inputs, case.inputs["kl_coef"]
    new, ref = inputs["logprobs"], inputs["ref_logprobs"]
    scores, values = inputs["scores"], inputs["values"]
    everywhere = ones(values)
    decays = {"gamma": inputs["gamma"], "gae_lambda": inputs["lam"]}

    if case.convention == "terminal_one_past_end":
        mask = sequences.mask_up_to(inputs["sequence_lengths"], size=values.shape[-1])
        mask_and_one = sequences.one_past(mask)
        estimate = estimator(case)(
            masked.fill(new, mask, value=1.0), masked.fill(ref, mask, value=1.0)
        )
        rewards = advantages.token_rewards(scores, estimate, mask_and_one, kl_coef=kl_coef)
        if inputs["whiten_rewards"]:
            rewards = masked.whiten(rewards, mask_and_one, shift_mean=False, ddof=ddof(case))
        values = masked.fill(values, mask_and_one)
        result, returns = advantages.gae(rewards, values, everywhere, **decays)
        return {
            "rewards": rewards,
            "advantages": masked.whiten(result, mask, ddof=ddof(case)),
            "returns": returns,
            "values_used": values,
            "padding_mask": ~mask,
            "padding_mask_p1": ~mask_and_one,
            "kl": estimate,
        }

    extra: Given = {}
    options: Given = {}
    if case.peer == "alpaca_farm":
        estimate = kl.k1(new, ref)
        estimate = masked.fill(estimate, estimate > 0)
        lengths = sequences.lengths(jnp.asarray(inputs["responses"] != inputs["pad_id"]))
        up_to_end = sequences.mask_of_lengths(lengths, size=values.shape[-1])
        placed = advantages.score_at_end(scores, up_to_end)
        rewards = advantages.penalize_kl(placed, estimate, everywhere, kl_coef=kl_coef)
        extra = {"shaped_rewards": rewards, "kl": estimate}
        options = {"eps": 0.0, "std_eps": 1e-8}
    else:
        estimate = kl.k1(new, ref)
        rewards = advantages.token_rewards(scores, estimate, everywhere, kl_coef=kl_coef)
        extra["non_score_reward"] = advantages.penalize_kl(
            zeros(estimate), estimate, everywhere, kl_coef=kl_coef
        )
    if inputs["whiten_rewards"]:
        rewards = masked.whiten(rewards, everywhere, shift_mean=False, **options)
    result, returns = advantages.gae(rewards, values, everywhere, **decays)
    result = masked.whiten(result, everywhere, **options)
    return {"rewards": rewards, "advantages": result, "returns": returns, **extra}


def overlong_penalty(case: Case) -> Given:
    inputs = case.inputs
    floor = -1.0 if case.peer in ("trl", "openrlhf") else None
    penalty = advantages.overlong_penalty(
        inputs["lengths"],
        max_length=inputs["max_len"],
        buffer=inputs["cache"],
        factor=inputs.get("factor", 1.0),
        floor=floor,
    )
    return {"penalty": penalty}
