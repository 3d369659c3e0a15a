"""Reward functions in Python: what they are given, and what they may answer."""

import asyncio
import re
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import rewards

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


def test_it_is_given_what_it_names_and_no_more() -> None:
    def of_tokens(completion_ids: Sequence[list[int]], unused: float = 2.0) -> list[float]:
        return [unused * len(tokens) for tokens in completion_ids]

    scores = rewards.call(
        of_tokens, PROMPTS, COMPLETIONS, completion_ids=[[1], [1, 2], []], answer=["a", "b", "c"]
    )
    np.testing.assert_array_equal(scores, [2.0, 4.0, 0.0])


def test_it_is_given_all_if_it_takes_all() -> None:
    seen = []

    def everything(**given: Any) -> list[float]:
        seen.append(given)
        return [0.0] * 3

    rewards.call(everything, PROMPTS, COMPLETIONS, answer=["a", "b", "c"])
    assert seen == [{"prompts": PROMPTS, "completions": COMPLETIONS, "answer": ["a", "b", "c"]}]


@pytest.mark.parametrize("ask", [rewards.call, rewards.call_or_mask])
def test_a_column_that_the_data_lacks_is_named_and_never_left_out(ask: Any) -> None:
    def checked(completions: Sequence[str], solution: Sequence[str]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(
        rewards.RewardError,
        match=r"'checked' needs 'solution', which is not .* prompts, completions, answer$",
    ):
        ask(checked, PROMPTS, COMPLETIONS, answer=["a", "b", "c"])


def test_an_async_function_is_waited_for() -> None:
    async def patient(completions: Sequence[str]) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(completion)) for completion in completions]

    np.testing.assert_array_equal(rewards.call(patient, PROMPTS, COMPLETIONS), [7, 6, 7])


def test_the_state_of_training_is_no_column() -> None:
    def scheduled(completions: Sequence[str], trainer_state: rewards.TrainerState) -> list[float]:
        if len(completions) > 1:
            raise ValueError
        return [trainer_state.global_step / trainer_state.max_steps]

    with pytest.warns(RuntimeWarning, match="gave every sample a score"):
        scores = rewards.call_or_mask(
            scheduled, PROMPTS, COMPLETIONS, trainer_state=rewards.TrainerState(3, 4)
        )
    np.testing.assert_array_equal(scores, [0.75] * 3)


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


@pytest.mark.parametrize("answer", [None, 1.0, {0: 1.0, 1: 2.0, 2: 3.0}, {1.0}])
def test_an_answer_that_is_no_list_is_shown(answer: Any) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"'my_reward' returned {answer}, which is no list")
    ):
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
