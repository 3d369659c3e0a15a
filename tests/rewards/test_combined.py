"""Several reward functions as one: the sum, its metrics, and processes that are asked together."""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from rlhfjax import rewards
from rlhfjax.rewards.combined import metrics, weighted_sum

NAN = np.nan


def test_the_sum_leaves_out_what_has_no_score() -> None:
    scores = np.array([[1, NAN, 2, NAN], [10, 20, NAN, NAN]], np.float32)
    total = weighted_sum(scores, [0.5, -1.0])
    np.testing.assert_array_equal(total, [-9.5, -20.0, 1.0, NAN])
    assert total.dtype == np.float32


def test_metrics_are_of_the_samples_with_a_score() -> None:
    scores = np.array([[1, NAN, 4, 1], [NAN, 7, NAN, NAN], [NAN] * 4], np.float32)
    found = metrics(["a", "b", "c"], scores)
    # (1 + 4 + 1) / 3 and sqrt((1 + 4 + 1) / 2), deviations -1, 2, -1.
    # No score is nothing that a rule could take for a low one.
    assert np.isnan(found.pop("rewards/c/mean"))
    assert found == {
        "rewards/a/mean": 2.0,
        "rewards/a/std": pytest.approx(3**0.5),
        "rewards/b/mean": 7.0,
        "rewards/b/std": 0.0,
        "rewards/c/std": 0.0,
    }


def reward(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


@dataclass
class Unhashable:
    score: float

    def __call__(self, completions: Sequence[str]) -> list[float]:
        return [self.score] * len(completions)


def test_functions_of_this_process_are_summed() -> None:
    functions = [reward, rewards.verifiers.number(), Unhashable(100.0), reward]
    with rewards.Combined(functions, weights=[1.0, 10.0, 1.0, 0.5]) as combined:
        scores, found = combined(["", ""], ["#### 1", "none"], answer=["1", "1"])
    np.testing.assert_array_equal(scores, [119.0, 106.0])
    assert combined.names == ["reward", "number", "Unhashable", "reward_2"]
    assert found["rewards/number/mean"] == 0.5
    assert found["rewards/reward_2/mean"] == 5.0


@pytest.mark.parametrize(("functions", "weights"), [([], None), ([reward], [1.0, 2.0])])
def test_the_numbers_of_functions_and_weights_are_the_same(functions, weights) -> None:
    with pytest.raises(ValueError, match=r"\d reward functions and \d weights"):
        rewards.Combined(functions, weights=weights)


FILE = """
import time
from pathlib import Path

def meet(me, others):
    def meeting(completions):
        here = Path(__file__).parent
        (here / me).touch()
        for _ in range(1000):
            if all((here / other).exists() for other in others):
                return [1.0] * len(completions)
            time.sleep(0.02)
        raise TimeoutError
    return meeting

def slow(completions, answer=None):
    time.sleep(max(map(len, completions)) / 2)
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(FILE)
    return file


def test_all_are_asked_at_the_same_time(file: Path) -> None:
    here = rewards.load(f"{file}:meet('c', 'ab')")
    names = [f"{file}:meet('a', 'bc')", here, f"{file}:meet('b', 'ac')"]
    with rewards.Combined(names) as combined:
        scores, _ = combined([""], [""])
    np.testing.assert_array_equal(scores, [3.0])


@pytest.fixture(scope="module")
def combined(file: Path) -> Iterator[rewards.Combined]:
    names = [f"{file}:slow", "number", "regex(pattern='(a+)+$')"]
    with rewards.Combined(
        names, weights=[1, 10, 100], time_limit=1.5, call=rewards.call_or_mask
    ) as combined:
        assert combined.names == ["slow", "number", "regex"]
        yield combined
    assert multiprocessing.active_children() == []


class TestNames:
    def test_are_asked_for_what_they_need_before_anything_is_sampled(
        self, combined: rewards.Combined
    ) -> None:
        combined.require("prompts", "completions", "answer")
        with pytest.raises(rewards.RewardError, match=r"'number' needs 'answer', which is not"):
            combined.require("prompts", "completions", "solution")

    def test_that_hang_are_stopped_and_started_again(self, combined: rewards.Combined) -> None:
        bad = "a" * 40 + "b"
        with pytest.warns(RuntimeWarning) as told:
            scores, found = combined(["p"], [bad], answer=["1"])
        assert {str(w.message).split("'")[1] for w in told} == {"slow", "regex"}
        np.testing.assert_array_equal(scores, [0.0])
        assert found["rewards/number/mean"] == 0.0
        scores, _ = combined(["p"], ["a"], answer=["1"])
        np.testing.assert_array_equal(scores, [101.0])


def test_a_name_that_is_refused_leaves_no_process_behind() -> None:
    before = set(multiprocessing.active_children())
    with pytest.raises(rewards.RewardError, match="no such file"):
        rewards.Combined(["number", "not_there.py"])
    assert set(multiprocessing.active_children()) == before
