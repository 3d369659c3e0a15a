"""Every algorithm ends at its fixed point, on a task small enough for the quick form."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments.exact_optimum import ALGORITHMS, main

SMALL = ["--vocab", "3", "--length", "2", "--prompts", "3", "--beta", "0.5"]
TO_THE_OPTIMUM = {
    "ppo",
    "reinforce",
    "reinforce-plus-plus",
    "rloo",
    "remax",
    "online-dpo",
    "dpo",
}
SLOW = {"rloo", "online-dpo", "rejection-sampling", "kto", "simpo"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    main([*SMALL, "--iterations", "400", *arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ends_at_its_fixed_point(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--iterations", "800"] if name in SLOW else []
    (row,) = run(capsys, "--algorithm", name, "--seed", "3", *more)
    # KTO's point has responses without any chance: only the divergence from it is finite.
    assert row["kl_from_fixed_point" if name == "kto" else "kl_to_fixed_point"] <= 0.01
    assert abs(row["regret"]) <= 0.01 * row["gain"]
    lost = row["regret_to_optimum"] / row["gain"]
    assert lost <= 0.01 if name in TO_THE_OPTIMUM else lost > 0.01


def test_a_transformer_finds_the_optimum_too(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--length", "1", "--iterations", "200"]
    (row,) = run(capsys, "--algorithm", "rloo", "--policy", "transformer", *sizes)
    assert row["kl_to_fixed_point"] <= 0.01
    assert row["regret"] <= 0.01 * row["gain"]


def test_the_saved_tables_show_the_claim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "not" / "yet" / "rloo.npz"
    # As in the test above: the same program, compiled already.
    more = ["--seed", "3", "--iterations", "800"]
    (row,) = run(capsys, "--algorithm", "rloo", *more, "--save", str(path))
    with np.load(path, allow_pickle=False) as tables:
        rewards, ref, found = (
            tables[name].astype(np.float64) for name in ("rewards", "ref_log_probs", "log_probs")
        )
        point, beta = tables["fixed_point_log_probs"], float(tables["beta"])
    assert beta == 0.5
    assert rewards.shape == ref.shape == found.shape == (3, 9)
    optimum = np.exp(ref + rewards / 0.5)
    optimum /= optimum.sum(1, keepdims=True)

    def objective(probs: np.ndarray) -> float:
        return (probs * (rewards - 0.5 * (np.log(probs) - ref))).sum(1).mean()

    assert row["optimal_objective"] == pytest.approx(objective(optimum), abs=1e-5)
    assert row["objective"] == pytest.approx(objective(np.exp(found)), abs=1e-5)
    assert row["gain"] == pytest.approx(objective(optimum) - objective(np.exp(ref)), abs=1e-5)
    np.testing.assert_allclose(np.exp(point), optimum, atol=1e-6)
    divergence = (np.exp(found) * (found - np.log(optimum))).sum(1).mean()
    assert row["kl_to_fixed_point"] == pytest.approx(divergence, abs=1e-5)
    assert divergence < 1e-3


@pytest.mark.parametrize("name", ["ppo", "dpo", "dr-grpo"])
def test_one_prompt_and_one_token_are_enough(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, "--algorithm", name, "--prompts", "1", "--length", "1", "--vocab", "5")
    assert row["kl_to_fixed_point"] <= 0.01


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--vocab", "1"], "--vocab must be at least 2"),
        (["--prompts", "0"], "--prompts must be at least 1"),
        (["--length", "0"], "--length must be at least 1"),
        (["--beta", "0"], "--beta must be positive"),
        (["--iterations", "3"], "--iterations must be at least 4"),
        (["--algorithm", "kto", "--beta", "2"], "more than one limit"),
        (["--algorithm", "cpo", "--vocab", "23"], "more than 1.3e\\+08"),
        (["--algorithm", "dapo", "--vocab", "20"], "more than 1.3e\\+08"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(capsys, *arguments)
    assert re.search(complaint, capsys.readouterr().err.replace("\n", " "))


def test_all_goes_on_where_a_fixed_point_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = {name: ALGORITHMS[name] for name in ("kto", "dpo")}
    monkeypatch.setattr("experiments.exact_optimum.ALGORITHMS", some)
    refused, trained = run(capsys, "--algorithm", "all", "--beta", "2")
    assert refused["algorithm"] == "kto" and "more than one limit" in refused["error"]
    assert trained["algorithm"] == "dpo" and trained["kl_to_fixed_point"] <= 0.01
