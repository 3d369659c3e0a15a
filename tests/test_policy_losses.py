"""Losses of tokens against their equations token by token, and against one another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
    ADVANTAGES,
    COUNT,
    MASK,
    NEW,
    OLD,
    WEIGHTS,
    Equation,
    Loss,
    assert_close,
    compiled,
    every_reduction,
    every_reduction_by_loop,
    metrics_by_hand,
)

from rlhfjax import advantages, masked
from rlhfjax.losses import policy


def ppo(
    *, low: float = 0.2, high: float = 0.2, dual: float = 1e9, bound: float = np.inf
) -> Equation:
    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        ratio = np.exp(np.clip(new - old, -bound, bound))
        objective = np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)
        return -np.where(a < 0, np.maximum(objective, dual * a), objective)

    return equation


def cispo(*, low: float = 0.2, high: float = 0.2, bound: float = np.inf) -> Equation:
    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        ratio = np.exp(np.clip(now - old, -bound, bound))
        return -np.clip(ratio, 1 - low, 1 + high) * a * new

    return equation


def sapo(*, gain: float = 1.0, loss: float = 1.05, bound: float = np.inf) -> Equation:
    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        ratio = np.exp(np.clip(new - old, -bound, bound))
        tau = np.where(a > 0, gain, loss)
        return -a / (1 + np.exp(-tau * (ratio - 1))) * 4 / tau

    return equation


def kl_cov(*, count: int, coef: float, bound: float = np.inf) -> Equation:
    mean_a, mean_now = ADVANTAGES[MASK].mean(), NEW[MASK].mean()
    least = np.sort(((ADVANTAGES - mean_a) * (NEW - mean_now))[MASK])[-count] - 1e-6

    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        penalised = (a - mean_a) * (now - mean_now) >= least
        ratio = np.exp(np.clip(new - old, -bound, bound))
        return coef * penalised * np.abs(new - old) - ratio * a

    return equation


def reinforce(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
    return -a * new


def without_ratio(new: Any, old: Any, *arguments: Any, **options: Any) -> Any:
    return policy.policy_gradient(new, *arguments, **options)


NO_BOUND = 1e9
EQUATIONS: list[tuple[Loss, dict[str, float], Equation]] = [
    (policy.ppo_clip, {}, ppo()),
    (policy.ppo_clip, {"clip_range": 0.1, "clip_range_high": 0.4}, ppo(low=0.1, high=0.4)),
    (policy.ppo_clip, {"clip_range": 0.4, "clip_range_high": 0.1}, ppo(low=0.4, high=0.1)),
    (policy.ppo_clip, {"clip_range": 1.5, "clip_range_high": 0.2}, ppo(low=1.5)),
    (policy.ppo_clip, {"dual_clip": 1.3, "log_ratio_clip": NO_BOUND}, ppo(dual=1.3)),
    (policy.ppo_clip, {"dual_clip": NO_BOUND, "log_ratio_clip": 0.15}, ppo(bound=0.15)),
    (policy.cispo, {}, cispo()),
    (
        policy.cispo,
        {"clip_range": 0.1, "clip_range_high": 0.4, "log_ratio_clip": NO_BOUND},
        cispo(low=0.1, high=0.4),
    ),
    (
        policy.cispo,
        {"clip_range": 1.5, "clip_range_high": 0.2, "log_ratio_clip": 0.3},
        cispo(low=1.5, bound=0.3),
    ),
    (policy.sapo, {}, sapo()),
    (
        policy.sapo,
        {"gain_temperature": 3.0, "loss_temperature": 7.0, "log_ratio_clip": 0.3},
        sapo(gain=3.0, loss=7.0, bound=0.3),
    ),
    (policy.kl_cov, {}, kl_cov(count=1, coef=1.0)),
    (
        policy.kl_cov,
        {"fraction": 0.5, "kl_coef": 0.3, "log_ratio_clip": 0.1},
        kl_cov(count=7, coef=0.3, bound=0.1),
    ),
    (without_ratio, {}, reinforce),
]


@pytest.mark.parametrize("loss, options, equation", EQUATIONS)
def test_loss_and_gradient_are_those_of_the_equation_under_every_reduction(
    loss: Loss, options: dict[str, float], equation: Equation
) -> None:
    given = every_reduction(loss, NEW, OLD, ADVANTAGES, MASK, weights=WEIGHTS, **options)
    assert_close(given, every_reduction_by_loop(equation, NEW, OLD, ADVANTAGES, NEW))


RATIO_LOSSES = [policy.ppo_clip, policy.cispo, policy.sapo, policy.kl_cov]


@pytest.mark.parametrize(
    "loss, options",
    [
        *((loss, {}) for loss in RATIO_LOSSES),
        (policy.ppo_clip, {"clip_range": 0.0, "clip_range_high": 0.0}),
    ],
)
def test_on_the_policy_that_sampled_every_loss_has_the_gradient_of_reinforce(
    loss: Loss, options: dict[str, float]
) -> None:
    """Even with a range of 0: a ratio on a bound is not clipped."""
    _, grads = every_reduction(loss, OLD, OLD, ADVANTAGES, MASK, weights=WEIGHTS, **options)
    assert_close(grads, every_reduction_by_loop(reinforce, OLD, OLD, ADVANTAGES, OLD)[1])


def test_the_values_on_the_policy_that_sampled() -> None:
    mean = ADVANTAGES[MASK].mean()
    loss, metrics = compiled(policy.ppo_clip)(OLD, OLD, ADVANTAGES, MASK)
    assert loss == pytest.approx(-mean, rel=1e-5)
    assert metrics == {
        "clip_fraction": 0,
        "dual_clip_fraction": 0,
        "approx_kl": 0,
        "ratio": 1,
        "ratio_var": 0,
    }
    tau = np.where(ADVANTAGES > 0, 1.0, 1.05)
    gates, _ = policy.sapo(OLD, OLD, ADVANTAGES, MASK, reduce=masked.fill)
    assert_close(gates, np.where(MASK, -2 * ADVANTAGES / tau, 0.0))


class TestMetrics:
    LOG_RATIO = (NEW - OLD)[MASK].astype(np.float64)
    A = ADVANTAGES[MASK]

    def test_of_ppo_count_the_tokens_whose_clipped_term_is_smaller(self) -> None:
        ratio = np.exp(self.LOG_RATIO)
        is_clipped = np.clip(ratio, 0.9, 1.4) * self.A < ratio * self.A
        expected = metrics_by_hand(self.LOG_RATIO, ratio, is_clipped)
        expected["dual_clip_fraction"] = np.mean((self.A < 0) & (ratio > 1.3))
        assert 0 < expected["dual_clip_fraction"] != expected["clip_fraction"]
        options = {"clip_range": 0.1, "clip_range_high": 0.4, "dual_clip": 1.3}
        _, metrics = compiled(policy.ppo_clip)(NEW, OLD, ADVANTAGES, MASK, **options)
        assert_close(metrics, expected)

    def test_of_cispo_count_the_tokens_outside_the_range(self) -> None:
        ratio = np.exp(self.LOG_RATIO)
        options = {"clip_range": 0.1, "clip_range_high": 0.4}
        _, metrics = compiled(policy.cispo)(NEW, OLD, ADVANTAGES, MASK, **options)
        outside = (ratio < 0.9) | (ratio > 1.4)
        assert_close(metrics, metrics_by_hand(self.LOG_RATIO, ratio, outside))

    @pytest.mark.parametrize("loss", RATIO_LOSSES)
    def test_see_the_divergence_before_the_bound_and_the_ratio_after_it(self, loss: Loss) -> None:
        _, metrics = compiled(loss)(NEW, OLD, ADVANTAGES, MASK, log_ratio_clip=0.3)
        expected = metrics_by_hand(
            self.LOG_RATIO, np.exp(np.clip(self.LOG_RATIO, -0.3, 0.3)), np.zeros(1)
        )
        for name in ("approx_kl", "ratio", "ratio_var"):
            assert_close(metrics[name], expected[name])

    def test_nothing_is_clipped_without_an_advantage_nor_by_sapo(self) -> None:
        for loss, a in ((policy.ppo_clip, 0 * ADVANTAGES), (policy.sapo, ADVANTAGES)):
            assert compiled(loss)(NEW + 9, OLD, a, MASK)[1]["clip_fraction"] == 0


@pytest.mark.parametrize("c", [1.3, 1.5, 4.0])
def test_the_dual_clip_is_the_two_sided_clip_of_trl(c: float) -> None:
    ratio = np.array([0.1, 0.7, 1.0, 1.25, 1.4, 2.0, 9.0] * 2)
    a = np.repeat([-1.5, 1.5], 7)
    objective = np.minimum(np.minimum(ratio, c) * a, np.clip(ratio, 0.8, 1.3) * a)
    arrays = np.log(ratio), np.zeros(14), a, np.ones(14, bool)
    unreduced = partial(policy.ppo_clip, reduce=masked.fill)
    losses, _ = jax.jit(unreduced)(*arrays, clip_range_high=0.3, dual_clip=c)
    assert_close(losses, -objective)


def test_bounds_are_traced() -> None:
    def loss_of(low: jax.Array, high: jax.Array, c: jax.Array) -> jax.Array:
        options = {"clip_range": low, "clip_range_high": high, "dual_clip": c}
        return policy.ppo_clip(NEW, OLD, ADVANTAGES, MASK, **options)[0]

    bounds = np.array([[0.1, 0.2, 1.2], [0.3, 0.3, 5.0]])
    tokens = [x[MASK].astype(np.float64) for x in (NEW, OLD, ADVANTAGES, NEW)]
    expected = [ppo(low=low, high=high, dual=c)(*tokens).mean() for low, high, c in bounds]
    assert_close(jax.jit(jax.vmap(loss_of))(*jnp.asarray(bounds.T)), expected)


def test_cispo_keeps_the_gradient_of_a_clipped_token_where_ppo_has_none() -> None:
    arrays = np.log([2.0, 0.5]), np.zeros(2), np.array([1.0, -1.0]), np.ones(2, bool)
    for loss, slopes in ((policy.ppo_clip, [0.0, 0.0]), (policy.cispo, [-0.6, 0.4])):
        assert_close(jax.jit(jax.grad(loss, has_aux=True))(*arrays)[0], slopes)


def test_the_cispo_of_trl_is_the_policy_gradient_with_truncated_weights() -> None:
    def loss_of(new: jax.Array) -> jax.Array:
        weights = advantages.token_importance_weights(new, OLD, MASK)
        weights = advantages.truncate_weights(weights, high=1.2)
        return policy.policy_gradient(new, ADVANTAGES, MASK, weights=weights)[0]

    factor = -np.minimum(np.exp(NEW - OLD), 1.2) * ADVANTAGES
    loss, grad = jax.value_and_grad(loss_of)(NEW)
    assert loss == pytest.approx((factor * NEW)[MASK].mean(), rel=1e-5)
    assert_close(grad, np.where(MASK, factor, 0) / COUNT)


E20 = np.exp(20.0)
OVERFLOWS: list[tuple[Loss, list[float], list[float]]] = [
    (policy.ppo_clip, [-1.2, 0, np.inf, 0, 0, 0.8], [0, 0, np.inf, 0, 0, 0]),
    (partial(policy.ppo_clip, dual_clip=3.0), [-1.2, 0, 3, 0, 0, 0.8], [0] * 6),
    (
        partial(policy.ppo_clip, log_ratio_clip=2.0),
        [-1.2, 0, np.exp(2.0), -np.exp(-2.0), 0, 0.8],
        [0] * 6,
    ),
    (policy.cispo, [121.2, 0, -121.2, 80.8, 0, -80.8], [-1.2, 0, 1.2, -0.8, 0, 0.8]),
    (
        policy.sapo,
        [-4, 0, 4 / 1.05, -4 / (1 + np.exp(1.0)), 0, 4 / 1.05 / (1 + np.exp(1.05))],
        [0] * 6,
    ),
    (partial(policy.kl_cov, kl_coef=0.0), [-E20, 0, E20, 0, 0, 0], [0] * 6),
    (
        partial(policy.kl_cov, fraction=1.0),
        [100 - E20, 100, 100 + E20, 100, 100, 100],
        [1, 1, 1, -1, -1, -1],
    ),
]


@pytest.mark.parametrize("loss, expected, slopes", OVERFLOWS)
def test_ratios_that_overflow(loss: Loss, expected: list[float], slopes: list[float]) -> None:
    """Of log ratios of ±100 with an advantage of 1, 0 and -1."""
    new, a = jnp.full(6, -101.0), jnp.array([1.0, 0.0, -1.0] * 2)
    old, mask = new - jnp.repeat(jnp.array([100.0, -100.0]), 3), jnp.ones(6, bool)

    def total(new: jax.Array) -> tuple[jax.Array, tuple[jax.Array, dict[str, jax.Array]]]:
        losses, metrics = loss(new, old, a, mask, reduce=masked.fill)
        return losses.sum(), (losses, metrics)

    grad, (losses, metrics) = jax.jit(jax.grad(total, has_aux=True))(new)
    assert_close((losses, grad), (np.array(expected), np.array(slopes)))
    assert not any(np.isnan(x) for x in metrics.values())


def test_metrics_of_a_ratio_that_overflows_are_infinite() -> None:
    _, metrics = compiled(policy.ppo_clip)(NEW + 200, OLD, ADVANTAGES, MASK)
    assert metrics["ratio"] == metrics["ratio_var"] == np.inf


@pytest.mark.parametrize("loss", RATIO_LOSSES)
def test_a_weight_of_0_removes_a_token_even_if_its_ratio_overflows(loss: Loss) -> None:
    @jax.jit
    def of_old(old: jax.Array) -> tuple[jax.Array, jax.Array]:
        arguments = old, -(ADVANTAGES**2), MASK
        return jax.value_and_grad(
            lambda new: loss(new, *arguments, weights=WEIGHTS, reduce=masked.mean)[0]
        )(NEW)

    removed = WEIGHTS == 0
    assert removed.any()
    value, grad = of_old(np.where(removed, -200, OLD))
    assert_close((value, grad), of_old(np.where(removed, NEW, OLD)))
    assert (np.asarray(grad)[removed] == 0).all()


@jax.jit
def penalty(new: jax.Array, a: jax.Array, mask: jax.Array, fraction: float) -> jax.Array:
    """Of tokens whose log ratio is ½."""
    arrays, unreduced = (new, new - 0.5, a, mask), partial(policy.kl_cov, reduce=masked.fill)
    with_it, without = (unreduced(*arrays, fraction=fraction, kl_coef=b)[0] for b in (2.0, 0.0))
    return with_it - without


class TestKlCov:
    @pytest.mark.parametrize(
        "count, fraction, expected",
        [(20, 0.2, 4), (30, 0.1, 3), (100, 0.53, 53), (10, 0.29, 2), (30, 2e-3, 1), (7, 1.0, 7)],
    )
    def test_a_fraction_of_the_real_tokens_is_penalised(
        self, count: int, fraction: float, expected: int
    ) -> None:
        rng = np.random.default_rng(count)
        new, a = rng.normal(size=(2, 2, 64)).astype(np.float32)
        mask = (rng.permutation(128) < count).reshape(2, 64)
        new[~mask], a[~mask] = 1e4, 1e4
        covariance = (a - a[mask].mean()) * (new - new[mask].mean())
        least = np.sort(covariance[mask])[-expected]
        assert_close(penalty(new, a, mask, fraction), mask & (covariance >= least))
        _, metrics = compiled(policy.kl_cov)(new, new, a, mask, fraction=fraction)
        assert metrics["clip_fraction"] == pytest.approx(expected / count)

    def test_of_equal_covariances_the_first_are_taken(self) -> None:
        mask = np.array([[0, 1, 1, 1], [1, 1, 0, 1]], bool)
        given = penalty(np.ones((2, 4)), np.ones((2, 4)), mask, 0.5)
        assert_close(given, [[0, 1, 1, 1], [0, 0, 0, 0]])


def test_the_entropy_loss_falls_where_the_entropy_rises() -> None:
    entropies = -OLD
    loss, metrics = policy.entropy_loss(entropies, MASK)
    assert loss == pytest.approx(-entropies[MASK].mean(), rel=1e-6) and metrics == {}
    given = every_reduction(policy.entropy_loss, entropies, MASK, weights=WEIGHTS)
    assert_close(given, every_reduction_by_loop(np.negative, entropies))
    assert (np.asarray(given[1]) <= 0).all()
