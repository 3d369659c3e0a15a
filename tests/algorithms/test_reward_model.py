"""Reward models: the Bradley-Terry loss by hand, what it must not read, and that it falls."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram

from rlhfjax import models
from rlhfjax.algorithms import reward_model
from rlhfjax.types import PreferenceBatch

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
