"""What the peers compute, as compositions of the library's public functions.

`run(case)` takes a case of `golden.json` and gives what the case expects, by the conventions of its
peer. What is computed is computed by the library; here it is chosen, laid out and named. The
compositions stand in `peer_*.py`. `DIFFERENT` lists the cases that the library answers otherwise on
purpose, each with a reason that holds for other inputs of its kind.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

# So that this file can be loaded by its path alone.
sys.path.insert(0, str(Path(__file__).parent))

import peer_groups
import peer_policies
import peer_preferences
import peer_sampling
import peer_statistics
from peer_case import Case, Given, decode


def compositions(module: ModuleType) -> dict[str, Callable[[Case], Given]]:
    """The functions from a case to what it expects, by the golden file's name for them."""
    return {
        name: function
        for name, function in vars(module).items()
        if getattr(function, "__annotations__", None) == {"case": Case, "return": Given}
        and function.__module__ == module.__name__
    }


FUNCTIONS = {
    name: function
    for module in (peer_statistics, peer_groups, peer_policies, peer_preferences, peer_sampling)
    for name, function in compositions(module).items()
}


def run(case: dict[str, Any]) -> Given:
    """The values that the case expects, as the library computes them, in one compiled program."""
    decoded = decode(case)

    def compute() -> Given:
        given = FUNCTIONS[decoded.function](decoded)
        return {name: given[name] for name in decoded.expected if given.get(name) is not None}

    return jax.jit(compute)()


NOTHING_IS_0 = "a statistic of no entries is 0, not NaN"
BOUNDED_BEFORE_EXP = "the input of exp is bounded: the gradient at the overflow is 0, not NaN"
ALL_TIES_STAY = "tokens that tie with the last one kept all stay, whatever the order of a sort"

DIFFERENT = {
    "agg_loss/verl/seq-mean-token-sum/all_masked": NOTHING_IS_0,
    "dpo_token/halos/ipo_policy_equals_ref": "a mean of no counted token is 0, not NaN",
    "entropy/verl/neg_inf_logit": "a token of no probability adds 0 to the entropy, not NaN",
    "kl_estimator/openrlhf/k3/extreme": BOUNDED_BEFORE_EXP,
    "kl_estimator/tunix/k3/extreme_clamp": BOUNDED_BEFORE_EXP,
    "masked_mean/halos/axis1_empty_row": NOTHING_IS_0,
    "masked_mean/openrlhf/axis1_empty_row": NOTHING_IS_0,
    "masked_mean/trl/axis1_empty_row": NOTHING_IS_0,
    "masked_mean/trl/nan_outside_mask": "NaN at a masked entry is not read",
    "masked_whiten/tunix/one_token": "the unbiased variance of one token is 0, not NaN",
    "orpo/orpo-ref/odds_ratio_extreme": "log σ does not underflow",
    "ppo_loss/trl/ratio_inf_times_zero": "an advantage of 0 times an infinite ratio is 0, not NaN",
    "raises/halos/slic": "both terms are reduced before they are added: no shapes to clash",
    "raises/lmhp-openai/take_top_p_batch2": "a batch is no different from one row",
    "raises/trl/masked_whiten_no_token": NOTHING_IS_0,
    "raises/verl/kl_penalty_k3_plus": "the straight-through estimator is a composition",
    "raises/verl/masked_whiten_no_token": NOTHING_IS_0,
    "raises/verl/passk_singleton": "a group of one has no other to beat: 0",
    "reward_loss/openrlhf/logexp_extreme": "log(1 + exp(x)) overflows, log σ does not",
    "sequence_logprobs/dpo-ref/average_empty_row": NOTHING_IS_0,
    "token_rewards/openrlhf/clip_emptyrow_obs": "a row without a token gets no score",
    "token_rewards/tunix/beta0.15": "Tunix truncates scores to integers",
    "top_k/tunix/ties": "all tokens that tie with the k-th are kept",
    "top_p/transformers/ties": ALL_TIES_STAY,
}
