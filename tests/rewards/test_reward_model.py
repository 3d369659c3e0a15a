"""A reward model as a reward function."""

import numpy as np
import pytest

from rlhfjax import rewards


class Sums:
    """The sum of the real tokens; remembers the shapes that it was given."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        assert tokens.dtype == np.int32 and mask.dtype == bool
        assert (tokens[~mask] == 99).all()
        # Padded on the right.
        assert (np.sort(~mask, 1) == ~mask).all()
        self.shapes.append(tokens.shape)
        return (tokens * mask).sum(1).astype(np.float32)


def numbers(prompt: str, completion: str) -> list[int]:
    return [int(letter) for letter in prompt + completion]


def test_every_sample_has_the_score_of_its_tokens_and_none_if_there_are_too_many() -> None:
    model = Sums()
    reward = rewards.of_texts(model, numbers, length=6, batch_size=2, pad_token=99, name="mine")
    scores = reward(["1", "12", "", "123", "", "1"], ["", "3", "", "4567", "123456", "1"])
    assert scores == [1.0, 6.0, None, None, 21.0, 2.0]
    # 3 tokens need 4, and 6 would need 8 but 6 are the most.
    assert model.shapes == [(2, 4), (2, 6)]
    assert reward.__name__ == "mine"


def test_it_is_asked_like_any_other() -> None:
    reward = rewards.of_texts(Sums(), numbers, length=8, batch_size=4, pad_token=99)
    with rewards.Combined([reward], weights=[2.0]) as combined:
        scores, found = combined(["1", "2"], ["1", "2"], answer=["", ""])
    np.testing.assert_array_equal(scores, [4.0, 8.0])
    assert found["rewards/reward_model/mean"] == pytest.approx(3.0)


@pytest.mark.parametrize("prompt", ["2 + 2?", [{"role": "user", "content": "2 + 2?"}]])
def test_completions_take_the_form_of_their_prompts(prompt: object) -> None:
    (completion,) = rewards.completions_to([prompt], ["4"])
    assert completion == (
        "4" if isinstance(prompt, str) else [{"role": "assistant", "content": "4"}]
    )
    assert rewards.text_of(completion) == "4"
