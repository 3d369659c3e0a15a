"""Importance weights against loops over tokens, and as a change of measure that is enumerated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import advantages

RNG = np.random.default_rng(0)
MASK = np.array(
    [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 0, 0, 0]], bool
)
B, T = MASK.shape
LOG_PROBS, SAMPLER = RNG.normal(-2.0, 0.8, (2, B, T)).astype(np.float32)
Weights = Callable[..., jax.Array]
of_tokens, of_sequences = (
    advantages.token_importance_weights,
    advantages.sequence_importance_weights,
)


def log_ratios(row: int) -> list[float]:
    """Of the real tokens of a row."""
    return [float(LOG_PROBS[row, t]) - float(SAMPLER[row, t]) for t in range(T) if MASK[row, t]]


@pytest.mark.parametrize("bound", [None, 0.5, 3.0])
def test_weights_of_tokens_and_of_sequences(bound: float | None) -> None:
    def held(log_ratio: float) -> float:
        return log_ratio if bound is None else min(max(log_ratio, -bound), bound)

    by_token, by_sequence = np.ones((B, T)), np.ones(B)
    for row in range(B):
        by_token[row, MASK[row]] = [np.exp(held(ratio)) for ratio in log_ratios(row)]
        by_sequence[row] = np.exp(held(sum(log_ratios(row))))
    given = of_tokens(LOG_PROBS, SAMPLER, MASK, log_ratio_clip=bound)
    np.testing.assert_allclose(given, by_token, rtol=1e-5)
    given = of_sequences(LOG_PROBS, SAMPLER, MASK, log_ratio_clip=bound)
    np.testing.assert_allclose(given, by_sequence, rtol=1e-5)


def test_the_weight_of_a_sequence_is_the_product_of_those_of_its_tokens() -> None:
    by_token = of_tokens(LOG_PROBS, SAMPLER, MASK)
    np.testing.assert_allclose(
        of_sequences(LOG_PROBS, SAMPLER, MASK), np.prod(by_token, axis=-1), rtol=1e-5
    )


def test_weighted_samples_of_the_sampler_have_the_expectation_of_the_learner() -> None:
    """All sequences of two tokens out of four, the second of which depends on the first."""
    rng = np.random.default_rng(1)

    def joint() -> np.ndarray:
        first, second = rng.normal(size=4), rng.normal(size=(4, 4))
        first, second = np.exp(first), np.exp(second)
        first, second = first / first.sum(), second / second.sum(-1, keepdims=True)
        pairs = [(first[a], second[a, b]) for a in range(4) for b in range(4)]
        return np.log(np.array(pairs))

    learner, sampler = joint(), joint()
    quantity = rng.normal(size=16)
    weights = of_sequences(jnp.float32(learner), jnp.float32(sampler), np.ones((16, 2), bool))
    probabilities = np.exp(sampler.sum(-1))
    assert probabilities @ weights == pytest.approx(1, rel=1e-5)
    expected = np.exp(learner.sum(-1)) @ quantity
    assert probabilities @ (weights * quantity) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weights", [of_tokens, of_sequences])
def test_the_same_policy_has_the_weight_1_to_the_bit(weights: Weights) -> None:
    given = weights(LOG_PROBS, LOG_PROBS, MASK)
    np.testing.assert_array_equal(given, np.ones(given.shape))


@pytest.mark.parametrize("weights", [of_tokens, of_sequences])
def test_weights_are_numbers_without_a_gradient(weights: Weights) -> None:
    def total(log_probs: jax.Array, sampler: jax.Array) -> jax.Array:
        return weights(log_probs, sampler, MASK, log_ratio_clip=1.0).sum()

    for grad in jax.grad(total, (0, 1))(LOG_PROBS, SAMPLER):
        np.testing.assert_array_equal(grad, np.zeros((B, T)))


@pytest.mark.parametrize("weights", [of_tokens, of_sequences])
def test_ratios_that_overflow_are_infinite_or_0_and_the_bound_holds_them(
    weights: Weights,
) -> None:
    log_probs, sampler = (
        jnp.array([[-1.0], [-300.0], [-jnp.inf]]),
        jnp.array([[-300.0], [-1], [-1]]),
    )
    real = np.ones((3, 1), bool)
    unbounded = weights(log_probs, sampler, real).ravel()
    np.testing.assert_array_equal(unbounded, [np.inf, 0, 0])
    bounded = weights(log_probs, sampler, real, log_ratio_clip=20.0).ravel()
    np.testing.assert_allclose(bounded, np.exp([20.0, -20, -20]), rtol=1e-5)
    np.testing.assert_array_equal(advantages.truncate_weights(unbounded, high=2.0), [2, 0, 0])
    np.testing.assert_array_equal(advantages.reject_weights(unbounded, high=2.0), [0, 0, 0])


@pytest.mark.parametrize(
    "bounds, truncated, rejected",
    [
        ({}, [0, 0.5, 1, 2, 3], [0, 0.5, 1, 2, 3]),
        ({"high": 2.0}, [0, 0.5, 1, 2, 2], [0, 0.5, 1, 2, 0]),
        ({"low": 0.5}, [0.5, 0.5, 1, 2, 3], [0, 0.5, 1, 2, 3]),
        ({"low": 0.75, "high": 1.5}, [0.75, 0.75, 1, 1.5, 1.5], [0, 0, 1, 0, 0]),
    ],
)
def test_weights_beyond_the_bounds_are_held_there_or_rejected(
    bounds: dict[str, float], truncated: list[float], rejected: list[float]
) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        weights = jnp.array([0, 0.5, 1, 2, 3], dtype)
        given = advantages.truncate_weights(weights, **bounds)
        np.testing.assert_array_equal(given, np.float32(truncated))
        given = advantages.reject_weights(weights, **bounds)
        np.testing.assert_array_equal(given, np.float32(rejected))
        assert given.dtype == jnp.float32


def test_normalised_weights_have_mean_1_over_what_is_real() -> None:
    weights = np.exp(RNG.normal(0, 2, (B, T))).astype(np.float32)
    given = np.asarray(advantages.normalize_weights(weights, MASK))
    np.testing.assert_allclose(given, MASK * weights / weights[MASK].mean(), rtol=1e-5)
    assert given[MASK].mean() == pytest.approx(1, rel=1e-5)
    of_one = advantages.normalize_weights(jnp.array([3.0, 8.0]), jnp.array([True, False]))
    np.testing.assert_array_equal(of_one, [1, 0])
    for given in (
        advantages.normalize_weights(weights, MASK & False),
        advantages.normalize_weights(np.where(MASK, 0, weights), MASK),
    ):
        np.testing.assert_array_equal(given, np.zeros((B, T)))


def test_only_bad_responses_that_drifted_are_left_out() -> None:
    drift = [-np.mean(log_ratios(row)) if MASK[row].any() else 0.0 for row in range(B)]
    threshold = np.median(drift)
    for judged in (np.array([1, -1, 0, -1, -1]), np.array([-1, 2, -1, 1, -1])):
        given = advantages.on_policy_sequences(
            LOG_PROBS, SAMPLER, judged.astype(np.float32), MASK, max_kl=threshold + 1e-4
        )
        expected = [good >= 0 or d <= threshold for good, d in zip(judged, drift, strict=True)]
        np.testing.assert_array_equal(given, expected)
        assert given.dtype == bool
    bad = -np.ones(B)
    assert not any(advantages.on_policy_sequences(LOG_PROBS, SAMPLER, bad, MASK, max_kl=-9.0))
    exactly = advantages.on_policy_sequences(LOG_PROBS, LOG_PROBS, bad, MASK, max_kl=0.0)
    assert exactly.all()


def test_a_mean_over_tokens_decides_and_not_their_sum() -> None:
    sampler, learner = jnp.zeros((1, 4)), jnp.full((1, 4), -0.1)
    real, bad = np.ones((1, 4), bool), jnp.array([-1.0])
    assert advantages.on_policy_sequences(learner, sampler, bad, real, max_kl=0.2)
    assert not advantages.on_policy_sequences(learner, sampler, bad, real, max_kl=0.05)
    assert advantages.on_policy_sequences(sampler, learner, bad, real, max_kl=0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        (LOG_PROBS, SAMPLER[1:], MASK),
        (LOG_PROBS, SAMPLER, MASK[1:]),
        (LOG_PROBS, SAMPLER, MASK.astype(np.float32)),
    ],
)
def test_what_does_not_fit_is_refused(wrong: tuple[np.ndarray, ...]) -> None:
    log_probs, sampler, mask = wrong
    with pytest.raises(AssertionError):
        of_tokens(log_probs, sampler, mask)
    with pytest.raises(AssertionError):
        of_sequences(log_probs, sampler, mask)
    with pytest.raises(AssertionError):
        advantages.on_policy_sequences(log_probs, sampler, np.ones(B), mask, max_kl=0.1)


def test_advantages_and_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError):
        advantages.on_policy_sequences(LOG_PROBS, SAMPLER, np.ones(B - 1), MASK, max_kl=0.1)
    for mask in (MASK[1:], MASK.astype(int)):
        with pytest.raises(AssertionError):
            advantages.normalize_weights(LOG_PROBS, mask)
