"""Reward models: each objective by hand, what it must not read, and that the loss falls."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram

from rlhfjax import models
from rlhfjax.algorithms import reward_model
from rlhfjax.types import LabelledBatch, PreferenceBatch, Rollout

RNG = np.random.default_rng(0)
V, B, S = 11, 5, 7
DECODER = models.decoder(models.DecoderConfig(V, S, width=16, num_layers=1, num_heads=2))
MODEL = models.scalar_model(DECODER, models.linear_head(16, stddev=0.3))
CHOSEN, REJECTED = RNG.integers(0, V, (2, B, S)).astype(np.int32)
# The fourth pair lacks one side and the fifth both.
CHOSEN_MASK = np.arange(S) < np.array([7, 3, 5, 4, 0])[:, None]
REJECTED_MASK = np.arange(S) < np.array([2, 6, 5, 0, 0])[:, None]
NONE = CHOSEN[:, :0], CHOSEN_MASK[:, :0]
BATCH = PreferenceBatch(*NONE, CHOSEN, CHOSEN_MASK, REJECTED, REJECTED_MASK)
NAMES = {"loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"}


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 5 * x, jax.jit(MODEL.init)(jax.random.key(0)))


@jax.jit
def loss_and_grads(params, batch):
    return jax.value_and_grad(reward_model.loss, has_aux=True)(params, MODEL, batch)


def rows(batch: PreferenceBatch, count: int, first: int = 0) -> PreferenceBatch:
    return jax.tree.map(lambda x: x[first : first + count], batch)


class TestLoss:
    def test_by_hand(self) -> None:
        table = RNG.normal(0, 1, (V, V)).astype(np.float32)
        kernel, bias = RNG.normal(0, 1, V).astype(np.float32), np.float32(0.3)
        model = models.scalar_model(bigram(V), models.linear_head(V, stddev=1.0))
        params = {"backbone": {"table": table}, "head": {"kernel": kernel, "bias": bias}}
        loss, metrics = reward_model.loss(params, model, jax.tree.map(jnp.asarray, BATCH))

        of_token = table.astype(np.float64) @ kernel + bias
        chosen = of_token[CHOSEN[[0, 1, 2], [6, 2, 4]]]
        rejected = of_token[REJECTED[[0, 1, 2], [1, 5, 4]]]
        every = np.concatenate([chosen, rejected])
        expected = {
            "loss": np.log1p(np.exp(rejected - chosen)).mean(),
            "accuracy": (chosen > rejected).mean(),
            "margin": (chosen - rejected).mean(),
            "min_reward": every.min(),
            "mean_reward": every.mean(),
            "max_reward": every.max(),
        }
        assert loss == metrics["loss"]
        assert set(metrics) == NAMES
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name

    def test_tokens_at_padding_are_ignored_to_the_last_bit(self, params) -> None:
        polluted = replace(
            BATCH,
            chosen=np.where(CHOSEN_MASK, CHOSEN, 3),
            rejected=np.where(REJECTED_MASK, REJECTED, 3),
        )
        clean = loss_and_grads(params, BATCH)
        assert_same(loss_and_grads(params, polluted), clean)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))

    def test_what_is_no_pair_counts_nowhere(self, params) -> None:
        filled, alone = loss_and_grads(params, BATCH), loss_and_grads(params, rows(BATCH, 3))
        assert_close(filled, alone, atol=1e-5)

    def test_prompts_stand_before_both_responses(self, params) -> None:
        cut = 2
        split = PreferenceBatch(
            *(x[:3, :cut] for x in (CHOSEN, CHOSEN_MASK)),
            *(x[:3, cut:] for x in (CHOSEN, CHOSEN_MASK, REJECTED, REJECTED_MASK)),
        )
        rejected = np.concatenate([CHOSEN[:3, :cut], REJECTED[:3, cut:]], axis=1)
        mask = np.concatenate([CHOSEN_MASK[:3, :cut], REJECTED_MASK[:3, cut:]], axis=1)
        whole = PreferenceBatch(*(x[:3] for x in NONE), CHOSEN[:3], CHOSEN_MASK[:3], rejected, mask)
        assert_close(
            loss_and_grads(params, rows(split, 2, first=1)),
            loss_and_grads(params, rows(whole, 2, first=1)),
            atol=1e-5,
        )

    def test_a_soft_label_is_both_orders(self, params) -> None:
        batch = rows(BATCH, 3)
        swapped = replace(
            batch,
            chosen=batch.rejected,
            chosen_mask=batch.rejected_mask,
            rejected=batch.chosen,
            rejected_mask=batch.chosen_mask,
        )
        probs = np.float32([0.9, 0.5, 0.2])
        soft = loss_and_grads(params, replace(batch, chosen_probs=probs))[0][0]
        each = [
            [loss_and_grads(params, rows(side, 1, first=i))[0][0] for i in range(3)]
            for side in (batch, swapped)
        ]
        expected = np.mean(probs * np.array(each[0]) + (1 - probs) * np.array(each[1]))
        assert soft == pytest.approx(expected, rel=1e-5)

    def test_equal_texts_are_a_coin_toss(self, params) -> None:
        same = PreferenceBatch(*NONE, CHOSEN, CHOSEN_MASK, CHOSEN, CHOSEN_MASK)
        (loss, metrics), _ = loss_and_grads(params, same)
        assert loss == pytest.approx(np.log(2), rel=1e-6)
        assert metrics["margin"] == 0.0


def test_the_score_is_read_at_the_last_real_token_whichever_side_is_padded(params) -> None:
    text = CHOSEN[0, :4]
    right, left = np.full((2, 1, S), 9, np.int32)
    right[0, :4] = left[0, -4:] = text
    places = np.arange(S)[None]
    score = jax.jit(reward_model.score, static_argnums=0, static_argnames="first")
    scores = [
        score(MODEL, params, right, places < 4),
        score(MODEL, params, right, places < 4, first=2),
        score(MODEL, params, left, places >= S - 4),
        score(MODEL, params, text[None], np.ones((1, 4), bool)),
    ]
    np.testing.assert_allclose(scores, scores[3][None].repeat(4, 0), rtol=1e-4, atol=1e-5)
    assert abs(scores[0][0] - score(MODEL, params, right, places < 3)[0]) > 1e-3


class TestStep:
    def test_learns_which_ending_is_preferred(self, params) -> None:
        optimizer = optax.adam(3e-3)
        step, state = reward_model.make_step(MODEL, optimizer), reward_model.init(params, optimizer)

        def batch(seed: int) -> PreferenceBatch:
            rng = np.random.default_rng(seed)
            texts = rng.integers(5, V, (2, 16, S)).astype(np.int32)
            ends = rng.integers(3, S, (2, 16))
            for side, token in ((0, 3), (1, 4)):
                texts[side, np.arange(16), ends[side] - 1] = token
            mask = np.arange(S) < ends[..., None]
            none = texts[0, :, :0], mask[0, :, :0]
            return PreferenceBatch(*none, texts[0], mask[0], texts[1], mask[1])

        losses = []
        for seed in range(60):
            state, metrics = step(state, batch(seed))
            losses.append(float(metrics["loss"]))
        assert losses[0] > 0.4
        assert losses[-1] < 0.2
        assert metrics["accuracy"] == 1.0
        assert state.step == 60

    def test_is_a_descent_along_the_gradient(self, params) -> None:
        optimizer = optax.sgd(0.1)
        (_, expected_metrics), grads = loss_and_grads(params, BATCH)
        state, metrics = reward_model.make_step(MODEL, optimizer)(
            reward_model.init(params, optimizer), BATCH
        )
        assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), atol=1e-6)
        assert_close(metrics, expected_metrics | {"val/num_skipped": 0}, atol=1e-6)


K = 3
TABLE = models.scalar_model(bigram(V), models.linear_head(V, stddev=1.0))
NUMBERS = RNG.normal(0, 1, V).astype(np.float32)
# The score of a text is the number of its last token.
SCORES = {
    "backbone": {"table": np.eye(V, dtype=np.float32)},
    "head": {"kernel": NUMBERS, "bias": np.float32(0.0)},
}
RESPONSES = RNG.integers(0, V, (B, K, S)).astype(np.int32)
# The third row lacks a response, the fourth has a single one and the last none.
LENGTHS = np.array([[1, 3, 7], [2, 2, 4], [5, 0, 1], [0, 6, 0], [0, 0, 0]])
RESPONSE_MASK = np.arange(S) < LENGTHS[..., None]
REAL = LENGTHS > 0
# In any order, and with a tie in the second row.
LABELS = np.array([[1, 2, 0], [2, 0, 2], [1, 1, 0], [0, 0, 0], [2, 1, 0]], np.int32)
PROMPTS = RNG.integers(0, V, (B, 2)).astype(np.int32), np.ones((B, 2), bool)
LABELLED = LabelledBatch(*PROMPTS, RESPONSES, RESPONSE_MASK, LABELS)
LAST = np.take_along_axis(RESPONSES, np.maximum(LENGTHS - 1, 0)[..., None], 2)[..., 0]
THRESHOLDS = (-0.4, 0.9)

Row = list[tuple[float, int]]


def rows_of(numbers: np.ndarray) -> list[Row]:
    """Score and label of the responses to each prompt, in float64."""
    return [
        [(float(numbers[LAST[i, k]]), int(LABELS[i, k])) for k in range(K) if REAL[i, k]]
        for i in range(B)
    ]


def rankings_by_loop(rows: list[Row]) -> float:
    def of(row: Row) -> list[float]:
        pairs = [(s, t) for (s, a), (t, b) in permutations(row, 2) if a > b]
        return [np.log1p(np.exp(t - s)) for s, t in pairs]

    return float(np.mean([np.mean(of(row)) for row in rows if of(row)]))


def plackett_luce_by_loop(rows: list[Row]) -> float:
    losses = []
    for row in rows:
        rest = sorted(row, key=lambda pair: -pair[1])
        if len(row) < 2 or len({label for _, label in row}) < len(row):
            continue
        losses.append(0.0)
        while rest:
            losses[-1] -= rest[0][0] - np.log(sum(np.exp(score) for score, _ in rest))
            rest = rest[1:]
    return float(np.mean(losses))


def ratings_by_loop(rows: list[Row]) -> float:
    return float(np.mean([(label - score) ** 2 for row in rows for score, label in row]))


def levels_by_loop(rows: list[Row], thresholds: tuple[float, ...] = THRESHOLDS) -> float:
    def up_to(level: int, score: float) -> float:
        inner = dict(enumerate(1 / (1 + np.exp(score - np.array(thresholds)))))
        return {-1: 0.0, len(thresholds): 1.0, **inner}[level]

    every = [(up_to(k, s) - up_to(k - 1, s)) for row in rows for s, k in row]
    return float(-np.log(every).mean())


OBJECTIVES: dict[str, tuple[reward_model.Objective, Callable[..., float]]] = {
    "rankings": (reward_model.rankings, rankings_by_loop),
    "plackett_luce": (reward_model.plackett_luce, plackett_luce_by_loop),
    "ratings": (reward_model.ratings, ratings_by_loop),
    "levels": (partial(reward_model.levels, thresholds=THRESHOLDS), levels_by_loop),
}


@cache
def compiled(name: str) -> Callable[..., Any]:
    of = partial(reward_model.loss, objective=OBJECTIVES[name][0])
    return jax.jit(jax.value_and_grad(lambda params, batch: of(params, TABLE, batch), has_aux=True))


@pytest.mark.parametrize("name", OBJECTIVES)
class TestObjectives:
    def test_are_those_of_a_loop_over_responses(self, name: str) -> None:
        (loss, metrics), _ = compiled(name)(SCORES, LABELLED)
        rows = rows_of(NUMBERS.astype(np.float64))
        scores = [score for row in rows for score, _ in row]
        assert loss == metrics["loss"] == pytest.approx(OBJECTIVES[name][1](rows), rel=1e-5)
        assert metrics["min_reward"] == pytest.approx(min(scores), rel=1e-6)
        assert metrics["mean_reward"] == pytest.approx(np.mean(scores), rel=1e-5)
        assert metrics["max_reward"] == pytest.approx(max(scores), rel=1e-6)
        of_pairs = {"rankings": {"accuracy", "margin"}, "ratings": set()}
        assert set(metrics) == (NAMES - {"accuracy", "margin"}) | of_pairs.get(name, {"accuracy"})

    def test_have_the_gradient_of_their_loss(self, name: str) -> None:
        _, grads = compiled(name)(SCORES, LABELLED)
        numbers, slopes = NUMBERS.astype(np.float64), np.zeros(V)
        for token in range(V):
            step = 1e-5 * (np.arange(V) == token)
            ahead, behind = (OBJECTIVES[name][1](rows_of(numbers + s)) for s in (step, -step))
            slopes[token] = (ahead - behind) / 2e-5
        np.testing.assert_allclose(grads["head"]["kernel"], slopes, rtol=1e-4, atol=1e-6)
        assert np.abs(slopes).max() > 1e-2

    def test_read_nothing_where_there_is_no_response(self, name: str) -> None:
        batch = replace(LABELLED, labels=LABELS.astype(np.float32))
        polluted = replace(
            batch,
            prompts=np.where(REAL.any(1, keepdims=True), PROMPTS[0], 4),
            responses=np.where(RESPONSE_MASK, RESPONSES, 4),
            labels=np.where(REAL, batch.labels, np.nan),
        )
        assert_same(compiled(name)(SCORES, polluted), compiled(name)(SCORES, batch))

    def test_of_nothing_are_0(self, name: str) -> None:
        nothing = replace(LABELLED, response_mask=np.zeros_like(RESPONSE_MASK))
        (loss, metrics), grads = compiled(name)(SCORES, nothing)
        assert loss == metrics["mean_reward"] == 0.0
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_a_ranking_of_two_is_a_pair() -> None:
    two = LabelledBatch(*PROMPTS, RESPONSES[:, :2], RESPONSE_MASK[:, :2], -np.tile([0, 1], (B, 1)))
    sides = [x[:, k] for k in range(2) for x in (RESPONSES, RESPONSE_MASK)]
    (loss, metrics), _ = compiled("rankings")(SCORES, two)
    of_pairs = jax.jit(reward_model.loss, static_argnums=1)
    expected, known = of_pairs(SCORES, TABLE, PreferenceBatch(*PROMPTS, *sides))
    names = ("accuracy", "margin")
    assert_close((loss, *map(metrics.get, names)), (expected, *map(known.get, names)), atol=1e-6)
    assert known["margin"] != 0


class TestLevels:
    def loss(self, score: Any, level: int, **options: Any) -> Any:
        batch = LabelledBatch(*[np.ones((1, 1, 1), bool)] * 4, labels=np.full((1, 1), level))
        return reward_model.levels(jnp.reshape(score, (1, 1)), batch, **options)[0]

    def test_of_two_the_score_is_the_log_odds_of_the_better_one(self) -> None:
        for score in (-1.3, 0.0, 2.1):
            assert self.loss(score, 1) == pytest.approx(np.log1p(np.exp(-score)), rel=1e-5)
            assert self.loss(score, 0) == pytest.approx(np.log1p(np.exp(score)), rel=1e-5)

    def test_a_score_of_0_knows_how_many_there_are_of_each(self) -> None:
        counts = [5, 0, 40, 3]
        thresholds = reward_model.level_thresholds(counts)
        shares = [float(np.exp(-self.loss(0.0, k, thresholds=thresholds))) for k in range(4)]
        np.testing.assert_allclose(shares, [5.5 / 50, 0.5 / 50, 40.5 / 50, 3.5 / 50], rtol=1e-5)

    def test_where_scores_can_tell_nothing_0_is_the_best(self) -> None:
        counts = np.array([5e5, 1e5, 4e5])
        thresholds = reward_model.level_thresholds(counts)
        slopes = [jax.grad(self.loss)(0.0, k, thresholds=thresholds) for k in range(3)]
        assert counts @ np.array(slopes) / counts.sum() == pytest.approx(0.0, abs=1e-5)
        assert slopes[0] > 0.1
        assert slopes[2] < -0.1


@pytest.mark.parametrize("name", ["rankings", "ratings"])
def test_a_step_in_micro_batches_is_a_descent_along_the_gradient(name: str) -> None:
    optimizer = optax.sgd(0.1)
    objective = OBJECTIVES[name][0]
    step = reward_model.make_step(TABLE, optimizer, objective=objective, num_micro_batches=5)
    state, metrics = step(reward_model.init(SCORES, optimizer), LABELLED)
    (_, expected), grads = compiled(name)(SCORES, LABELLED)
    assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, SCORES, grads), atol=1e-6)
    assert_close(metrics, expected | {"val/num_skipped": 0}, atol=1e-6)


class TestAsAReward:
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
        scores = reward_model.as_reward(scorer, self.POLICY)(params, samples)
        whole = reward_model.score(scorer, params, samples.tokens, samples.attention_mask)
        assert_same(scores, whole)
        assert len(set(scores.tolist())) == 3

    def test_must_have_the_policys_vocabulary(self) -> None:
        with pytest.raises(ValueError, match=r"vocabulary of 5 .* one of 4: "):
            reward_model.as_reward(self.scorer(vocab_size=4), self.POLICY)

    def test_must_be_able_to_read_that_far(self) -> None:
        scorer = self.scorer(context_length=7)
        reward = reward_model.as_reward(scorer, self.POLICY)
        params = scorer.init(jax.random.key(0))
        assert reward(params, self.samples(7)).shape == (3,)
        with pytest.raises(ValueError, match=r"sequences of 8 tokens.* context of 7"):
            reward(params, self.samples(8))

    def test_of_which_nothing_is_known_is_taken_at_its_word(self) -> None:
        scorer = self.scorer()._replace(vocab_size=None, context_length=None)
        params = scorer.init(jax.random.key(0))
        assert reward_model.as_reward(scorer, self.POLICY)(params, self.samples(9)).shape == (3,)
