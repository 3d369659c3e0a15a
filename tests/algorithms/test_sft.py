"""Language-model training: the loss by hand, what it must not read, and that it falls."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram, chosen, log_softmax

from rlhfjax import models
from rlhfjax.algorithms import sft

RNG = np.random.default_rng(0)
V, B, S = 11, 4, 8
DECODER = models.decoder(models.DecoderConfig(V, S, width=16, num_layers=1, num_heads=2))
TOKENS = RNG.integers(0, V, (B, S)).astype(np.int32)
MASK = np.arange(S) < np.array([8, 5, 2, 0])[:, None]
LOSS_MASK = MASK & (np.arange(S) >= 1) & (RNG.random((B, S)) < 0.8)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 5 * x, jax.jit(DECODER.init)(jax.random.key(0)))


@jax.jit
def loss_and_grads(params, *batch):
    return jax.value_and_grad(sft.loss, has_aux=True)(params, DECODER, *batch)


class TestLoss:
    TABLE = RNG.normal(0, 1, (V, V)).astype(np.float32)

    def of_table(self, tokens, loss_mask, attention_mask):
        arrays = (jnp.asarray(x) for x in (tokens, loss_mask, attention_mask))
        return sft.loss({"table": self.TABLE}, bigram(V), *arrays)

    def test_by_hand(self) -> None:
        log_p = log_softmax(self.TABLE)
        everything = np.ones((1, 3), bool)
        loss, metrics = self.of_table([[3, 1, 2]], everything, everything)
        assert loss == pytest.approx(-(log_p[3, 1] + log_p[1, 2]) / 2, rel=1e-5)
        assert metrics["loss"] == loss
        assert metrics["num_tokens"] == 2
        entropies = -(np.exp(log_p) * log_p).sum(-1)
        assert metrics["entropy"] == pytest.approx((entropies[3] + entropies[1]) / 2, rel=1e-5)

    def test_is_a_mean_over_tokens_of_the_loss_mask_that_are_real(self) -> None:
        loss, metrics = self.of_table(TOKENS, LOSS_MASK | ~MASK, MASK)
        log_p = chosen(log_softmax(self.TABLE)[TOKENS[:, :-1]], TOKENS[:, 1:])
        learned = LOSS_MASK[:, 1:]
        assert loss == pytest.approx(-log_p[learned].mean(), rel=1e-5)
        assert metrics["num_tokens"] == learned.sum()

    def test_names_of_the_metrics(self, params) -> None:
        (_, metrics), _ = loss_and_grads(params, TOKENS, LOSS_MASK, MASK)
        assert set(metrics) == {"loss", "entropy", "num_tokens"}

    def test_nothing_to_learn_is_a_loss_of_0(self) -> None:
        loss, _ = self.of_table(TOKENS, np.zeros_like(MASK), MASK)
        assert loss == 0.0

    def test_masks_of_another_shape_are_refused(self) -> None:
        with pytest.raises(AssertionError):
            self.of_table(TOKENS, LOSS_MASK[:, 1:], MASK)


def test_tokens_at_padding_are_ignored_to_the_last_bit(params) -> None:
    polluted = np.where(MASK, TOKENS, 7)
    assert (polluted != TOKENS).any()
    clean = loss_and_grads(params, TOKENS, LOSS_MASK, MASK)
    assert_same(loss_and_grads(params, polluted, LOSS_MASK, MASK), clean)
    assert np.isfinite(clean[0][0]) and clean[0][0] > 0


def test_rows_that_fill_a_batch_count_nowhere(params) -> None:
    assert not MASK[-1].any()
    filled = loss_and_grads(params, TOKENS, LOSS_MASK, MASK)
    alone = loss_and_grads(params, TOKENS[:-1], LOSS_MASK[:-1], MASK[:-1])
    assert_close(filled, alone, atol=1e-5)


class TestPacked:
    """Rows of 8 with texts of 5 and 3, of 4 and 2, against one text a row."""

    LENGTHS = (5, 3, 4, 2)
    TEXTS = tuple(RNG.integers(0, V, n).astype(np.int32) for n in LENGTHS)
    # The first token of a text is to be learned, but there is nothing to predict it from.
    LEARNED = tuple(np.arange(n) % 3 != 1 for n in LENGTHS)

    def rows(self, *groups):
        tokens, learned = np.full((len(groups), S), 7, np.int32), np.zeros((len(groups), S), bool)
        segments = np.zeros((len(groups), S), np.int32)
        for row, group in enumerate(groups):
            end = 0
            for number, text in enumerate(group, start=1):
                place = slice(end, end := end + self.LENGTHS[text])
                tokens[row, place], learned[row, place] = self.TEXTS[text], self.LEARNED[text]
                segments[row, place] = number
        return tokens, learned, segments > 0, segments

    def test_trains_as_unpacked_in_micro_batches_too(self, params) -> None:
        *plain, _ = self.rows([0], [1], [2], [3])
        packed = self.rows([0, 1], [2, 3], [], [])
        (expected, metrics), grads = loss_and_grads(params, *plain)
        assert metrics["num_tokens"] == sum(learned[1:].sum() for learned in self.LEARNED)
        optimizer = optax.sgd(0.1)
        step = sft.make_step(DECODER, optimizer, num_micro_batches=2)
        state, found = step(sft.init(params, optimizer), *packed)
        assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), atol=1e-6)
        assert_close(found, metrics | {"val/num_skipped": 0}, atol=1e-5)
        # Without segments the texts see each other.
        assert abs(loss_and_grads(params, *packed[:3])[0][0] - expected) > 1e-3


class TestStep:
    def test_learns_texts_by_heart(self, params) -> None:
        optimizer = optax.adam(1e-2)
        step, state = sft.make_step(DECODER, optimizer), sft.init(params, optimizer)
        losses = []
        for _ in range(80):
            state, metrics = step(state, TOKENS, MASK, MASK)
            losses.append(float(metrics["loss"]))
        assert state.step == 80
        assert losses[0] > 2.0
        assert losses[-1] < 0.1 * losses[0]

    def test_is_a_descent_along_the_gradient(self, params) -> None:
        optimizer = optax.sgd(0.1)
        (_, expected_metrics), grads = loss_and_grads(params, TOKENS, LOSS_MASK, MASK)
        state, metrics = sft.make_step(DECODER, optimizer)(
            sft.init(params, optimizer), TOKENS, LOSS_MASK, MASK
        )
        assert_close(state.params, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), atol=1e-6)
        assert_close(metrics, expected_metrics | {"val/num_skipped": 0}, atol=1e-6)

    def test_donates_its_state_but_not_the_parameters_it_started_from(self) -> None:
        model, optimizer = bigram(V), optax.adam(0.1)
        table = jnp.ones((V, V))
        state = sft.init({"table": table}, optimizer)
        sft.make_step(model, optimizer)(state, TOKENS, LOSS_MASK, MASK)
        assert not table.is_deleted()
        with pytest.raises((RuntimeError, ValueError), match="deleted"):
            sft.make_step(model, optimizer)(state, TOKENS, LOSS_MASK, MASK)
