"""Returns and advantages of token rewards against loops in NumPy and numbers by hand."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import advantages

RNG = np.random.default_rng(0)
MASK = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 0, 0, 0],
    ],
    bool,
)
B, T = MASK.shape
REWARDS, VALUES, NEXT_VALUES = RNG.normal(size=(3, B, T)).astype(np.float32)
BOOTSTRAPS = RNG.normal(size=B).astype(np.float32)
DECAYS = {"gamma": 0.97, "gae_lambda": 0.8}
# By step, and 0 where an episode ends.
GAMMAS = (RNG.random((B, T)) * (RNG.random((B, T)) < 0.8)).astype(np.float32)
LAMBDAS = RNG.random((B, T)).astype(np.float32)
each_gamma = pytest.mark.parametrize(
    "gamma", [0.0, 0.97, 1.0, GAMMAS, GAMMAS[0]], ids=["0", "0.97", "1", "of tokens", "of steps"]
)

n_step_returns = jax.jit(advantages.n_step_returns, static_argnames="num_steps")
discounted_returns, lambda_returns, gae = map(
    jax.jit, (advantages.discounted_returns, advantages.lambda_returns, advantages.gae)
)


def by_rows(of_row: Callable[..., list[float]], *arrays: np.ndarray | float) -> np.ndarray:
    """A function of real tokens alone, applied to rows from which masked tokens were cut out."""
    result = np.zeros((B, T))
    whole = [np.broadcast_to(np.asarray(x, np.float64), (B, T)) for x in arrays]
    for row, real in enumerate(MASK):
        result[row, real] = of_row(*(x[row, real] for x in whole))
    return result


def n_steps(
    rewards: np.ndarray, next_values: np.ndarray, gammas: np.ndarray, num_steps: int, start: int
) -> float:
    """Σ_{k<n} (Π γ)·r + (Π γ)·V behind the last of n steps, or of as many as there are."""
    discount, total = 1.0, 0.0
    for at in range(start, min(start + num_steps, len(rewards))):
        total += discount * rewards[at]
        discount *= gammas[at]
    return total + discount * next_values[at]


def n_steps_of_row(num_steps: int, *arrays: np.ndarray) -> list[float]:
    return [n_steps(*arrays, num_steps, start) for start in range(len(arrays[0]))]


def mixture_of_row(
    rewards: np.ndarray, next_values: np.ndarray, gammas: np.ndarray, lambdas: np.ndarray
) -> list[float]:
    """The forward view: n-step returns weighted by the chance to go on n - 1 times and stop."""
    mixed = []
    for start in range(len(rewards)):
        total, going_on = 0.0, 1.0
        for steps in range(1, len(rewards) - start + 1):
            stopping = 1.0 if start + steps == len(rewards) else 1 - lambdas[start + steps - 1]
            total += going_on * stopping * n_steps(rewards, next_values, gammas, steps, start)
            going_on *= lambdas[start + steps - 1]
        mixed.append(total)
    return mixed


def values_behind(values: np.ndarray, bootstraps: np.ndarray) -> np.ndarray:
    """At each real token the value of the next one, at the last the bootstrap."""
    behind = np.zeros((B, T), np.float32)
    for row, real in enumerate(MASK):
        if real.any():
            behind[row, real] = [*values[row, real][1:], bootstraps[row]]
    return behind


def close(given: jax.Array, expected: np.ndarray) -> None:
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, expected, rtol=2e-5, atol=2e-6)


class TestReturns:
    @each_gamma
    def test_n_step_returns(self, gamma: float | np.ndarray) -> None:
        for num_steps in (1, 2, 3, T):
            given = n_step_returns(REWARDS, NEXT_VALUES, MASK, gamma=gamma, num_steps=num_steps)
            expected = by_rows(partial(n_steps_of_row, num_steps), REWARDS, NEXT_VALUES, gamma)
            close(given, expected)

    @each_gamma
    def test_discounted_returns(self, gamma: float | np.ndarray) -> None:
        for bootstrap in (np.float32(0), BOOTSTRAPS):
            given = discounted_returns(REWARDS, MASK, gamma=gamma, bootstrap_value=bootstrap)
            last = np.broadcast_to(bootstrap, B)[:, None]
            close(given, by_rows(partial(n_steps_of_row, T), REWARDS, last, gamma))

    @each_gamma
    @pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0, LAMBDAS])
    def test_lambda_returns(
        self, gamma: float | np.ndarray, gae_lambda: float | np.ndarray
    ) -> None:
        given = lambda_returns(REWARDS, NEXT_VALUES, MASK, gamma=gamma, gae_lambda=gae_lambda)
        close(given, by_rows(mixture_of_row, REWARDS, NEXT_VALUES, gamma, gae_lambda))

    def test_by_hand(self) -> None:
        rewards, values = jnp.array([1.0, 9.0, 2.0]), jnp.array([3.0, 9.0, 4.0])
        mask = jnp.array([True, False, True])
        given = advantages.discounted_returns(rewards, mask, gamma=0.5, bootstrap_value=4.0)
        np.testing.assert_array_equal(given, [1 + 0.5 * (2 + 0.5 * 4), 0, 2 + 0.5 * 4])
        given = advantages.lambda_returns(rewards, values, mask, gamma=0.5, gae_lambda=0.25)
        np.testing.assert_array_equal(given, [1 + 0.5 * (0.75 * 3 + 0.25 * 4), 0, 4])
        given = advantages.n_step_returns(rewards, values, mask, gamma=0.5, num_steps=1)
        np.testing.assert_array_equal(given, [1 + 0.5 * 3, 0, 2 + 0.5 * 4])

    def test_a_discount_of_0_separates_episodes(self) -> None:
        gamma = np.full((B, T), 0.9, np.float32)
        gamma[:, 2] = 0
        together = discounted_returns(REWARDS, np.ones_like(MASK), gamma=gamma)
        alone = advantages.discounted_returns(REWARDS[:, :3], np.ones((B, 3), bool), gamma=0.9)
        np.testing.assert_allclose(together[:, :3], alone, rtol=1e-5, atol=1e-6)

    @each_gamma
    def test_more_steps_than_tokens_are_the_discounted_return(
        self, gamma: float | np.ndarray
    ) -> None:
        last = np.broadcast_to(BOOTSTRAPS[:, None], (B, T))
        expected = discounted_returns(REWARDS, MASK, gamma=gamma, bootstrap_value=BOOTSTRAPS)
        for num_steps in (T, 10**9):
            close(n_step_returns(REWARDS, last, MASK, gamma=gamma, num_steps=num_steps), expected)
        close(lambda_returns(REWARDS, last, MASK, gamma=gamma, gae_lambda=1.0), expected)

    @each_gamma
    def test_one_step_and_lambda_0_are_the_td_target(self, gamma: float | np.ndarray) -> None:
        target = np.where(MASK, REWARDS + gamma * NEXT_VALUES, 0)
        close(n_step_returns(REWARDS, NEXT_VALUES, MASK, gamma=gamma, num_steps=1), target)
        close(lambda_returns(REWARDS, NEXT_VALUES, MASK, gamma=gamma, gae_lambda=0.0), target)

    def test_a_single_token(self) -> None:
        reward, value, real = jnp.array([2.0]), jnp.array([10.0]), jnp.array([True])
        for returns in (
            advantages.discounted_returns(reward, real, gamma=0.5, bootstrap_value=10.0),
            advantages.lambda_returns(reward, value, real, gamma=0.5, gae_lambda=0.3),
            advantages.n_step_returns(reward, value, real, gamma=0.5, num_steps=3),
        ):
            np.testing.assert_array_equal(returns, [7.0])

    def test_no_steps_are_refused(self) -> None:
        with pytest.raises(ValueError, match="num_steps=0"):
            advantages.n_step_returns(REWARDS, VALUES, MASK, gamma=1.0, num_steps=0)


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
        assert abs(result[2, 3] - skipped[2, 3]) > 1e-2

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
        split = (x.reshape(2, 3, T) for x in (REWARDS, VALUES, MASK))
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

    @each_gamma
    @pytest.mark.parametrize("gae_lambda", [0.0, 0.8, 1.0, LAMBDAS])
    def test_its_returns_are_the_lambda_returns(
        self, gamma: float | np.ndarray, gae_lambda: float | np.ndarray
    ) -> None:
        decays = {"gamma": gamma, "gae_lambda": gae_lambda}
        result, returns = gae(REWARDS, VALUES, MASK, **decays, bootstrap_value=BOOTSTRAPS)
        behind = values_behind(VALUES, BOOTSTRAPS)
        close(returns, by_rows(mixture_of_row, REWARDS, behind, gamma, gae_lambda))
        close(returns, lambda_returns(REWARDS, behind, MASK, **decays))
        close(result, (returns - VALUES) * MASK)
        close(advantages.value_targets(result, VALUES) * MASK, returns)

    def test_without_decay_it_is_the_return_less_the_value(self) -> None:
        given, _ = gae(REWARDS, VALUES, MASK, gamma=1.0, gae_lambda=1.0, bootstrap_value=BOOTSTRAPS)
        returns = discounted_returns(REWARDS, MASK, gamma=1.0, bootstrap_value=BOOTSTRAPS)
        close(given, np.where(MASK, returns - VALUES, 0))

    def test_lambda_0_is_the_error_of_the_td_target(self) -> None:
        given, _ = gae(
            REWARDS, VALUES, MASK, gamma=GAMMAS, gae_lambda=0.0, bootstrap_value=BOOTSTRAPS
        )
        behind = values_behind(VALUES, BOOTSTRAPS)
        target = n_step_returns(REWARDS, behind, MASK, gamma=GAMMAS, num_steps=1)
        close(given, np.where(MASK, target - VALUES, 0))

    def test_exact_values_leave_no_advantage(self) -> None:
        exact = discounted_returns(REWARDS, MASK, gamma=0.9, bootstrap_value=BOOTSTRAPS)
        given, returns = gae(
            REWARDS, exact, MASK, gamma=0.9, gae_lambda=0.7, bootstrap_value=BOOTSTRAPS
        )
        np.testing.assert_allclose(given, np.zeros((B, T)), atol=1e-6)
        close(returns, exact)


RETURNS: dict[str, Callable[..., jax.Array]] = {
    "discounted": lambda r, v, mask, gamma: advantages.discounted_returns(r, mask, gamma=gamma),
    "lambda": lambda r, v, mask, gamma: advantages.lambda_returns(
        r, v, mask, gamma=gamma, gae_lambda=gamma
    ),
    "n steps": lambda r, v, mask, gamma: advantages.n_step_returns(
        r, v, mask, gamma=gamma, num_steps=3
    ),
    "gae": lambda r, v, mask, gamma: advantages.gae(r, v, mask, gamma=gamma, gae_lambda=gamma)[0],
}
each_return = pytest.mark.parametrize("returns", RETURNS.values(), ids=RETURNS)


@each_return
def test_discounts_of_masked_steps_are_not_read(returns: Callable[..., jax.Array]) -> None:
    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        rewards, values, gamma = arrays
        result = returns(rewards, values, MASK, gamma)
        return jnp.sum(result * jnp.cos(jnp.arange(T))), result

    differentiated = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
    clean = differentiated(REWARDS, VALUES, np.where(MASK, LAMBDAS, 0))
    for garbage in (np.nan, np.inf, 1e30):
        given = differentiated(REWARDS, VALUES, np.where(MASK, LAMBDAS, np.float32(garbage)))
        jax.tree.map(np.testing.assert_array_equal, given, clean)


@each_return
def test_arrays_without_time_or_that_do_not_fit_are_refused(
    returns: Callable[..., jax.Array],
) -> None:
    for rewards, values, mask in (
        (REWARDS[0, 0], VALUES[0, 0], MASK[0, 0]),
        (REWARDS, VALUES, MASK[:, 1:]),
        (REWARDS, VALUES, MASK.astype(np.float32)),
        (REWARDS, VALUES, MASK.astype(int)),
    ):
        with pytest.raises(AssertionError):
            returns(rewards, values, jnp.asarray(mask), 0.9)


@each_return
def test_nothing_real_gives_0(returns: Callable[..., jax.Array]) -> None:
    np.testing.assert_array_equal(returns(REWARDS, VALUES, MASK & False, 0.9), np.zeros((B, T)))


def test_remax_is_the_return_less_the_score_of_the_greedy_response() -> None:
    to_go = by_rows(lambda rewards: [rewards[t:].sum() for t in range(len(rewards))], REWARDS)
    given = advantages.remax(REWARDS, BOOTSTRAPS, MASK)
    close(given, np.where(MASK, to_go - BOOTSTRAPS[:, None], 0))
    placed = advantages.score_at_end(BOOTSTRAPS, MASK)
    np.testing.assert_array_equal(advantages.remax(placed, BOOTSTRAPS, MASK), np.zeros((B, T)))
    for wrong in (BOOTSTRAPS[0], BOOTSTRAPS[:1], BOOTSTRAPS[1:], REWARDS):
        with pytest.raises(AssertionError):
            advantages.remax(REWARDS, wrong, MASK)


def test_carried_back_is_what_the_next_real_token_has() -> None:
    expected = np.zeros((B, T))
    for row in range(B):
        for t in range(T):
            later = [s for s in range(t, T) if MASK[row, s]]
            expected[row, t] = REWARDS[row, later[0]] if later else 0.0
    polluted = np.where(MASK, REWARDS, np.nan)
    np.testing.assert_array_equal(advantages.carry_back(polluted, MASK), np.float32(expected))
    np.testing.assert_array_equal(
        advantages.carry_back(REWARDS.reshape(2, 3, T), MASK.reshape(2, 3, T)).reshape(B, T),
        np.float32(expected),
    )
    np.testing.assert_array_equal(advantages.carry_back(REWARDS[4], MASK[4]), expected[4])
    for x, mask in ((REWARDS[0, 0], jnp.array(True)), (REWARDS, MASK[1:]), (REWARDS, 1 * MASK)):
        with pytest.raises(AssertionError):
            advantages.carry_back(x, mask)


def test_value_targets_of_shapes_that_differ_are_refused() -> None:
    with pytest.raises(AssertionError):
        advantages.value_targets(REWARDS, VALUES[:1])
