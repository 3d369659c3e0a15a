"""Advantages from groups of responses, and importance weights, of the peers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peer_case import Case, Given, first_of, floats, ones, reward_to_go, whitened, zeros

from rlhfjax import advantages, kl, masked


def group_ids(case: Case) -> np.ndarray:
    """Given, or consecutive groups of a fixed size."""
    inputs = case.inputs
    if "group_ids" in inputs:
        return np.unique(inputs["group_ids"], return_inverse=True)[1].reshape(-1).astype(np.int32)
    rewards = first_of(inputs, "rewards", "rewards_per_func")
    size = first_of(inputs, "n", "num_generations")
    return np.repeat(np.arange(len(rewards) // size, dtype=np.int32), size)


def of_tokens(case: Case) -> tuple[jax.Array, Any]:
    """verl's score of a response, the sum of its token rewards, and the mask."""
    rewards = case.inputs["token_level_rewards"]
    return masked.sum(rewards, ones(rewards), axis=-1), case.inputs["mask"]


def group_advantage(case: Case) -> Given:
    inputs, ids = case.inputs, group_ids(case)
    if case.peer == "verl":
        scores, mask = of_tokens(case)
        result = advantages.group_relative(scores, ids, keep_singletons=True)
        if inputs["norm_by_std"]:
            # The vectorised form, of the same name, has a floor under σ.
            floor = 1e-3 if "vectorized" in case.id + case.source else 0.0
            result = advantages.scale_by_group_std(result, scores, ids, eps=1e-6, min_std=floor)
        return {"advantages": advantages.spread(result, mask)}
    if case.peer == "trl":
        return multi_reward_group_advantage(case)
    scores = floats(inputs["rewards"])
    result = advantages.group_relative(scores, ids)
    if case.peer == "halos":
        result = advantages.scale_by_group_std(result, scores, ids, ddof=0, eps=1e-2)
    elif case.convention != "mean_only":
        result = advantages.scale_by_group_std(result, scores, ids, eps=1e-6)
    return {"advantages": result}


def multi_reward_group_advantage(case: Case) -> Given:
    """TRL: a reward that is not a number is left out of the sum, a response without any gets 0."""
    inputs, ids = case.inputs, group_ids(case)
    rewards, weights = floats(inputs["rewards_per_func"]), floats(inputs["reward_weights"])
    given = ~jnp.isnan(rewards)
    scored = given.any(-1)
    if inputs.get("aggregation") == "normalize_then_sum":

        def column(scores: jax.Array, mask: jax.Array) -> jax.Array:
            relative = advantages.group_relative(scores, ids, mask)
            return advantages.scale_by_group_std(relative, scores, ids, mask)

        columns = jax.vmap(column, in_axes=-1, out_axes=-1)(rewards, given)
        total = advantages.combine_scores(columns, given, weights=weights)
        return {"advantages": masked.whiten(total, scored, ddof=1, eps=0.0, std_eps=1e-4)}
    scores = advantages.combine_scores(rewards, given, weights=weights)
    result = advantages.group_relative(scores, ids, scored)
    if inputs["scale_rewards"] == "group":
        result = advantages.scale_by_group_std(result, scores, ids, scored)
    elif inputs["scale_rewards"] == "batch":
        spread = masked.var(scores, scored, ddof=1)
        result = masked.standardize(result, jnp.float32(0), spread, eps=0.0, std_eps=1e-4)
    return {"advantages": result}


def rloo_advantage(case: Case) -> Given:
    inputs, ids = case.inputs, group_ids(case)
    if case.peer == "verl":
        scores, mask = of_tokens(case)
        result = advantages.leave_one_out(scores, ids, keep_singletons=True)
        return {"advantages": advantages.spread(result, mask)}
    if case.peer == "tunix":
        return {"advantages": advantages.leave_one_out(floats(inputs["rewards"]), ids)}
    scores = advantages.combine_scores(
        floats(inputs["rewards_per_func"]),
        ones(inputs["rewards_per_func"]),
        weights=floats(inputs["reward_weights"]),
    )
    bounds = inputs.get("reward_clip_range")
    if bounds is not None:
        scores = advantages.bound_scores(scores, low=bounds[0], high=bounds[1])
    divergence = masked.sum(
        kl.k1(inputs["old_logprobs"], inputs["ref_logprobs"]), inputs["mask"], axis=-1
    )
    scores = advantages.penalize_kl(scores, divergence, ones(scores), kl_coef=inputs["beta"])
    result = advantages.leave_one_out(scores, ids)
    if inputs["normalize"]:
        result = masked.whiten(result, ones(result), ddof=1, eps=0.0, std_eps=1e-4)
    return {"advantages": result}


def rloo_vectorized_advantage(case: Case) -> Given:
    scores, mask = of_tokens(case)
    return {
        "advantages": advantages.spread(advantages.leave_one_out(scores, group_ids(case)), mask)
    }


def opo_advantage(case: Case) -> Given:
    scores, mask = of_tokens(case)
    lengths = masked.sum(mask, mask, axis=-1)
    result = advantages.opo(scores, lengths, group_ids(case), keep_singletons=True)
    return {"advantages": advantages.spread(result, mask)}


def reinforce_plus_plus_baseline_advantage(case: Case) -> Given:
    scores, mask = of_tokens(case)
    result = advantages.group_relative(scores, group_ids(case), keep_singletons=True)
    return {"advantages": masked.whiten(advantages.spread(result, mask), mask, ddof=1)}


def gpg_advantage(case: Case) -> Given:
    scores, mask = of_tokens(case)
    result = advantages.gpg(scores, group_ids(case), keep_singletons=True)
    return {"advantages": advantages.spread(result, mask)}


def passk_advantage(case: Case) -> Given:
    (scores, mask), ids = of_tokens(case), group_ids(case)
    result = advantages.pass_at_k(scores, ids)
    if case.inputs.get("norm_by_std", True):
        result = advantages.scale_by_group_std(result, scores, ids, eps=1e-6)
    return {"advantages": advantages.spread(result, mask)}


def remax_advantage(case: Case) -> Given:
    inputs, mask = case.inputs, case.inputs["mask"]
    rewards = masked.fill(inputs["token_level_rewards"], mask)
    returns = reward_to_go(rewards, mask)
    result = advantages.remax(rewards, inputs["baselines"], ones(mask))
    return {"advantages": jnp.where(mask, result, returns), "returns": returns}


def optimal_token_baseline_advantage(case: Case) -> Given:
    inputs, mask = case.inputs, case.inputs["mask"]
    rewards = inputs["token_level_rewards"]
    result = advantages.optimal_token_baseline(
        rewards, inputs["old_logprobs"], inputs["sum_pi_squared"], mask, group_ids(case)
    )
    return {"advantages": result, "returns": reward_to_go(rewards, mask)}


def advantage_pipeline(case: Case) -> Given:
    """OpenRLHF: the baseline is taken from the scalar, the KL penalty follows token by token."""
    inputs, ids, mask = case.inputs, group_ids(case), case.inputs["mask"]
    scores = floats(inputs["rewards"])
    name = inputs["estimator"]
    if name == "rloo":
        scores = advantages.leave_one_out(scores, ids)
    elif name in ("reinforce_baseline", "dr_grpo"):
        scores = advantages.group_relative(scores, ids)
    elif name == "group_norm":
        relative = advantages.group_relative(scores, ids)
        scores = advantages.scale_by_group_std(relative, scores, ids, eps=1e-9)
    rewards = advantages.penalize_kl(
        advantages.score_at_end(scores, mask), inputs["kl"], ones(mask), kl_coef=inputs["kl_coef"]
    )
    if name == "gae":
        result, returns = advantages.gae(
            masked.fill(rewards, mask),
            masked.fill(inputs["values"], mask),
            ones(mask),
            gamma=inputs["gamma"],
            gae_lambda=inputs["lam"],
        )
    else:
        gamma = inputs["gamma"] if name == "reinforce" else 1.0
        result = returns = reward_to_go(rewards, mask, gamma=gamma)
    if name in ("gae", "reinforce", "reinforce_baseline"):
        if inputs.get("no_std_norm"):
            one = jnp.float32(1)
            result = masked.standardize(result, masked.mean(result, mask), one, eps=0.0)
        else:
            result = whitened(result, mask, eps=0.0, min_var=1e-8)
    return {"advantages": result, "returns": returns}


def rollout_importance_weights(case: Case) -> Given:
    inputs, mask = case.inputs, case.inputs["mask"]
    if case.peer == "trl":
        level, action = inputs["mode"].split("_")
        of_level = {
            "token": advantages.token_importance_weights,
            "sequence": advantages.sequence_importance_weights,
        }
        weights = of_level[level](inputs["logprobs"], inputs["sampling_logprobs"], mask)
        bound = {"truncate": advantages.truncate_weights, "mask": advantages.reject_weights}
        low = 0.0 if inputs.get("clip_min") is None else inputs["clip_min"]
        high = np.inf if inputs.get("clip_max") is None else inputs["clip_max"]
        weights = bound[action](weights, low=low, high=high)
        return {"weights": weights if level == "token" else weights[:, None]}
    log_ratio = inputs["log_ratio"]
    arguments = (log_ratio, zeros(log_ratio), mask)
    if inputs["level"] == "token":
        weights = advantages.token_importance_weights(*arguments, log_ratio_clip=20.0)
    else:
        weights = advantages.sequence_importance_weights(*arguments, log_ratio_clip=20.0)
    weights = advantages.truncate_weights(weights, high=inputs["threshold"])
    if inputs.get("normalize"):
        real = mask if inputs["level"] == "token" else mask.any(-1)
        weights = advantages.normalize_weights(weights, real)
    by_token = weights if inputs["level"] == "token" else advantages.spread(weights, mask)
    return {"weights": masked.fill(by_token, mask)}


def off_policy_sequence_mask(case: Case) -> Given:
    inputs = case.inputs
    keep = advantages.on_policy_sequences(
        inputs["logprobs"],
        inputs["sampling_logprobs"],
        inputs["advantages"].reshape(-1),
        inputs["mask"],
        max_kl=inputs["threshold"],
    )
    return {"keep": masked.fill(ones(keep), keep)[:, None]}
