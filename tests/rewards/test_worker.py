"""Reward functions in processes of their own."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reward_functions

from rlhfjax import rewards

ROOT = Path(__file__).parents[2]
PROMPTS, COMPLETIONS = ["the film", "the cast", "the end"], ["is good", "is not", "is near"]


@pytest.fixture(scope="module")
def worker() -> Iterator[rewards.Worker]:
    with rewards.Worker(reward_functions.obedient, time_limit=60) as worker:
        yield worker
    assert multiprocessing.active_children() == []


class TestWorker:
    def test_answers_as_the_function_does(self, worker: rewards.Worker) -> None:
        np.testing.assert_array_equal(rewards.call(worker, PROMPTS, COMPLETIONS), [7, 6, 7])

    @pytest.mark.parametrize(
        ("prompt", "raised"),
        {
            "refuse": "KeyError('no such key')",
            "strange": "RuntimeError('Strange: very odd')",
            "leave": "RuntimeError('SystemExit: 4')",
        }.items(),
    )
    def test_raises_what_the_function_raises(
        self, worker: rewards.Worker, prompt: str, raised: str
    ) -> None:
        with pytest.raises(ValueError) as error:
            rewards.call(worker, ["", prompt], ["a", "b"])
        assert error.value.failures == [(1, prompt, f"raised {raised}")]
        (note,) = error.value.__cause__.__notes__
        assert "reward_functions.py" in note

    def test_that_ends_is_reported_and_started_again(self, worker: rewards.Worker) -> None:
        with pytest.warns(RuntimeWarning, match=r"'obedient' .*ended with exit code 3.* sample 1 "):
            scores = rewards.call_or_mask(worker, ["", "end", ""], ["a", "b", "ccc"])
        np.testing.assert_array_equal(scores, [1, np.nan, 3])

    def test_cannot_be_made_of_what_has_no_name_in_a_module(self) -> None:
        with pytest.raises(ValueError, match=r"'<lambda>' cannot run .* with `def` at the top"):
            rewards.Worker(lambda prompts, completions: [], time_limit=1)


def test_a_name_is_loaded_in_the_process_alone_and_in_the_folder_of_its_maker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.py").write_text(
        "import os\nfrom pathlib import Path\nMAKER = int(Path('maker').read_text())\n"
        "assert os.getpid() != MAKER\n"
        "def reward(completions): return [float(os.getppid() == MAKER)]"
    )
    (tmp_path / "maker").write_text(str(os.getpid()))
    monkeypatch.chdir(tmp_path)
    with rewards.Worker("here.py", time_limit=60) as worker:
        assert worker.__name__ == "reward"
        monkeypatch.chdir("/")
        np.testing.assert_array_equal(rewards.call(worker, ["a"], ["b"], unread=["c"]), [1.0])
        worker.close()
        np.testing.assert_array_equal(rewards.call(worker, ["a"], ["b"]), [1.0])
    (tmp_path / "here.py").write_text("1 = 2")
    with pytest.raises(rewards.RewardError, match=r"here\.py:1: cannot assign") as refused:
        rewards.Worker(f"{tmp_path}/here.py", time_limit=60)
    assert not hasattr(refused.value, "__notes__")  # where in the process it was, helps nobody


HANGING = """
import os, signal, threading
import reward_functions
from rlhfjax import rewards

worker = rewards.Worker(reward_functions.obedient, time_limit=0.5)
try:
    rewards.call(worker, ["hang"], [""])
except rewards.RewardError as error:
    print(error)
worker.time_limit = 1000
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
worker(prompts=["hang"], completions=[""])
"""


def test_a_function_that_hangs_is_stopped_and_leaves_no_process_behind() -> None:
    # Returns when the last process that holds the pipe has ended.
    ran = subprocess.run(
        [sys.executable, "-u", "-c", HANGING],
        cwd=ROOT / "tests", capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert "TimeoutError('no answer within 0.5 s') for sample 0 (prompt 'hang')" in ran.stdout
    assert ran.returncode == -9, ran.stderr
