"""Every algorithm ends at its fixed point, on a task small enough for the quick form."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.exact_optimum import ALGORITHMS, main

SMALL = ["--vocab", "3", "--length", "2", "--prompts", "3", "--beta", "0.5", "--iterations", "800"]
TO_THE_OPTIMUM = {
    "ppo",
    "reinforce",
    "reinforce-plus-plus",
    "rloo",
    "remax",
    "online-dpo",
    "dpo",
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    main([*SMALL, *arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ends_at_its_fixed_point(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, "--algorithm", name, "--seed", "3")
    # KTO's point has responses without any chance: only the divergence from it is finite.
    assert row["kl_from_fixed_point" if name == "kto" else "kl_to_fixed_point"] <= 0.01
    assert abs(row["regret"]) <= 0.01 * row["gain"]
    if name in TO_THE_OPTIMUM:
        assert row["regret_to_optimum"] == row["regret"]
    else:
        assert row["regret_to_optimum"] > 0.01 * row["gain"]


@pytest.mark.parametrize("name", ["dpo", "rloo"])
def test_a_transformer_finds_the_optimum_too(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--length", "1", "--iterations", "200"]
    (row,) = run(capsys, "--algorithm", name, "--policy", "transformer", *sizes)
    assert row["kl_to_fixed_point"] <= 0.01
    assert row["regret"] <= 0.01 * row["gain"]


def test_the_saved_tables_show_the_claim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rloo.npz"
    (row,) = run(capsys, "--algorithm", "rloo", "--save", str(path))
    with np.load(path, allow_pickle=False) as tables:
        rewards, ref, found = (
            tables[name].astype(np.float64) for name in ("rewards", "ref_log_probs", "log_probs")
        )
    assert rewards.shape == ref.shape == found.shape == (3, 9)
    optimum = np.exp(ref + rewards / 0.5)
    optimum /= optimum.sum(1, keepdims=True)

    def objective(probs: np.ndarray) -> float:
        return (probs * (rewards - 0.5 * (np.log(probs) - ref))).sum(1).mean()

    assert row["optimal_objective"] == pytest.approx(objective(optimum), abs=1e-5)
    assert row["objective"] == pytest.approx(objective(np.exp(found)), abs=1e-5)
    assert row["gain"] == pytest.approx(objective(optimum) - objective(np.exp(ref)), abs=1e-5)
    divergence = (np.exp(found) * (found - np.log(optimum))).sum(1).mean()
    assert row["kl_to_fixed_point"] == pytest.approx(divergence, abs=1e-5)
    assert divergence < 1e-3
