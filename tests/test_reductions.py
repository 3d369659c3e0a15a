"""Reductions by hand, over micro-batches, and over packed rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import REDUCTIONS, assert_close

from rlhfjax.losses import reductions
from rlhfjax.types import Reduction

each_reduction = pytest.mark.parametrize(
    "reduce, of_rows", REDUCTIONS.values(), ids=[name.replace(" ", "") for name in REDUCTIONS]
)

# Eight micro-batches of two rows; the third and the last have no token at all.
RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (16, 6)).astype(np.float32)
MASK = RNG.random((16, 6)) < 0.6
MASK[[0, 4, 5, 9, 14, 15]] = False
MICRO_BATCHES = X.reshape(8, 2, 6), MASK.reshape(8, 2, 6)
counting_empty = partial(reductions.num_sequences, count_empty=True)


@pytest.mark.parametrize(
    "reduce, expected",
    [
        (reductions.token_mean, (1 + 2 + 3 + 8) / 4),
        (reductions.sequence_mean, (2 + 8) / 2),
        (partial(reductions.sequence_mean, count_empty=True), (2 + 8) / 3),
        (reductions.sequence_sum, (6 + 8) / 2),
        (partial(reductions.sequence_sum, count_empty=True), (6 + 8) / 3),
        (partial(reductions.constant_length, length=4), (6 / 4 + 8 / 4) / 2),
        (
            partial(reductions.constant_length, length=4, count_empty=True),
            (6 / 4 + 8 / 4) / 3,
        ),
        (partial(reductions.constant_total, total=10), (6 + 8) / 10),
    ],
)
def test_by_hand(reduce: Reduction, expected: float) -> None:
    x = jnp.array([[1.0, 2.0, 3.0], [8.0, np.nan, np.inf], [np.nan, 1e30, 5.0]])
    mask = jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    value, grad = jax.jit(jax.value_and_grad(reduce))(x, mask)
    assert value == pytest.approx(expected)
    assert (np.asarray(grad)[~np.asarray(mask)] == 0).all() and (grad[0] > 0).all()


@each_reduction
def test_by_loop(reduce: Reduction, of_rows: Callable[..., Any]) -> None:
    assert_close(reduce(X, MASK), of_rows([x[mask] for x, mask in zip(X, MASK, strict=True)]))


@each_reduction
def test_nothing_gives_0_and_no_gradient(reduce: Reduction, of_rows: Callable[..., Any]) -> None:
    value, grad = jax.value_and_grad(reduce)(X, np.zeros_like(MASK))
    assert value == 0 and (np.asarray(grad) == 0).all()


@each_reduction
def test_float32_whatever_the_input_and_a_bool_mask_of_its_shape(
    reduce: Reduction, of_rows: Callable[..., Any]
) -> None:
    value = reduce(jnp.ones((16, 6), jnp.bfloat16), MASK)
    assert value.shape == () and value.dtype == jnp.float32
    for wrong in (MASK[:1], MASK.astype(np.float32)):
        with pytest.raises(AssertionError):
            reduce(X, wrong)


@each_reduction
def test_leading_axes_are_sequences(reduce: Reduction, of_rows: Callable[..., Any]) -> None:
    assert_close(reduce(*MICRO_BATCHES), reduce(X, MASK))
    row = [X[1][MASK[1]]]
    assert_close(reduce(X[1], MASK[1]), of_rows(row))


@pytest.mark.parametrize(
    "reduce, weight",
    [
        (reductions.token_mean, reductions.num_tokens),
        (reductions.sequence_mean, reductions.num_sequences),
        (partial(reductions.sequence_mean, count_empty=True), counting_empty),
        (reductions.sequence_sum, reductions.num_sequences),
        (partial(reductions.sequence_sum, count_empty=True), counting_empty),
        (partial(reductions.constant_length, length=4.0), reductions.num_sequences),
        (partial(reductions.constant_length, length=4.0, count_empty=True), counting_empty),
    ],
)
def test_weights_recombine_the_losses_of_micro_batches(
    reduce: Reduction, weight: Callable[[jax.Array], jax.Array]
) -> None:
    def recombined(x: jax.Array, mask: jax.Array) -> jax.Array:
        losses, weights = jax.vmap(reduce)(x, mask), jax.vmap(weight)(mask)
        return jnp.sum(losses * weights) / jnp.sum(weights)

    losses, grads = jax.jit(jax.value_and_grad(recombined))(*MICRO_BATCHES)
    whole, whole_grads = jax.jit(jax.value_and_grad(reduce))(X, MASK)
    assert_close((losses, grads.reshape(X.shape)), (whole, whole_grads), rtol=1e-6, atol=1e-7)


def test_losses_of_micro_batches_with_the_same_total_add_up() -> None:
    reduce = partial(reductions.constant_total, total=50.0)
    assert_close(jax.vmap(reduce)(*MICRO_BATCHES).sum(), reduce(X, MASK), rtol=1e-6)


def test_weights_by_hand() -> None:
    mask = jnp.array([[1, 0, 1], [0, 0, 0], [0, 1, 0]], bool)
    for weight, expected in (
        (reductions.num_tokens, 3),
        (reductions.num_sequences, 2),
        (counting_empty, 3),
    ):
        assert weight(mask) == expected and weight(mask).dtype == jnp.float32
        assert weight(np.asarray(mask[1])) == (weight is counting_empty)
        with pytest.raises(AssertionError):
            weight(mask.astype(jnp.float32))


def test_one_objective_is_the_weighted_sum_of_several() -> None:
    terms, weights = [jnp.float32(2.0), jnp.float32(-1.0)], [0.5, jnp.float32(3.0)]
    value, grads = jax.value_and_grad(reductions.weighted_sum)(terms, weights)
    assert value == -2.0 and grads == [0.5, 3.0]
    of_rows = reductions.weighted_sum([jnp.ones(2), jnp.arange(2.0)], weights)
    np.testing.assert_array_equal(of_rows, [0.5, 3.5])
    assert reductions.weighted_sum([jnp.bfloat16(256.0)], [1.01]) == jnp.float32(258.56)
    with pytest.raises(ValueError):
        reductions.weighted_sum(terms, [1.0])
    with pytest.raises(AssertionError):
        reductions.weighted_sum([jnp.ones(2), jnp.ones(3)], weights)


class TestBySegment:
    # Each packed row holds four of the rows above, in some order, and padding at both ends.
    ORDER = RNG.permutation(16).reshape(4, 4)
    SEGMENTS = np.pad(np.arange(1, 5).repeat(6), (2, 3))[None].repeat(4, axis=0)

    def pack(self, rows: np.ndarray, padding: Any) -> np.ndarray:
        packed = rows[self.ORDER].reshape(4, 24)
        return np.pad(packed, ((0, 0), (2, 3)), constant_values=padding)

    @each_reduction
    def test_packed_rows_are_reduced_like_rows(
        self, reduce: Reduction, of_rows: Callable[..., Any]
    ) -> None:
        """Tokens that are real but belong to no segment do not count."""

        def packed(x: jax.Array) -> jax.Array:
            mask = self.pack(MASK, True)
            return reduce(*reductions.by_segment(x, mask, self.SEGMENTS, num_segments=4))

        value, grad = jax.jit(jax.value_and_grad(packed))(self.pack(X, 1e30))
        expected, of_x = jax.jit(jax.value_and_grad(reduce))(X, MASK)
        assert_close((value, grad), (expected, self.pack(np.asarray(of_x), 0.0)))

    def test_by_hand(self) -> None:
        x, mask = jnp.arange(4.0), jnp.array([1, 1, 0, 1], bool)
        rows, masks = reductions.by_segment(x, mask, jnp.array([1, 3, 1, 0]), num_segments=3)
        np.testing.assert_array_equal(rows, [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
        np.testing.assert_array_equal(masks, [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]])
        assert masks.dtype == bool

    def test_what_does_not_fit_is_refused(self) -> None:
        x, mask, segments = X[:4, :5], MASK[:4, :5], np.ones((4, 5), np.int32)
        for wrong in (
            (x, mask, segments[:1]),
            (x, mask, segments.astype(np.float32)),
            (x, mask.astype(np.float32), segments),
        ):
            with pytest.raises(AssertionError):
                reductions.by_segment(*wrong, num_segments=1)
