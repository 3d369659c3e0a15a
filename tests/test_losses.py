"""Losses against loops over tokens, and their gradients against the derivative by hand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import policy, reward, supervised, value

RNG = np.random.default_rng(0)
B, T = 4, 6
OLD = RNG.uniform(-2.0, -0.5, (B, T)).astype(np.float32)
NEW = OLD + RNG.normal(0.0, 0.4, (B, T)).astype(np.float32)
ADVANTAGES, VALUES, OLD_VALUES, RETURNS = RNG.normal(size=(4, B, T)).astype(np.float32)
MASK = np.arange(T) < np.array([6, 3, 1, 0])[:, None]
COUNT = MASK.sum()

LOSSES: dict[str, tuple[Callable[..., Any], tuple[np.ndarray, ...]]] = {
    "ppo": (
        lambda *arrays: policy.ppo_clip(*arrays, clip_range=0.2, dual_clip=1.5, log_ratio_clip=20),
        (NEW, OLD, ADVANTAGES),
    ),
    "clipped value": (
        lambda *arrays: value.clipped_value_loss(*arrays, clip_range=0.2),
        (VALUES, OLD_VALUES, RETURNS),
    ),
    "value": (value.value_loss, (VALUES, RETURNS)),
    "pairwise": (
        lambda *arrays: reward.pairwise(*arrays, margin=0.1, center_coef=0.1),
        (VALUES, RETURNS),
    ),
    "language model": (lambda *arrays: (supervised.language_model(*arrays), {}), (NEW,)),
    "language model by sequence": (
        lambda *arrays: (supervised.language_model_by_sequence(*arrays), {}),
        (NEW,),
    ),
}
each_loss = pytest.mark.parametrize("loss, arrays", LOSSES.values(), ids=LOSSES)


def ppo_by_loop(
    low: float, high: float, *, dual_clip: float = np.inf, bound: float = np.inf
) -> tuple[float, float, np.ndarray]:
    """Loss, clip fraction and d loss / d log_probs, token by token."""
    loss, clipped, grad = 0.0, 0, np.zeros((B, T))
    for at in zip(*np.nonzero(MASK), strict=True):
        log_ratio, advantage = float(NEW[at] - OLD[at]), float(ADVANTAGES[at])
        ratio = np.exp(np.clip(log_ratio, -bound, bound))
        plain, other = ratio * advantage, np.clip(ratio, 1 - low, 1 + high) * advantage
        objective = min(plain, other)
        clipped += other < plain
        flat = other < plain or abs(log_ratio) > bound
        if advantage < 0 and objective < dual_clip * advantage:
            objective, flat = dual_clip * advantage, True
        loss -= objective / COUNT
        grad[at] = 0.0 if flat else -plain / COUNT
    return loss, clipped / COUNT, grad


class TestPpoClip:
    @pytest.mark.parametrize(
        "options, reference",
        [
            ({}, ppo_by_loop(0.2, 0.2)),
            ({"clip_range": 0.1}, ppo_by_loop(0.1, 0.1)),
            ({"clip_range": 0.1, "clip_range_high": 0.4}, ppo_by_loop(0.1, 0.4)),
            ({"dual_clip": 1.3}, ppo_by_loop(0.2, 0.2, dual_clip=1.3)),
            ({"log_ratio_clip": 0.3}, ppo_by_loop(0.2, 0.2, bound=0.3)),
            ({"clip_range": 1.5}, ppo_by_loop(1.5, 1.5)),
        ],
    )
    def test_loss_clip_fraction_and_gradient(self, options: dict, reference: tuple) -> None:
        (loss, metrics), grad = jax.value_and_grad(
            lambda new: policy.ppo_clip(new, OLD, ADVANTAGES, MASK, **options), has_aux=True
        )(NEW)
        np.testing.assert_allclose(loss, reference[0], rtol=1e-5)
        np.testing.assert_allclose(metrics["clip_fraction"], reference[1], rtol=1e-5)
        np.testing.assert_allclose(grad, reference[2], rtol=1e-4, atol=1e-7)

    def test_metrics_of_the_ratio(self) -> None:
        _, metrics = policy.ppo_clip(NEW, OLD, ADVANTAGES, MASK)
        log_ratio = (NEW - OLD)[MASK].astype(np.float64)
        assert metrics["approx_kl"] == pytest.approx((log_ratio**2).mean() / 2, rel=1e-5)
        assert metrics["ratio"] == pytest.approx(np.exp(log_ratio).mean(), rel=1e-5)
        assert metrics["ratio_var"] == pytest.approx(np.exp(log_ratio).var(), rel=1e-4)
        _, bounded = policy.ppo_clip(NEW, OLD, ADVANTAGES, MASK, log_ratio_clip=0.1)
        assert bounded["approx_kl"] == metrics["approx_kl"]
        bounded_ratios = np.exp(np.clip(log_ratio, -0.1, 0.1))
        assert bounded["ratio"] == pytest.approx(bounded_ratios.mean(), rel=1e-5)

    def test_at_the_sampling_policy_the_gradient_is_that_of_reinforce(self) -> None:
        (loss, metrics), grad = jax.value_and_grad(
            lambda new: policy.ppo_clip(new, OLD, ADVANTAGES, MASK), has_aux=True
        )(OLD)
        np.testing.assert_allclose(loss, -ADVANTAGES[MASK].mean(), rtol=1e-5)
        np.testing.assert_allclose(grad, -ADVANTAGES * MASK / COUNT, rtol=1e-5)
        assert metrics == {"clip_fraction": 0, "approx_kl": 0, "ratio": 1, "ratio_var": 0}

    @pytest.mark.parametrize("advantage, finite", [(1.0, True), (0.0, True), (-1.0, False)])
    def test_an_overflowing_ratio_matters_only_where_it_is_not_clipped(
        self, advantage: float, finite: bool
    ) -> None:
        def loss_of(new: jax.Array, dual_clip: float | None = None) -> jax.Array:
            arrays = (jnp.array([-200.0]), jnp.array([advantage]), jnp.ones(1, bool))
            return policy.ppo_clip(new, *arrays, dual_clip=dual_clip)[0]

        loss, grad = jax.value_and_grad(loss_of)(jnp.array([-1.0]))
        assert np.isfinite(loss) == finite
        if finite:
            assert loss == pytest.approx(-1.2 * advantage) and grad == 0
        bounded, grad = jax.value_and_grad(loss_of)(jnp.array([-1.0]), 3.0)
        assert np.isfinite(bounded) and grad == 0

    def test_a_token_without_advantage_is_not_clipped(self) -> None:
        _, metrics = policy.ppo_clip(NEW + 9, OLD, np.zeros_like(NEW), MASK)
        assert metrics["clip_fraction"] == 0

    def test_only_the_policy_that_is_trained_gets_a_gradient(self) -> None:
        def loss_of(*arrays: jax.Array) -> jax.Array:
            loss, metrics = policy.ppo_clip(*arrays, MASK)
            return loss + sum(metrics.values())

        _, *others = jax.grad(loss_of, (0, 1, 2))(NEW, OLD, ADVANTAGES)
        for grad in others:
            assert (np.asarray(grad) == 0).all()

    def test_bounds_are_traced(self) -> None:
        def loss_of(low: jax.Array, high: jax.Array, dual: jax.Array) -> jax.Array:
            return policy.ppo_clip(
                NEW, OLD, ADVANTAGES, MASK, clip_range=low, clip_range_high=high, dual_clip=dual
            )[0]

        given = jax.jit(jax.vmap(loss_of))(
            jnp.array([0.1, 0.3]), jnp.array([0.2, 0.3]), jnp.array([1.2, 5.0])
        )
        expected = [
            ppo_by_loop(0.1, 0.2, dual_clip=1.2)[0],
            ppo_by_loop(0.3, 0.3, dual_clip=5.0)[0],
        ]
        np.testing.assert_allclose(given, expected, rtol=1e-5)


class TestValue:
    def test_clipped_loss_by_hand(self) -> None:
        # Tokens: inside the range; clipped with the larger error; clipped with the smaller one.
        values, old_values = jnp.array([1.1, 2.0, 2.0]), jnp.ones(3)
        returns = jnp.array([0.1, 0.0, 5.0])

        def loss_of(values: jax.Array, returns: jax.Array) -> tuple[jax.Array, dict]:
            return value.clipped_value_loss(
                values, old_values, returns, jnp.ones(3, bool), clip_range=0.5
            )

        (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(values, returns)
        assert loss == pytest.approx((1.0**2 + 2.0**2 + 3.5**2) / 6)
        assert metrics["clip_fraction"] == pytest.approx(1 / 3)
        np.testing.assert_allclose(grad, [1.0 / 3, 2.0 / 3, 0.0], rtol=1e-6)

    def test_clipped_loss_by_loop(self) -> None:
        errors = [
            max((v - r) ** 2, (np.clip(v, old - 0.3, old + 0.3) - r) ** 2)
            for v, old, r in zip(VALUES[MASK], OLD_VALUES[MASK], RETURNS[MASK], strict=True)
        ]
        loss, _ = value.clipped_value_loss(VALUES, OLD_VALUES, RETURNS, MASK, clip_range=0.3)
        assert loss == pytest.approx(np.mean(errors) / 2, rel=1e-5)

    def test_a_range_that_is_never_left_gives_the_plain_loss(self) -> None:
        plain, metrics = value.value_loss(VALUES, RETURNS, MASK)
        assert plain == pytest.approx(((VALUES - RETURNS)[MASK] ** 2).mean() / 2, rel=1e-5)
        assert metrics == {}
        clipped, metrics = jax.jit(value.clipped_value_loss)(
            VALUES, OLD_VALUES, RETURNS, MASK, clip_range=100.0
        )
        np.testing.assert_allclose(clipped, plain, rtol=1e-6)
        assert metrics["clip_fraction"] == 0

    def test_only_the_values_get_a_gradient(self) -> None:
        def clipped(*arrays: jax.Array) -> jax.Array:
            return value.clipped_value_loss(*arrays, MASK, clip_range=0.2)[0]

        _, *others = jax.grad(clipped, (0, 1, 2))(VALUES, OLD_VALUES, RETURNS)
        others.append(jax.grad(lambda r: value.value_loss(VALUES, r, MASK)[0])(RETURNS))
        for grad in others:
            assert (np.asarray(grad) == 0).all()


class TestPairwise:
    CHOSEN, REJECTED = jnp.array([1.0, 0.0, -2.0]), jnp.array([0.0, 0.0, 1.0])

    def test_by_hand(self) -> None:
        loss, metrics = reward.pairwise(self.CHOSEN, self.REJECTED)
        expected = np.mean([np.log1p(np.exp(-1.0)), np.log(2.0), np.log1p(np.exp(3.0))])
        assert loss == pytest.approx(expected, rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(1 / 3)
        assert metrics["margin"] == pytest.approx(-2 / 3)

    def test_the_margin_is_asked_of_each_pair(self) -> None:
        margin = jnp.array([1.0, 0.0, -3.0])
        loss, metrics = reward.pairwise(self.CHOSEN, self.REJECTED, margin=margin)
        assert loss == pytest.approx(np.log(2.0), rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(1 / 3)

    def test_centring_adds_the_mean_square_of_the_sums(self) -> None:
        plain, _ = reward.pairwise(self.CHOSEN, self.REJECTED)
        centred, _ = reward.pairwise(self.CHOSEN, self.REJECTED, center_coef=0.3)
        assert centred - plain == pytest.approx(0.3 * (1 + 0 + 1) / 3, rel=1e-5)

    def test_large_differences_stay_finite(self) -> None:
        (loss, _), grad = jax.value_and_grad(reward.pairwise, has_aux=True)(
            jnp.array([-1000.0]), jnp.array([1000.0])
        )
        assert loss == 2000.0 and grad == -1.0

    def test_rows_that_fill_a_batch_do_not_count(self) -> None:
        short = reward.pairwise(self.CHOSEN[:2], self.REJECTED[:2], center_coef=0.1)
        filled = reward.pairwise(
            self.CHOSEN, self.REJECTED, jnp.array([True, True, False]), center_coef=0.1
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), filled, short)


class TestLanguageModel:
    def test_every_token_weighs_the_same(self) -> None:
        assert supervised.language_model(NEW, MASK) == pytest.approx(-NEW[MASK].mean(), rel=1e-6)

    def test_every_sequence_weighs_the_same_and_empty_ones_nothing(self) -> None:
        means = [NEW[0].mean(), NEW[1, :3].mean(), NEW[2, 0]]
        loss = supervised.language_model_by_sequence(NEW, MASK)
        assert loss == pytest.approx(-np.mean(means), rel=1e-6)


@each_loss
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_tokens_are_ignored_to_the_last_bit(
    loss: Callable[..., Any], arrays: tuple[np.ndarray, ...], garbage: float
) -> None:
    differentiated = jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)
    clean = differentiated(*(np.where(MASK, x, 0) for x in arrays), MASK)
    given = differentiated(*(np.where(MASK, x, np.float32(garbage)) for x in arrays), MASK)
    jax.tree.map(np.testing.assert_array_equal, given, clean)
    for grad in given[1]:
        assert np.isfinite(grad).all() and (np.asarray(grad)[~MASK] == 0).all()


@each_loss
def test_the_whole_is_the_weighted_mean_of_its_parts(
    loss: Callable[..., Any], arrays: tuple[np.ndarray, ...], request: pytest.FixtureRequest
) -> None:
    """Over any split into micro-batches, and so under vmap, when each reports its weight."""
    by_sequence = "by sequence" in request.node.callspec.id
    weights = MASK.any(-1) if by_sequence else MASK.sum(-1)
    parts, _ = jax.vmap(loss)(*arrays, MASK)
    whole, _ = jax.jit(loss)(*arrays, MASK)
    np.testing.assert_allclose((parts * weights).sum() / weights.sum(), whole, rtol=1e-5)


@each_loss
def test_without_a_token_loss_metrics_and_gradient_are_0(
    loss: Callable[..., Any], arrays: tuple[np.ndarray, ...]
) -> None:
    differentiated = jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)
    for array in jax.tree.leaves(differentiated(*arrays, np.zeros_like(MASK))):
        assert (np.asarray(array) == 0).all()


@each_loss
def test_scalars_are_float32(loss: Callable[..., Any], arrays: tuple[np.ndarray, ...]) -> None:
    for array in jax.tree.leaves(loss(*(jnp.asarray(x, jnp.bfloat16) for x in arrays), MASK)):
        assert array.shape == () and array.dtype == jnp.float32


@each_loss
def test_shapes_that_do_not_fit_are_refused(
    loss: Callable[..., Any], arrays: tuple[np.ndarray, ...]
) -> None:
    with pytest.raises(AssertionError):
        loss(*arrays, MASK[:, :-1])
    with pytest.raises(AssertionError):
        loss(*arrays, MASK.astype(np.float32))
