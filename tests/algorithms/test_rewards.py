"""Rewards that are Python functions: what they are given, and what they may answer."""

import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_functions
from small_models import assert_same, bigram

from rlhfjax import models
from rlhfjax.algorithms import reward_model, rewards
from rlhfjax.types import Rollout

ROOT = Path(__file__).parents[2]

PROMPTS, COMPLETIONS = ["the film", "the cast", "the end"], ["is good", "is not", "is near"]


def answering(answer: Any):
    def my_reward(prompts: Sequence[str], completions: Sequence[str]) -> Any:
        return answer

    return my_reward


def test_it_is_given_texts_and_columns_by_name() -> None:
    def lengths(
        prompts: Sequence[str], completions: Sequence[str], weights: Sequence[float]
    ) -> list[float]:
        assert prompts == PROMPTS
        return [w * len(c) for w, c in zip(weights, completions, strict=True)]

    scores = rewards.call(lengths, PROMPTS, COMPLETIONS, weights=[1.0, 0.5, -1.0])
    np.testing.assert_array_equal(scores, [7.0, 3.0, -7.0])
    assert scores.dtype == np.float32


@pytest.mark.parametrize(
    "answer", [[1, 2, 3], (1.0, 2.0, 3.0), np.arange(1, 4), jnp.array([1.0, 2.0, 3.0])]
)
def test_it_may_answer_with_any_kind_of_number(answer: Any) -> None:
    np.testing.assert_array_equal(
        rewards.call(answering(answer), PROMPTS, COMPLETIONS), [1.0, 2.0, 3.0]
    )


def test_none_is_no_opinion_and_becomes_nan() -> None:
    scores = rewards.call(answering([1.0, None, 3.0]), PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(scores, [1.0, np.nan, 3.0])


@pytest.mark.parametrize("answer", [[], [1.0], [1.0, 2.0, 3.0, 4.0]])
def test_a_wrong_number_of_scores_is_refused_with_both_numbers(answer: list[float]) -> None:
    with pytest.raises(
        ValueError, match=f"'my_reward' returned {len(answer)} scores for 3 completions"
    ):
        rewards.call(answering(answer), PROMPTS, COMPLETIONS)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, "good", "1.0", b"2", [], {}, 1j])
def test_a_score_that_is_no_finite_number_names_the_sample(bad: Any) -> None:
    with pytest.raises(ValueError) as error:
        rewards.call(answering([1.0, 2.0, bad]), PROMPTS, COMPLETIONS)
    for part in ("'my_reward'", f"returned {bad!r}", "sample 2", "'the end'", "None"):
        assert part in str(error.value)
    assert error.value.failures == [(2, "the end", f"returned {bad!r}")]


@pytest.mark.parametrize("answer", [None, 1.0])
def test_an_answer_that_is_no_list_is_shown(answer: Any) -> None:
    with pytest.raises(ValueError, match=f"'my_reward' returned {answer}, which is no list"):
        rewards.call(answering(answer), PROMPTS, COMPLETIONS)


class Touchy:
    """Cannot bear some completions, and remembers what it was asked."""

    def __init__(self, *unbearable: str, error: Exception | None = None) -> None:
        self.unbearable, self.error, self.asked = unbearable, error or KeyError("what"), []

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], weights: Sequence[float]
    ) -> list[float]:
        assert len(prompts) == len(completions) == len(weights)
        self.asked.append(len(completions))
        if set(self.unbearable) & set(completions):
            raise self.error
        return list(weights)


class TestAFunctionThatRaises:
    def test_is_asked_for_one_sample_at_a_time_until_one_is_found(self) -> None:
        touchy = Touchy("is not", "is near")
        with pytest.raises(ValueError) as error:
            rewards.call(touchy, PROMPTS, COMPLETIONS, weights=[1, 2, 3])
        assert "'Touchy' raised KeyError('what'); asked for one" in str(error.value)
        assert "for sample 1 (prompt 'the cast')" in str(error.value)
        assert error.value.failures == [(1, "the cast", "raised KeyError('what')")]
        assert error.value.__cause__ is touchy.error
        assert touchy.asked == [3, 1, 1]

    def test_may_leave_out_what_it_cannot_bear(self) -> None:
        touchy = Touchy("is not", "is near")
        with pytest.warns(RuntimeWarning) as told:
            scores = rewards.call_or_mask(touchy, PROMPTS, COMPLETIONS, weights=[1, 2, 3])
        np.testing.assert_array_equal(scores, [1, np.nan, np.nan])
        assert scores.dtype == np.float32
        for part in ("sample 1 (prompt 'the cast')", "sample 2", "KeyError('what')", "left out"):
            assert part in str(told[0].message)
        assert told[0].filename == __file__

    def test_only_for_batches_is_told_so(self) -> None:
        def alone(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            (completion,) = completions
            return [float(len(completion))]

        with pytest.raises(ValueError, match=r"'alone' raised ValueError.* gave every sample a"):
            rewards.call(alone, PROMPTS, COMPLETIONS)
        with pytest.warns(RuntimeWarning, match="gave every sample a score"):
            scores = rewards.call_or_mask(alone, PROMPTS, COMPLETIONS)
        np.testing.assert_array_equal(scores, [7, 6, 7])

    def test_by_not_answering_is_not_asked_for_ever(self) -> None:
        texts = [f"text {i}" for i in range(20)]
        touchy = Touchy(*texts[2:], error=TimeoutError("late"))
        with pytest.warns(RuntimeWarning, match="so for 18 samples in all"):
            scores = rewards.call_or_mask(touchy, texts, texts, weights=[1.0] * 20)
        np.testing.assert_array_equal(scores, [1, 1, *[np.nan] * 18])
        assert touchy.asked == [20, 1, 1, 1, 1, 1]


def test_what_is_no_score_may_be_left_out_and_the_others_are_kept() -> None:
    answer = [np.inf, "good", 3.0]
    with pytest.warns(RuntimeWarning, match=r"returned inf for sample 0.*returned 'good' for"):
        scores = rewards.call_or_mask(answering(answer), PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(scores, [np.nan, np.nan, 3.0])


def test_no_failure_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = rewards.call_or_mask(answering([1.0, None, 3.0]), PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(scores, [1.0, np.nan, 3.0])


def test_a_callable_without_a_name_is_named_by_its_class() -> None:
    class Judge:
        def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            return []

    with pytest.raises(ValueError, match="'Judge' returned 0 scores"):
        rewards.call(Judge(), PROMPTS, COMPLETIONS)


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


HANGING = """
import os, signal, threading
import reward_functions
from rlhfjax.algorithms import rewards

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


class TestARewardModel:
    POLICY = bigram(5, context_length=8)

    def scorer(self, **changes: int) -> Any:
        return models.scalar_model(
            bigram(**({"vocab_size": 5, "context_length": 8} | changes)),
            models.linear_head(5, stddev=1.0),
        )

    def samples(self, length: int = 6) -> Rollout:
        tokens = np.random.default_rng(0).integers(0, 5, (3, length)).astype(np.int32)
        mask = np.arange(3) < np.array([[1], [2], [3]])
        prompt_mask = np.ones((3, length - 3), bool)
        return Rollout(tokens, np.concatenate([prompt_mask, mask], 1), mask, np.zeros((3, 3)))

    def test_scores_prompts_with_their_responses(self) -> None:
        scorer, samples = self.scorer(), self.samples()
        params = scorer.init(jax.random.key(0))
        scores = rewards.of_model(scorer, self.POLICY)(params, samples)
        whole = reward_model.score(scorer, params, samples.tokens, samples.attention_mask)
        assert_same(scores, whole)
        assert len(set(scores.tolist())) == 3

    def test_must_have_the_policys_vocabulary(self) -> None:
        with pytest.raises(ValueError, match=r"vocabulary of 5 .* one of 4: "):
            rewards.of_model(self.scorer(vocab_size=4), self.POLICY)

    def test_must_be_able_to_read_that_far(self) -> None:
        scorer = self.scorer(context_length=7)
        reward = rewards.of_model(scorer, self.POLICY)
        params = scorer.init(jax.random.key(0))
        assert reward(params, self.samples(7)).shape == (3,)
        with pytest.raises(ValueError, match=r"sequences of 8 tokens.* context of 7"):
            reward(params, self.samples(8))

    def test_of_which_nothing_is_known_is_taken_at_its_word(self) -> None:
        scorer = self.scorer()._replace(vocab_size=None, context_length=None)
        params = scorer.init(jax.random.key(0))
        assert rewards.of_model(scorer, self.POLICY)(params, self.samples(9)).shape == (3,)
