"""Sum to target at full size, with fewer seeds: it takes seconds."""

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.sum_to_target import fastest, main


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "not_made_yet"


@pytest.fixture(scope="module")
def summary(out: Path) -> dict[str, Any]:
    return main(["--seeds", "4", "--seed", "5", "--out", str(out)])


def test_every_seed_is_solved(summary: dict[str, Any]) -> None:
    assert (summary["seeds"], summary["seeds_solved"], summary["iterations"]) == (4, 4, 100)
    assert min(summary["mean_reward"]) >= 0.99
    # 320 samples, most of which get 1 and the others 1/2: a mean within 0.02 of the exact one.
    np.testing.assert_allclose(summary["batch_mean_reward"], summary["mean_reward"], atol=0.02)


def test_it_leaves_a_summary_and_a_picture(summary: dict[str, Any], out: Path) -> None:
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_training_nothing_is_solved_and_members_are_timed() -> None:
    summary = main(["--members", "2", "--iterations", "1"])
    assert (summary["seeds"], summary["seeds_solved"]) == (2, 0)
    rewards = [1 / (1 + abs(sum(digits) - 15)) for digits in product(range(10), repeat=3)]
    np.testing.assert_allclose(summary["mean_reward"], np.mean(rewards), atol=0.05)
    assert {"seconds_per_member", "seconds_single", "ratio"} <= summary.keys()


def test_times_are_the_least_of_calls_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, called = [0.0], []
    costs = {"all": iter([5.0, 3.0, 4.0]), "one": iter([1.0, 2.0, 0.5])}

    def program(name: str) -> None:
        called.append(name)
        now[0] += next(costs[name])

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    taken = fastest({name: partial(program, name) for name in costs}, rounds=3)
    assert taken == {"all": 3.0, "one": 0.5}
    assert called == ["all", "one"] * 3


@pytest.mark.parametrize("wrong", [["--seeds", "0"], ["--members", "0"], ["--batch", "30"]])
def test_bad_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(wrong)
    assert wrong[0] in capsys.readouterr().err
