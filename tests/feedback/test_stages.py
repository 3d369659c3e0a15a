"""The two stages: what is sampled from what, and what the records say."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import bigram

from rlhfjax import sampling
from rlhfjax.algorithms import reward_model, sft
from rlhfjax.data import formats, records, tokenized
from rlhfjax.data.example_batches import Shape, response_batches
from rlhfjax.data.text import DataError
from rlhfjax.feedback import stages, templates
from rlhfjax.feedback.templates import Vocabulary
from rlhfjax.types import Rollout

VOCAB, END = 16, 15
DIGITS = Vocabulary(lambda text: [int(word) for word in text.split()], VOCAB)


def chain(*after: tuple[int, int]):
    """Parameters of a `bigram` that always says the second token after the first."""
    table = np.zeros((VOCAB, VOCAB), np.float32)
    for token, then in after:
        table[token, then] = 100.0
    return {"table": jnp.asarray(table)}


def rollout_of(prompts, responses, mask) -> Rollout:
    tokens = jnp.concatenate([jnp.array(prompts), jnp.array(responses)], axis=1)
    mask = jnp.array(mask, bool)
    attention = jnp.concatenate([jnp.ones((len(prompts), len(prompts[0])), bool), mask], axis=1)
    return Rollout(tokens.astype(jnp.int32), attention, mask, jnp.zeros(mask.shape))


class TestRevise:
    def test_the_critique_is_read_without_its_end(self) -> None:
        critique = templates.encode("1 {response} 2", DIGITS)
        revision = templates.encode("{response} {critique} 3", DIGITS)
        # The critique of anything is "4 5", its revision "6".
        params = chain((2, 4), (4, 5), (5, END), (3, 6), (6, END))
        fields = {
            "response": (jnp.array([[7, 8], [9, 0]]), jnp.array([[True, True], [True, False]]))
        }
        found = jax.jit(stages.revise, static_argnums=0, static_argnames=("num_tokens", "sampler"))(
            bigram(VOCAB), params, critique, revision, fields, jax.random.key(0),
            num_tokens=4, pad_token=0, end_token=END, sampler=sampling.greedy,
        )  # fmt: skip
        assert found.critiques.responses.tolist() == [[4, 5, END, 0]] * 2
        assert found.revisions.responses.tolist() == [[6, END, 0, 0]] * 2
        asked = found.revisions.prompts, found.revisions.attention_mask[:, :-4]
        read = [row[real].tolist() for row, real in zip(*map(np.asarray, asked), strict=True)]
        assert read == [[7, 8, 4, 5, 3], [9, 4, 5, 3]]

    def test_a_request_that_leaves_no_room_is_refused(self) -> None:
        request = templates.encode("{response} 1", DIGITS)
        fields = {"response": (jnp.ones((1, 6), int), jnp.ones((1, 6), bool))}
        with pytest.raises(ValueError, match="leave no room for responses of 4"):
            stages.revise(
                bigram(VOCAB, context_length=10), chain(), request, request, fields,
                jax.random.key(0), num_tokens=4, pad_token=0,
            )  # fmt: skip


class TestRevised:
    asked = rollout_of([[9, 9, 9]] * 3, [[4, 5, END], [6, 7, 8], [END, 0, 0]],
                       [[1, 1, 1], [1, 1, 1], [1, 0, 0]])  # fmt: skip
    prompt = jnp.array([[1, 2], [3, 99], [2, 1]]), jnp.array([[1, 1], [1, 0], [1, 1]], bool)

    def test_is_the_prompt_with_the_revision_alone(self) -> None:
        tokens, learned, real = stages.revised(self.prompt, self.asked, end_token=END)
        assert tokens.tolist() == [[1, 2, 4, 5, END], [0, 3, 6, 7, 8], [2, 1, END, 0, 0]]
        assert real.tolist() == [[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
        # The last one has nothing but its end.
        assert learned.tolist() == [[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [0] * 5]
        assert stages.revised(self.prompt, self.asked)[1][2].tolist() == [0, 0, 1, 0, 0]

    def test_as_many_prompts_as_revisions(self) -> None:
        with pytest.raises(AssertionError):
            stages.revised(jax.tree.map(lambda x: x[:2], self.prompt), self.asked)

    def test_supervised_training_learns_them(self) -> None:
        model, optimizer = bigram(VOCAB), optax.sgd(0.5)
        batch = stages.revised(self.prompt, self.asked, end_token=END)
        step = sft.make_step(model, optimizer)
        state = sft.init(chain(), optimizer)
        state, before = step(state, *batch)
        _, after = step(state, *batch)
        # Of a table of zeros all tokens are as probable.
        np.testing.assert_allclose(before["loss"], np.log(VOCAB), rtol=1e-6)
        assert before["num_tokens"] == 6 and after["loss"] < before["loss"]


class TestSoftPairs:
    first = rollout_of([[1], [2], [3]], [[4, 5], [6, 0], [7, 8]], [[1, 1], [1, 0], [1, 1]])
    second = rollout_of([[1], [2], [3]], [[9, 0], [10, 11], [12, 0]], [[1, 0], [1, 1], [1, 0]])

    def test_the_more_probable_one_is_chosen(self) -> None:
        batch = stages.soft_pairs(self.first, self.second, jnp.array([0.9, 0.2, jnp.nan]))
        assert batch.chosen.tolist()[:2] == [[4, 5], [10, 11]]
        assert batch.chosen_mask.tolist() == [[True, True], [True, True], [False, False]]
        assert batch.rejected.tolist()[:2] == [[9, 0], [6, 0]]
        assert batch.rejected_mask.tolist() == [[True, False], [True, False], [False, False]]
        np.testing.assert_array_equal(batch.prompts, [[1], [2], [3]])
        assert batch.prompt_mask.all() and batch.prompt_mask.shape == (3, 1)
        assert batch.pairs.tolist() == [True, True, False]
        np.testing.assert_allclose(batch.chosen_probs, [0.9, 0.8, 0.5])

    def test_a_reward_model_learns_from_the_probabilities(self) -> None:
        batch = stages.soft_pairs(self.first, self.second, jnp.array([0.9, 0.2, jnp.nan]))
        scores = jnp.array([[1.0, -0.5, 3.0], [0.2, 0.4, jnp.inf]])
        value, _ = reward_model.pairs(scores, batch)
        expected = [
            -p * np.log(1 / (1 + np.exp(-d))) - (1 - p) * np.log(1 / (1 + np.exp(d)))
            for p, d in ((0.9, 0.8), (0.8, -0.9))
        ]
        np.testing.assert_allclose(value, np.mean(expected), rtol=1e-6)

    def test_what_is_no_probability_labels_nothing(self) -> None:
        log_odds = jnp.array([2.0, -0.1, 0.3])
        pairs = jax.jit(lambda probs: stages.soft_pairs(self.first, self.second, probs).pairs)
        assert pairs(log_odds).tolist() == [False, False, True]
        with pytest.raises(ValueError, match=r"pair 0: 2\.0 is no probability .*mean_of_log_odds"):
            stages.soft_pairs(self.first, self.second, log_odds)

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(AssertionError):
            stages.soft_pairs(self.first, self.second, jnp.zeros(2))


class TestRecords:
    def test_revisions(self, tmp_path: Path) -> None:
        found = stages.revision_records(
            ["p", "q"], ["bad", "worse"], ["it is bad", "so is it"], ["good", ""],
            principles=["kind", "kind"], judge="m",
        )  # fmt: skip
        assert found == [
            {
                "prompt": "p", "completion": "good", "response": "bad", "critique": "it is bad",
                "principle": "kind", "judge": "m",
            }
        ]  # fmt: skip
        stages.write_records(tmp_path / "not" / "yet.jsonl", found)
        read = records.read(tmp_path / "not" / "yet.jsonl")
        (example,) = formats.examples(read, formats.SUPERVISED)
        assert (example.prompt, example.completion) == ("p", "good")
        assert example.columns["critique"] == "it is bad"

    def test_comparisons(self, tmp_path: Path) -> None:
        probs = np.array([0.75, 0.25, 0.5, 0.9, np.nan])
        found = stages.comparison_records(
            list("pqrst"), list("aaaaa"), list("bbbab"), probs,
            principles=["kind", "brief", "kind", "kind", "kind"], judge="m",
        )  # fmt: skip
        columns = ("prompt", "chosen", "rejected", "chosen_prob", "principle", "judge")
        assert [tuple(record[name] for name in columns) for record in found] == [
            ("p", "a", "b", 0.75, "kind", "m"),
            ("q", "b", "a", 0.75, "brief", "m"),
            ("r", "a", "b", 0.5, "kind", "m"),
        ]
        file = tmp_path / "labels.jsonl"
        stages.write_records(file, found)
        assert [json.loads(line) for line in file.read_text().splitlines()] == found

    def test_a_reward_model_reads_the_probabilities(self, tmp_path: Path) -> None:
        probs = np.array([0.75, 0.4])
        told = {"principles": ["kind"] * 2, "judge": "m"}
        found = stages.comparison_records(["1", "2"], ["3", "4"], ["5 6", "7"], probs, **told)
        stages.write_records(tmp_path / "labels.jsonl", found)
        pairs = formats.examples(records.read(tmp_path / "labels.jsonl"), formats.PREFERENCES)
        assert [pair.chosen_prob for pair in pairs] == pytest.approx([0.75, 0.6])

        class Digits:
            end_tokens = (END,)

            def encode(self, texts, *, add_special_tokens):
                return [DIGITS.encode(text) for text in texts]

        items, _ = tokenized.responses(pairs, Digits())
        options = {"batch_size": 3, "shapes": [Shape(2, 4)], "pad_token": 0, "seed": 0, "epoch": 0}
        (batch,) = response_batches(items, **options)
        soft = batch.soft_pairs
        of_prompt = {
            int(row.max()): prob for row, prob in zip(batch.prompts, soft.chosen_probs, strict=True)
        }
        assert of_prompt == pytest.approx({1: 0.75, 2: 0.6, 0: 1.0})
        assert soft.pairs.tolist() == [True, True, False]
        assert batch.pairs.chosen_probs is None

    def test_log_odds_are_refused(self) -> None:
        texts, told = (["p"] * 2, ["a"] * 2, ["b"] * 2), {"principles": ["x", "y"], "judge": "m"}
        with pytest.raises(ValueError, match=r"row 1, principle 'y': -0\.5 .*mean_of_log_odds"):
            stages.comparison_records(*texts, np.array([0.5, -0.5]), **told)

    def test_as_many_of_each(self) -> None:
        with pytest.raises(ValueError):
            stages.comparison_records(["p"], ["a"], ["b", "c"], [0.5], principles=["x"], judge="m")

    @pytest.mark.parametrize(
        ("prob", "message"),
        [(1.5, "'chosen_prob' is 1.5, not a probability"), ("much", "not a finite number")],
    )
    def test_what_is_no_probability_is_refused(self, prob, message) -> None:
        row = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_prob": prob}
        with pytest.raises(DataError, match=message):
            formats.examples([records.Record(row, records.Place("f", 1))], formats.PREFERENCES)
