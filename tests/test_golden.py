"""The library gives the peers' numbers, once their conventions are spelled out as compositions.

`golden/adapter.py` holds the compositions. Every value of every case must be given by it, except
for the cases that it lists in `DIFFERENT`: what is given instead stands here.
"""

from typing import Any

import jax
import numpy as np
import pytest
from golden_cases import DIFFERENT, agrees, cases, decoded, run

AGREE = [case for case in cases().values() if case["id"] not in DIFFERENT]


def peer_says(case_id: str, *names: str) -> dict[str, Any]:
    return {name: decoded(case_id).expected[name] for name in names}


def but(case_id: str, name: str, *, at: Any, value: Any) -> dict[str, Any]:
    """What the peer says, with one entry replaced."""
    changed = decoded(case_id).expected[name].copy()
    changed[at] = value
    return {name: changed}


def entropies(logits: np.ndarray) -> list[list[float]]:
    """-Σ p log p over the tokens that are possible."""
    weights = [[np.exp(row) / np.exp(row).sum() for row in rows] for rows in logits.astype(float)]
    return [[-sum(p * np.log(p) for p in row if p > 0) for row in rows] for rows in weights]


EMPTY_ROW = {"mean": [0.257666667, 0.0, 0.097]}
LOGS = "sequence_logprobs/dpo-ref/average_empty_row"
ZERO_TIMES_INF = "ppo_loss/trl/ratio_inf_times_zero"
OURS: dict[str, dict[str, Any]] = {
    "agg_loss/verl/seq-mean-token-sum/all_masked": {"loss": 0.0},
    # (0 - 0 - 1/(2·0.1))²
    "dpo_token/halos/ipo_policy_equals_ref": {
        "losses": [25.0] * 3,
        "chosen_rewards": [0.0] * 3,
        "rejected_rewards": [0.0] * 3,
    },
    "entropy/verl/neg_inf_logit": {
        "entropy": entropies(decoded("entropy/verl/neg_inf_logit").inputs["logits"])
    },
    "kl_estimator/openrlhf/k3/extreme": {
        **peer_says("kl_estimator/openrlhf/k3/extreme", "kl"),
        "grad_logprobs": [[0.0] * 6],
    },
    "kl_estimator/tunix/k3/extreme_clamp": {
        **peer_says("kl_estimator/tunix/k3/extreme_clamp", "kl"),
        "grad_logprobs": [[0.0, 1.0, 0.0, 1.0, 0.0, 0.999999702]],
    },
    "masked_mean/halos/axis1_empty_row": EMPTY_ROW,
    "masked_mean/openrlhf/axis1_empty_row": EMPTY_ROW,
    "masked_mean/trl/axis1_empty_row": EMPTY_ROW,
    "masked_mean/trl/nan_outside_mask": {"mean": 0.872571429},
    # Variance 0: (x - 1)/√1e-8 of x = 1 and 2.
    "masked_whiten/tunix/one_token": {"whitened": [[0.0, 1e4]]},
    # The odds of e^-120 against 1 - 1e-6: log σ(x) = x = -120 - log 1e6.
    "orpo/orpo-ref/odds_ratio_extreme": {"log_sigmoid": [0.0, -133.815511, -0.693147182]},
    ZERO_TIMES_INF: {
        **peer_says(ZERO_TIMES_INF, "value_loss", "value_clip_frac", "grad_values"),
        "loss": -0.5 * np.exp(np.float64(0.1)),
        "policy_loss": -0.5 * np.exp(np.float64(0.1)),
        "grad_logprobs": [[0.0, -0.5 * np.exp(np.float64(0.1))]],
    },
    "reward_loss/openrlhf/logexp_extreme": peer_says("reward_loss/trl/extreme", "loss"),
    LOGS: but(LOGS, "logps", at=1, value=0.0),
    "token_rewards/openrlhf/clip_emptyrow_obs": but(
        "token_rewards/openrlhf/clip_emptyrow_obs", "rewards", at=(1, 4), value=0.15 * 0.3312
    ),
    "token_rewards/tunix/beta0.15": peer_says("token_rewards/tunix/intended", "rewards"),
    "top_k/tunix/ties": peer_says("top_k/transformers/ties", "filtered"),
    "top_p/transformers/ties": {
        "filtered": [
            [2.0, 1.0, 1.0, 1.0] + [-np.inf] * 4,
            [0.0] * 8,
            [5.0, 5.0] + [-np.inf] * 6,
        ],
        "kept_count": [4, 8, 2],
    },
}


@pytest.mark.parametrize("case", AGREE, ids=lambda case: case["id"])
def test_agrees_with_the_peer_under_its_convention(case: dict[str, Any]) -> None:
    agrees(case, run(case), decoded(case["id"]).expected)


@pytest.mark.parametrize("case_id", OURS)
def test_differs_from_the_peer_on_purpose(case_id: str) -> None:
    case = cases()[case_id]
    given = run(case)
    agrees(case, given, OURS[case_id])
    with pytest.raises(AssertionError):
        agrees(case, given, decoded(case_id).expected)


@pytest.mark.parametrize("case_id", [name for name in DIFFERENT if name.startswith("raises/")])
def test_answers_where_the_peer_raises(case_id: str) -> None:
    """The composition runs; that it gives nothing wrong is what the functions' own tests say."""
    run(cases()[case_id])


def test_every_case_is_answered_or_listed_with_a_reason() -> None:
    assert len(cases()) == 364
    assert len(DIFFERENT) == 24
    refused = {name for name, case in cases().items() if "raises" in case["tags"]}
    assert DIFFERENT.keys() == refused | OURS.keys()


def test_the_suite_runs_in_float32() -> None:
    assert not jax.config.jax_enable_x64
