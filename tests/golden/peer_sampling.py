"""Log-probabilities, sampling, layout of sequences and losses of reward models of the peers."""

from functools import partial
from itertools import zip_longest

import jax
import jax.numpy as jnp
import numpy as np
from peer_case import Case, Given

from rlhfjax import log_probs, masked, sampling, sequences
from rlhfjax.losses import policy, ranking, reductions, reward, selection, supervised

by_row = partial(masked.mean, axis=-1)


def pairwise_reward_loss(case: Case) -> Given:
    inputs = case.inputs
    if "chosen_logits" in inputs:  # a head of two classes, of which the second is the score
        chosen, rejected = inputs["chosen_logits"][..., 1], inputs["rejected_logits"][..., 1]
    else:
        chosen, rejected = inputs["chosen"], inputs["rejected"]
    options = {"center_coef": inputs.get("center"), "margin": inputs.get("margin")}
    if case.convention == "log_exp":  # the peer ignores its margin
        options["margin"] = None
    options = {name: value for name, value in options.items() if value is not None}

    def loss_of(chosen: jax.Array, rejected: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return reward.pairwise(chosen, rejected, **options)

    (loss, metrics), grads = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
        chosen, rejected
    )
    return {"loss": loss, **metrics, "grad_chosen": grads[0], "grad_rejected": grads[1]}


def kwise_ranking_loss(case: Case) -> Given:
    inputs = case.inputs
    if "index_0" in inputs:
        first, second = ranking.indexed_pairs(
            inputs["scores"], inputs["index_0"], inputs["index_1"]
        )
        loss, _ = reward.pairwise(second, first, preference=inputs["choice"])
        return {"loss": loss}
    rows = np.split(inputs["scores"], inputs["cu_lengths"][1:-1])
    scores = np.array(list(zip_longest(*rows, fillvalue=np.nan)), np.float32).T
    lengths = np.array([len(row) for row in rows])
    mask = sequences.mask_of_lengths(lengths, size=scores.shape[-1])
    reduce = {None: masked.mean, "mean": reductions.sequence_mean, "none": by_row}
    loss, _ = reward.pairwise(
        *ranking.ranked_pairs(scores, mask),
        l2_coef=inputs.get("beta", 0.0),
        reduce=reduce[inputs.get("reduction")],
    )
    return {"loss": loss}


def best_of_n_reward_loss(case: Case) -> Given:
    return {"loss": ranking.best_of_n(case.inputs["scores"], case.inputs["best"])[0]}


def scalar_rating_reward_loss(case: Case) -> Given:
    return {"loss": reward.rating(case.inputs["predicted"], case.inputs["label"])[0]}


def scalar_comparison_reward_loss(case: Case) -> Given:
    inputs = case.inputs
    return {"loss": reward.comparison(inputs["score0"], inputs["score1"], inputs["difference"])[0]}


def sft_loss(case: Case) -> Given:
    inputs = case.inputs
    reduce = masked.mean if inputs["token_level_loss"] else reductions.sequence_mean
    return {"loss": supervised.language_model(inputs["logprobs"], inputs["mask"], reduce=reduce)}


def filtered(case: Case, *filters: sampling.Filter) -> Given:
    """OpenAI marks removed tokens by -1e10 instead of -inf."""
    logits = sampling.chain(*filters)(jnp.asarray(case.inputs["logits"]))
    kept = jnp.isfinite(logits)
    value = -1e10 if case.peer == "lmhp-openai" else -jnp.inf
    return {
        "filtered": masked.fill(logits, kept, value=value),
        "kept_count": sequences.lengths(kept),
    }


def given_filters(case: Case) -> list[sampling.Filter]:
    """The filters that the inputs name, in the order of Tunix and transformers."""
    inputs = case.inputs
    top_p = partial(sampling.top_p, keep_crossing=case.peer != "lmhp-openai")
    named = [
        partial(sampling.temper, temperature=inputs.get("temperature")),
        partial(sampling.top_k, k=inputs.get("k") or None),
        partial(top_p, p=inputs.get("p")),
    ]
    return [filter_ for filter_ in named if None not in filter_.keywords.values()]


def top_k_filter(case: Case) -> Given:
    return filtered(case, *given_filters(case))


def top_p_filter(case: Case) -> Given:
    return filtered(case, *given_filters(case))


def sampling_filter_chain(case: Case) -> Given:
    return filtered(case, *given_filters(case))


def min_p_filter(case: Case) -> Given:
    return filtered(case, partial(sampling.min_p, p=case.inputs["p"]))


def temperature(case: Case) -> Given:
    logits, degrees = jnp.asarray(case.inputs["logits"]), case.inputs["temperature"]
    return {"scaled": sampling.temper(logits, temperature=degrees)}


def response_mask(case: Case) -> Given:
    return {"mask": sampling.response_mask(case.inputs["ids"], end_token=case.inputs["eos"])}


def truncate_response(case: Case) -> Given:
    inputs, pad = case.inputs, case.inputs["pad"]
    ids, _, valid = sequences.truncate(
        inputs["ids"],
        stop_token=inputs["stop"] if "stop" in inputs else inputs["token"],
        pad_token=pad,
        start=inputs.get("truncate_after", 0),
    )
    # TRL's last token is the one before the first padding id, also where that ends the response.
    before_pad = sequences.mask_of_lengths(sequences.first_true(ids == pad), size=ids.shape[-1])
    return {"ids": ids, "valid": valid, "last_token_index": sequences.last_true(before_pad)}


def first_true_indices(case: Case) -> Given:
    return {"index": sequences.first_true(jnp.asarray(case.inputs["ids"] == case.inputs["value"]))}


def positions_from_mask(case: Case) -> Given:
    real = jnp.asarray(case.inputs["ids"] != case.inputs["pad"])
    positions = sequences.held_positions if case.peer == "tunix" else masked.positions
    return {"positions": positions(real)}


def right_to_left_padding(case: Case) -> Given:
    ids, pad = case.inputs["ids"], case.inputs["pad"]
    return {"ids": sequences.pad_left(ids, ids != pad, pad_value=pad)[0]}


def causal_attention_mask(case: Case) -> Given:
    return {"attention": sequences.causal_mask(case.inputs["mask"])}


def completion_logprobs(case: Case) -> Given:
    inputs, length = case.inputs, case.inputs["completion_length"]
    values, entropy = log_probs.token_log_probs_and_entropy(
        inputs["logits"][:, :-1][:, -length:],
        inputs["input_ids"][:, -length:],
        temperature=inputs.get("temperature", 1.0),
    )
    return {"logprobs": values, "entropy": entropy}


def logprobs_from_logits(case: Case) -> Given:
    inputs = case.inputs
    return {
        "logprobs": log_probs.token_log_probs(
            inputs["logits"], inputs["labels"], temperature=inputs.get("temperature", 1.0)
        )
    }


def entropy_from_logits(case: Case) -> Given:
    return {"entropy": log_probs.entropy(case.inputs["logits"])}


def entropy_loss(case: Case) -> Given:
    entropies = log_probs.entropy(case.inputs["logits"])
    if "mask" in case.inputs:
        return {"entropy_mean": masked.mean(entropies, case.inputs["mask"])}
    everywhere = jnp.ones(entropies.shape, bool)
    loss, _ = policy.entropy_loss(
        entropies, everywhere, weights=case.inputs["weights"], reduce=by_row
    )
    return {"loss": loss}


def high_entropy_mask(case: Case) -> Given:
    inputs = case.inputs
    return {
        "mask": selection.high_entropy_mask(
            inputs["entropies"], inputs["mask"], quantile=inputs["q"]
        )
    }
