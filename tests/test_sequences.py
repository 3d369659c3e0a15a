"""Rows and masks by hand, and against loops over random ones."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import masked, sequences

RNG = np.random.default_rng(0)
L = 6
MASK = np.concatenate([RNG.random((20, L)) < 0.5, np.zeros((1, L), bool), np.ones((1, L), bool)])
TOKENS = RNG.integers(1, 9, MASK.shape).astype(np.int32)


class TestIndices:
    def test_the_first_true_entry_or_the_length_of_the_row(self) -> None:
        expected = [next((t for t in range(L) if row[t]), L) for row in MASK]
        np.testing.assert_array_equal(sequences.first_true(MASK), expected)

    def test_the_last_true_entry_or_minus_1(self) -> None:
        expected = [next((t for t in reversed(range(L)) if row[t]), -1) for row in MASK]
        np.testing.assert_array_equal(sequences.last_true(MASK), expected)

    def test_how_many_are_true(self) -> None:
        np.testing.assert_array_equal(sequences.lengths(MASK), [sum(row) for row in MASK])

    def test_of_rows_without_columns(self) -> None:
        empty = np.zeros((2, 0), bool)
        np.testing.assert_array_equal(sequences.first_true(empty), [0, 0])
        np.testing.assert_array_equal(sequences.last_true(empty), [-1, -1])


class TestMasks:
    def test_of_lengths(self) -> None:
        mask = sequences.mask_of_lengths(jnp.array([0, 2, 4, 9]), size=4)
        np.testing.assert_array_equal(mask, [[0] * 4, [1, 1, 0, 0], [1] * 4, [1] * 4])

    def test_up_to_the_last_index(self) -> None:
        mask = sequences.mask_up_to(jnp.array([-1, 1, 3, 9]), size=4)
        np.testing.assert_array_equal(mask, [[0] * 4, [1, 1, 0, 0], [1] * 4, [1] * 4])

    def test_lengths_and_last_index_of_a_response_give_back_its_mask(self) -> None:
        mask = np.arange(L) < np.arange(L + 1)[:, None]
        by_length = sequences.mask_of_lengths(sequences.lengths(mask), size=L)
        by_last = sequences.mask_up_to(sequences.last_true(mask), size=L)
        np.testing.assert_array_equal(by_length, mask)
        np.testing.assert_array_equal(by_last, mask)

    def test_one_past_the_last_where_there_is_room(self) -> None:
        mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
        expected = [[1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 1, 1], [0, 0, 0, 0]]
        np.testing.assert_array_equal(sequences.one_past(mask), expected)

    def test_causal(self) -> None:
        given = sequences.causal_mask(MASK)
        assert given.shape == (*MASK.shape, L)
        for row, attends in zip(MASK, given, strict=True):
            expected = [[j <= i and row[j] for j in range(L)] for i in range(L)]
            np.testing.assert_array_equal(attends, expected)


class TestTruncate:
    RESPONSES = jnp.array([[5, 9, 3, 2, 7, 2], [2, 4, 4, 0, 0, 0], [6, 7, 8, 9, 4, 5]])

    def test_after_the_first_stop_token(self) -> None:
        tokens, mask, stopped = sequences.truncate(self.RESPONSES, stop_token=2, pad_token=0)
        expected = [[5, 9, 3, 2, 0, 0], [2, 0, 0, 0, 0, 0], [6, 7, 8, 9, 4, 5]]
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_array_equal(mask.sum(-1), [4, 1, 6])
        np.testing.assert_array_equal(stopped, [True, True, False])
        assert tokens.dtype == jnp.int32

    def test_stop_tokens_before_the_start_do_not_count(self) -> None:
        for start, lengths in ((3, [4, 6, 6]), (4, [6, 6, 6])):
            _, mask, stopped = sequences.truncate(
                self.RESPONSES, stop_token=2, pad_token=0, start=start
            )
            np.testing.assert_array_equal(mask.sum(-1), lengths)
            np.testing.assert_array_equal(stopped, [True, False, False])

    def test_any_of_several_stop_tokens(self) -> None:
        _, mask, stopped = sequences.truncate(
            self.RESPONSES, stop_token=jnp.array([2, 9]), pad_token=0
        )
        np.testing.assert_array_equal(mask.sum(-1), [2, 1, 4])
        assert stopped.all()

    def test_a_stop_token_at_the_very_end_counts(self) -> None:
        *_, stopped = sequences.truncate(self.RESPONSES, stop_token=5, pad_token=0, start=5)
        np.testing.assert_array_equal(stopped, [False, False, True])

    def test_the_mask_knows_the_end_where_padding_is_the_stop_token(self) -> None:
        tokens, mask, _ = sequences.truncate(self.RESPONSES, stop_token=2, pad_token=2)
        np.testing.assert_array_equal(tokens[1], [2] * 6)
        np.testing.assert_array_equal(mask[1], [1, 0, 0, 0, 0, 0])

    def test_traced_under_jit_and_vmap(self) -> None:
        def rows(stop: jax.Array, pad: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
            return jax.vmap(
                lambda row: sequences.truncate(row, stop_token=stop, pad_token=pad, start=start)
            )(self.RESPONSES)

        expected = sequences.truncate(self.RESPONSES, stop_token=2, pad_token=1, start=2)
        jax.tree.map(np.testing.assert_array_equal, jax.jit(rows)(2, 1, 2), expected)

    def test_tokens_are_integers(self) -> None:
        with pytest.raises(AssertionError):
            sequences.truncate(jnp.ones((2, 3)), stop_token=2, pad_token=0)


class TestPadding:
    def test_real_tokens_keep_their_order_on_the_right(self) -> None:
        tokens, mask = sequences.pad_left(TOKENS, MASK, pad_value=9)
        for row, real, moved, kept in zip(TOKENS, MASK, tokens, mask, strict=True):
            np.testing.assert_array_equal(moved, [9] * (~real).sum() + [*row[real]])
            np.testing.assert_array_equal(kept, [*real[~real], *real[real]])

    def test_real_tokens_keep_their_order_on_the_left(self) -> None:
        tokens, mask = sequences.pad_right(TOKENS, MASK)
        for row, real, moved, kept in zip(TOKENS, MASK, tokens, mask, strict=True):
            np.testing.assert_array_equal(moved, [*row[real]] + [0] * (~real).sum())
            np.testing.assert_array_equal(kept, [*real[real], *real[~real]])

    def test_there_and_back_again(self) -> None:
        right = sequences.pad_right(TOKENS, MASK)
        again = sequences.pad_right(*sequences.pad_left(*right))
        jax.tree.map(np.testing.assert_array_equal, again, right)

    def test_what_a_token_has_moves_with_it(self) -> None:
        values = jnp.where(MASK, TOKENS + 0.5, jnp.nan).astype(jnp.bfloat16)
        tokens, mask = sequences.pad_left(TOKENS, MASK)
        moved, _ = sequences.pad_left(values, MASK)
        np.testing.assert_array_equal(moved, np.where(mask, tokens + 0.5, 0.0))
        assert (tokens.dtype, moved.dtype) == (jnp.int32, jnp.float32)

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        for move in (sequences.pad_left, sequences.pad_right):
            with pytest.raises(AssertionError):
                move(TOKENS, MASK[:, 1:])
            with pytest.raises(AssertionError):
                move(TOKENS, MASK.astype(np.int32))


class TestHeldPositions:
    def test_padding_holds_the_position_before_it(self) -> None:
        mask = jnp.array([[0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 0], [0] * 6], bool)
        expected = [[0, 0, 0, 1, 2, 2], [0, 0, 0, 1, 1, 1], [0] * 6]
        np.testing.assert_array_equal(sequences.held_positions(mask), expected)

    def test_at_real_tokens_they_are_the_usual_ones(self) -> None:
        held, usual = sequences.held_positions(MASK), masked.positions(MASK)
        np.testing.assert_array_equal(np.asarray(held)[MASK], np.asarray(usual)[MASK])
        assert (held != usual).any()


OF_A_MASK = {
    function.__name__: function
    for function in (
        sequences.first_true,
        sequences.last_true,
        sequences.lengths,
        sequences.one_past,
        sequences.causal_mask,
        sequences.held_positions,
    )
}
each_function = pytest.mark.parametrize("function", OF_A_MASK.values(), ids=OF_A_MASK)


@each_function
def test_batched_equals_vmapped_and_jitted(function: Callable[[jax.Array], jax.Array]) -> None:
    deep = MASK.reshape(2, 11, L)
    expected = function(MASK)
    np.testing.assert_array_equal(jax.jit(jax.vmap(function))(MASK), expected)
    np.testing.assert_array_equal(function(deep).reshape(expected.shape), expected)
    assert expected.dtype in (jnp.int32, jnp.bool_)


@each_function
def test_a_mask_is_a_row_of_bools(function: Callable[[jax.Array], jax.Array]) -> None:
    with pytest.raises(AssertionError):
        function(MASK.astype(np.int32))
    with pytest.raises(AssertionError):
        function(jnp.bool_(True))


@pytest.mark.parametrize("make", [sequences.mask_of_lengths, sequences.mask_up_to])
def test_lengths_and_indices_are_integers(make: Callable[..., jax.Array]) -> None:
    with pytest.raises(AssertionError):
        make(jnp.array([1.0]), size=3)
