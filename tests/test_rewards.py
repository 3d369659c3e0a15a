"""Scores and rewards against numbers by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import advantages

RNG = np.random.default_rng(0)
B, T = 4, 7
REWARDS, VALUES = RNG.normal(size=(2, B, T)).astype(np.float32)
MASK = np.array(
    [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]],
    bool,
)


class TestTokenRewards:
    def test_by_hand(self) -> None:
        rewards = advantages.token_rewards(
            jnp.array([1.0, 2.0, 3.0]),
            jnp.array([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]]),
            jnp.array([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool),
            kl_coef=0.5,
        )
        expected = [[-0.05, -0.1, 0.85], [1.95, 0, 0], [0, 0, 0]]
        np.testing.assert_allclose(rewards, expected, rtol=1e-6)

    def test_the_score_goes_to_the_last_real_token_whatever_the_gaps(self) -> None:
        scores, zeros = jnp.arange(1.0, 1.0 + B), jnp.zeros((B, T))
        rewards = advantages.token_rewards(scores, zeros, MASK, kl_coef=1.0)
        expected = np.zeros((B, T))
        expected[0, 6], expected[1, 3], expected[2, 6] = 1, 2, 3
        np.testing.assert_array_equal(rewards, expected)

    def test_scores_of_integers_are_not_truncated_together_with_the_penalty(self) -> None:
        rewards = advantages.token_rewards(
            jnp.array([2]), jnp.array([[0.25]]), jnp.ones((1, 1), bool), kl_coef=1.0
        )
        assert rewards.dtype == jnp.float32 and rewards[0, 0] == 1.75

    @pytest.mark.parametrize("garbage", [np.nan, np.inf])
    def test_masked_tokens_and_scores_of_empty_rows_are_not_read(self, garbage: float) -> None:
        scores = np.array([1.0, 2.0, 3.0, garbage], np.float32)
        polluted = np.where(MASK, VALUES, garbage)

        def total(scores: jax.Array, kl: jax.Array) -> tuple[jax.Array, jax.Array]:
            rewards = advantages.token_rewards(scores, kl, MASK, kl_coef=0.1)
            return jnp.sum(rewards * REWARDS), rewards

        grads, rewards = jax.grad(total, (0, 1), has_aux=True)(scores, polluted)
        clean_grads, clean = jax.grad(total, (0, 1), has_aux=True)(
            np.nan_to_num(scores), np.where(MASK, VALUES, 0.0)
        )
        np.testing.assert_array_equal(rewards, clean)
        for grad, clean_grad in zip(grads, clean_grads, strict=True):
            np.testing.assert_array_equal(grad, clean_grad)
        assert (np.asarray(grads[1])[~MASK] == 0).all()

    def test_batched_equals_vmapped_and_the_coefficient_is_traced(self) -> None:
        def of_coefficient(kl_coef: jax.Array) -> jax.Array:
            return advantages.token_rewards(VALUES[:, 0], VALUES, MASK, kl_coef=kl_coef)

        rows = jax.vmap(lambda s, k, m: advantages.token_rewards(s, k, m, kl_coef=0.1))(
            VALUES[:, 0], VALUES, MASK
        )
        np.testing.assert_allclose(of_coefficient(jnp.float32(0.1)), rows, rtol=1e-6)
        both = jax.jit(jax.vmap(of_coefficient))(jnp.array([0.1, 0.2]))
        np.testing.assert_allclose(both[0], rows, rtol=1e-6)

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(AssertionError):
            advantages.token_rewards(jnp.zeros(B + 1), VALUES, MASK, kl_coef=0.1)
        with pytest.raises(AssertionError):
            advantages.token_rewards(jnp.zeros(B), VALUES, MASK.astype(int), kl_coef=0.1)


# Gaps, padding on the left and on the right, one token, no token; where the last True token is.
PLACES = {"1111": 3, "0011": 3, "1010": 2, "0100": 1, "1000": 0, "0000": None}
PLACED = np.array([[mark == "1" for mark in row] for row in PLACES])


def test_a_score_is_placed_at_the_last_real_token_and_spread_over_all_of_them() -> None:
    scores = np.arange(2.0, 8.0, dtype=np.float32)
    expected = np.zeros((6, 4))
    for row, last in enumerate(PLACES.values()):
        if last is not None:
            expected[row, last] = scores[row]
    np.testing.assert_array_equal(advantages.score_at_end(scores, PLACED), expected)
    np.testing.assert_array_equal(advantages.spread(scores, PLACED), PLACED * scores[:, None])
    one_token = advantages.score_at_end(scores, PLACED[:, :1])
    np.testing.assert_array_equal(one_token, (PLACED[:, 0] * scores)[:, None])


@pytest.mark.parametrize("place", [advantages.score_at_end, advantages.spread])
def test_scores_of_any_shape_and_number_are_placed_as_float32(place: Any) -> None:
    deep = place(jnp.arange(6).reshape(2, 3), PLACED.reshape(2, 3, 4))
    assert deep.dtype == jnp.float32
    np.testing.assert_array_equal(deep.reshape(6, 4), place(jnp.arange(6.0), PLACED))
    np.testing.assert_array_equal(place(jnp.float32(5), PLACED[0]).max(), 5)
    grad = jax.grad(lambda scores: place(scores, PLACED).sum())(jnp.full(6, jnp.nan))
    counts = PLACED.sum(-1) if place is advantages.spread else PLACED.any(-1)
    np.testing.assert_array_equal(grad, counts)
    for scores, mask in (
        (jnp.ones(5), PLACED),
        (jnp.ones((6, 1)), PLACED),
        (jnp.ones(6), 1.0 * PLACED),
    ):
        with pytest.raises(AssertionError):
            place(scores, mask)


def test_rewards_of_turns_are_placed_at_the_last_real_token_of_each() -> None:
    turn_ids = jnp.array([[0, 0, 0, 1, 1, 2], [0, 1, 1, 1, 2, 2]])
    mask = jnp.array(
        [[True, True, False, True, True, True], [False, True, False, True, True, False]]
    )
    rewards = jnp.array([[1, 2, 3], [4, 5, 6]])
    given = advantages.at_ends_of_turns(rewards, turn_ids, mask)
    assert given.dtype == jnp.float32
    # The first turn of the second row has no token.
    np.testing.assert_array_equal(given, [[0, 1, 0, 0, 2, 3], [0, 0, 0, 5, 6, 0]])
    missing = jnp.array([[np.nan, 2, 3], [np.nan, 5, 6]])
    given = advantages.at_ends_of_turns(missing, turn_ids, mask)
    np.testing.assert_array_equal(given, [[0, np.nan, 0, 0, 2, 3], [0, 0, 0, 5, 6, 0]])
    one = advantages.at_ends_of_turns(jnp.array([7.0, 8.0]), jnp.zeros(4, int), jnp.ones(4, bool))
    np.testing.assert_array_equal(one, [0, 0, 0, 7])
    for wrong in ((rewards[0], turn_ids, mask), (rewards, turn_ids[:, 1:], mask),
                  (rewards, 1.0 * turn_ids, mask), (rewards, turn_ids, turn_ids)):  # fmt: skip
        with pytest.raises(AssertionError):
            advantages.at_ends_of_turns(*wrong)


def test_the_divergence_is_taken_off_tokens_or_responses() -> None:
    rewards, divergence = jnp.array([1.0, 2.0, np.nan]), jnp.array([0.5, -1.0, np.inf])
    mask = jnp.array([True, True, False])
    given = advantages.penalize_kl(rewards, divergence, mask, kl_coef=0.5)
    np.testing.assert_array_equal(given, [0.75, 2.5, 0])
    by_row = advantages.penalize_kl(
        jnp.ones((2, 2), int),
        jnp.ones((2, 2)),
        jnp.ones((2, 2), bool),
        kl_coef=jnp.array([[0], [3]]),
    )
    np.testing.assert_array_equal(by_row, [[1, 1], [-2, -2]])
    with pytest.raises(AssertionError):
        advantages.penalize_kl(rewards, divergence[:2], mask, kl_coef=0.5)


def test_bounded_scores() -> None:
    scores = jnp.array([-jnp.inf, -3, -1, 0.5, 2, 3, jnp.inf, jnp.nan])
    given = advantages.bound_scores(scores, low=-1.0, high=2.0)
    np.testing.assert_array_equal(given, [-1, -1, -1, 0.5, 2, 2, 2, np.nan])
    assert advantages.bound_scores(jnp.array([7]), low=-1, high=2.5) == 2.5


def test_scores_are_combined_where_they_were_given() -> None:
    scores = jnp.array([[1.0, 2.0, 3.0], [4.0, np.nan, -1.0], [np.inf, np.nan, -np.inf]])
    given = jnp.array([[1, 1, 1], [1, 0, 1], [0, 0, 0]], bool)
    weights = jnp.array([1.0, 0.5, -2.0])
    combined, back = jax.vjp(
        lambda scores, weights: advantages.combine_scores(scores, given, weights=weights),
        scores,
        weights,
    )
    np.testing.assert_array_equal(combined, [-4, 6, 0])
    to_scores, to_weights = back(jnp.ones(3))
    np.testing.assert_array_equal(to_scores, given * weights)
    np.testing.assert_array_equal(to_weights, [5, 2, 2])
    for wrong in (weights[:2], weights[None]):
        with pytest.raises(AssertionError):
            advantages.combine_scores(scores, given, weights=wrong)


LENGTHS = np.array([0, 5, 6, 7, 9, 10, 12])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0, 0, 0, -0.25, -0.75, -1, -1]),
        ({"factor": 0.5}, [0, 0, 0, -0.125, -0.375, -0.5, -0.5]),
        ({"floor": -0.5}, [0, 0, 0, -0.25, -0.5, -0.5, -0.5]),
        ({"factor": 2.0, "floor": None}, [0, 0, 0, -0.5, -1.5, -2, -3]),
        ({"buffer": 0}, [0, 0, 0, 0, 0, 0, -1]),
        ({"buffer": 10}, [0, -0.5, -0.6, -0.7, -0.9, -1, -1]),
    ],
)
def test_responses_are_penalised_linearly_through_the_buffer(
    options: dict[str, Any], expected: list[float]
) -> None:
    given = advantages.overlong_penalty(LENGTHS, **{"max_length": 10, "buffer": 4, **options})
    np.testing.assert_allclose(given, expected, rtol=1e-6)
    assert given.dtype == jnp.float32


def test_a_response_that_did_not_end_loses_the_penalty() -> None:
    ended = jnp.array([True, False, True])
    given = advantages.penalize_missing_end(jnp.array([1, 2, -3]), ended, penalty=1.5)
    np.testing.assert_array_equal(given, [1, 0.5, -3])
    excluded = advantages.penalize_missing_end(jnp.ones(3), ended, penalty=jnp.inf)
    np.testing.assert_array_equal(excluded, [1, -np.inf, 1])
    for wrong in (ended[:2], ended.astype(int)):
        with pytest.raises(AssertionError):
            advantages.penalize_missing_end(jnp.ones(3), wrong, penalty=1.0)
