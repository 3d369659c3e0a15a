"""Token rewards and GAE against loops in NumPy and numbers by hand."""

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
DECAYS = {"gamma": 0.97, "gae_lambda": 0.8}


def gae_of_compressed_row(
    rewards: np.ndarray, values: np.ndarray, gamma: np.ndarray, gae_lambda: float, bootstrap: float
) -> np.ndarray:
    """A_t as the sum of discounted δ, over a row from which masked tokens were cut out."""
    length = len(rewards)
    following = np.append(values, bootstrap)
    deltas = [rewards[t] + gamma[t] * following[t + 1] - values[t] for t in range(length)]
    result = np.zeros(length)
    for t in range(length):
        weight = 1.0
        for s in range(t, length):
            result[t] += weight * deltas[s]
            weight *= gamma[s] * gae_lambda
    return result


def gae_by_loop(
    rewards: np.ndarray,
    values: np.ndarray,
    mask: np.ndarray,
    *,
    gamma: float | np.ndarray,
    gae_lambda: float,
    bootstrap_value: float | np.ndarray = 0.0,
) -> np.ndarray:
    gammas = np.broadcast_to(gamma, rewards.shape)
    bootstraps = np.broadcast_to(bootstrap_value, rewards.shape[:1])
    result = np.zeros(rewards.shape)
    for row, real in enumerate(mask):
        result[row, real] = gae_of_compressed_row(
            rewards[row, real], values[row, real], gammas[row, real], gae_lambda, bootstraps[row]
        )
    return result


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


class TestGae:
    def test_by_hand(self) -> None:
        result, returns = advantages.gae(
            jnp.array([1.0, 2.0]),
            jnp.array([0.5, 1.0]),
            jnp.ones(2, bool),
            gamma=0.5,
            gae_lambda=0.5,
            bootstrap_value=4.0,
        )
        # δ = [1 + 0.5·1 - 0.5, 2 + 0.5·4 - 1] = [1, 3], A_0 = 1 + 0.25·3
        np.testing.assert_allclose(result, [1.75, 3.0])
        np.testing.assert_allclose(returns, [2.25, 4.0])

    def test_masked_tokens_are_skipped(self) -> None:
        result, returns = advantages.gae(REWARDS, VALUES, MASK, **DECAYS)
        expected = gae_by_loop(REWARDS, VALUES, MASK, **DECAYS)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(returns, expected + VALUES * MASK, rtol=1e-5, atol=1e-6)

    def test_discounts_may_differ_by_step_and_bootstraps_by_row(self) -> None:
        gamma = RNG.random((B, T)).astype(np.float32)
        bootstrap = RNG.normal(size=B).astype(np.float32)
        result, _ = advantages.gae(
            REWARDS, VALUES, MASK, gamma=gamma, gae_lambda=0.8, bootstrap_value=bootstrap
        )
        expected = gae_by_loop(
            REWARDS, VALUES, MASK, gamma=gamma, gae_lambda=0.8, bootstrap_value=bootstrap
        )
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)

    def test_without_decay_returns_are_the_rewards_to_go(self) -> None:
        _, returns = advantages.gae(REWARDS, VALUES, np.ones_like(MASK), gamma=1.0, gae_lambda=1.0)
        to_go = np.cumsum(REWARDS[:, ::-1], axis=1)[:, ::-1]
        np.testing.assert_allclose(returns, to_go, rtol=1e-4, atol=1e-5)

    def test_lambda_0_is_the_one_step_error(self) -> None:
        result, _ = advantages.gae(REWARDS, VALUES, np.ones_like(MASK), gamma=0.9, gae_lambda=0.0)
        following = np.append(VALUES[:, 1:], np.zeros((B, 1)), axis=1)
        np.testing.assert_allclose(result, REWARDS + 0.9 * following - VALUES, rtol=1e-5, atol=1e-6)

    def test_zeroing_is_a_composition_in_which_masked_tokens_cost_a_discount(self) -> None:
        result, _ = advantages.gae(REWARDS * MASK, VALUES * MASK, np.ones_like(MASK), **DECAYS)
        expected = gae_by_loop(REWARDS * MASK, VALUES * MASK, np.ones_like(MASK), **DECAYS)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
        skipped, _ = advantages.gae(REWARDS, VALUES, MASK, **DECAYS)
        assert abs(result[2, 0] - skipped[2, 0]) > 1e-3

    @pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
    def test_masked_tokens_are_ignored_to_the_last_bit(self, garbage: float) -> None:
        def total(rewards: jax.Array, values: jax.Array) -> tuple[jax.Array, tuple]:
            result, returns = advantages.gae(rewards, values, MASK, **DECAYS)
            return jnp.sum(result * REWARDS + returns * VALUES), (result, returns)

        differentiated = jax.grad(total, (0, 1), has_aux=True)
        clean = differentiated(np.where(MASK, REWARDS, 0), np.where(MASK, VALUES, 0))
        given = differentiated(np.where(MASK, REWARDS, garbage), np.where(MASK, VALUES, garbage))
        jax.tree.map(np.testing.assert_array_equal, given, clean)
        for array in jax.tree.leaves(given):
            assert (np.asarray(array)[~MASK] == 0).all()

    def test_batched_equals_vmapped_and_any_number_of_axes(self) -> None:
        batched, _ = advantages.gae(REWARDS, VALUES, MASK, **DECAYS)
        rows, _ = jax.vmap(lambda *arrays: advantages.gae(*arrays, **DECAYS))(REWARDS, VALUES, MASK)
        np.testing.assert_allclose(batched, rows, rtol=1e-6, atol=1e-7)
        split = (x.reshape(2, 2, T) for x in (REWARDS, VALUES, MASK))
        deep, _ = advantages.gae(*split, **DECAYS)
        np.testing.assert_allclose(deep.reshape(B, T), batched, rtol=1e-6, atol=1e-7)

    def test_decays_are_traced(self) -> None:
        def of_decays(gamma: jax.Array, gae_lambda: jax.Array) -> jax.Array:
            return advantages.gae(REWARDS, VALUES, MASK, gamma=gamma, gae_lambda=gae_lambda)[0]

        both = jax.jit(jax.vmap(of_decays))(jnp.array([0.97, 1.0]), jnp.array([0.8, 0.5]))
        np.testing.assert_allclose(
            both[0], gae_by_loop(REWARDS, VALUES, MASK, **DECAYS), rtol=1e-5, atol=1e-6
        )

    def test_results_are_float32(self) -> None:
        half = jnp.asarray(REWARDS, jnp.bfloat16)
        for array in advantages.gae(half, half, MASK, **DECAYS):
            assert array.dtype == jnp.float32

    def test_shapes_that_do_not_fit_are_refused(self) -> None:
        with pytest.raises(AssertionError):
            advantages.gae(REWARDS, VALUES[:, :-1], MASK, **DECAYS)
        with pytest.raises(AssertionError):
            advantages.gae(REWARDS, VALUES, MASK.astype(np.float32), **DECAYS)
