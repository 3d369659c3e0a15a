"""Rewards that are Python functions: what they are given, and what they may answer."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algorithms import rewards

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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_names_the_sample(bad: float) -> None:
    with pytest.raises(ValueError) as error:
        rewards.call(answering([1.0, 2.0, bad]), PROMPTS, COMPLETIONS)
    for part in ("'my_reward'", f"returned {bad}", "sample 2", "'the end'", "None"):
        assert part in str(error.value)


def test_a_callable_without_a_name_is_named_by_its_class() -> None:
    class Judge:
        def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
            return []

    with pytest.raises(ValueError, match="'Judge' returned 0 scores"):
        rewards.call(Judge(), PROMPTS, COMPLETIONS)
