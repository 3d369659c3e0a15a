"""When a run ends before its time."""

from pathlib import Path
from typing import Any

import pytest

from rlhfjax.cli import stops
from rlhfjax.cli.arguments import GRPO

NUM_STEPS = 24


def ended(scores: list[float], **flags: Any) -> tuple[int, str]:
    """After how many lines, and why, a run with these scores ends."""
    args = GRPO(
        model_name_or_path=Path("m"), dataset_name=(Path("d"),), output_dir=Path("o"),
        reward_funcs=("f", "g"), **flags,
    )  # fmt: skip
    reason = stops.first_reason(stops.asked(args), NUM_STEPS)
    rows = [
        {"objective/scores": x, "objective/kl": i / 4, "rewards/g/mean": -((i - 8) ** 2) / 4}
        for i, x in enumerate(scores)
    ]
    for count in range(len(rows) + 1):
        if why := reason(rows[:count]):
            return count, why
    return len(rows), ""


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ({"stop_at_reward": 0.375, "stop_window": 4}, 7),  # (3 + 4 + 5 + 6) / 12 / 4
        ({"stop_at_kl": 2.0, "stop_window": 1}, 9),
        ({"stop_patience": 3}, 16),
        ({"stop_when_falls": "g", "stop_window": 3}, None),
        ({}, NUM_STEPS),
    ],
    ids=["reward", "kl", "patience", "falls", "none"],
)
def test_each_rule_ends_the_run(flags: dict[str, Any], count: int | None) -> None:
    scores = [min(i, 12) / 12 for i in range(NUM_STEPS)]
    at, why = ended(scores, **flags)
    if count is None:  # where the margin of noise is passed
        assert 11 < at < NUM_STEPS
    else:
        assert at == count
    assert all(f"--{flag}" in why for flag in list(flags)[:1])


def test_what_was_not_logged_ends_nothing() -> None:
    assert ended([float("nan")] * 9, stop_at_reward=-1.0, stop_window=2) == (9, "")
