"""KL estimators against the exact divergence of a distribution that can be enumerated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import kl

Estimator = Callable[[jax.Array, jax.Array], jax.Array]
ESTIMATORS: list[Estimator] = [kl.k1, kl.k2, kl.k3]

LOGITS = jnp.array([0.3, -1.0, 2.0, 0.7])
POLICY = jax.nn.log_softmax(LOGITS)
REFERENCE = jax.nn.log_softmax(jnp.array([1.0, 0.5, 0.2, -0.4]))
EXACT = float(jnp.sum(jnp.exp(POLICY) * (POLICY - REFERENCE)))


def test_values_by_hand() -> None:
    log_probs, ref_log_probs = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
    log2 = np.log(2.0)
    np.testing.assert_allclose(kl.k1(log_probs, ref_log_probs), [log2, -log2], rtol=1e-6)
    np.testing.assert_allclose(kl.k2(log_probs, ref_log_probs), [log2**2 / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(
        kl.k3(log_probs, ref_log_probs), [0.5 - 1 + log2, 2 - 1 - log2], rtol=1e-6
    )


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    expectation = jnp.sum(jnp.exp(POLICY) * estimator(POLICY, REFERENCE))
    assert expectation == pytest.approx(EXACT, rel=1e-5)


def test_as_losses_k2_has_the_gradient_of_the_divergence_and_k1_has_none() -> None:
    def exact(logits: jax.Array) -> jax.Array:
        policy = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(policy) * (policy - REFERENCE))

    def sampled(logits: jax.Array, estimator: Estimator) -> jax.Array:
        return jnp.sum(jnp.exp(POLICY) * estimator(jax.nn.log_softmax(logits), REFERENCE))

    np.testing.assert_allclose(
        jax.grad(sampled)(LOGITS, kl.k2), jax.grad(exact)(LOGITS), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(jax.grad(sampled)(LOGITS, kl.k1), np.zeros(4), atol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_no_divergence(estimator: Estimator) -> None:
    np.testing.assert_array_equal(estimator(POLICY, POLICY), np.zeros(4))


def test_k3_keeps_digits_of_small_differences() -> None:
    log_ratio = 1e-3
    exact = np.exp(-np.float64(log_ratio)) - 1 + np.float64(log_ratio)
    estimate = kl.k3(jnp.array([log_ratio]), jnp.zeros(1))
    np.testing.assert_allclose(estimate, [exact], rtol=1e-3)
    assert (kl.k3(jnp.linspace(-2.0, 2.0, 101), jnp.zeros(101)) >= 0).all()


def test_k3_of_a_bounded_log_ratio_has_a_finite_gradient() -> None:
    def bounded(log_probs: jax.Array) -> jax.Array:
        log_ratio = jnp.maximum(kl.k1(log_probs, jnp.zeros(2)), -20.0)
        return kl.k3(log_ratio, jnp.zeros(2)).sum()

    value, grad = jax.value_and_grad(bounded)(jnp.array([-100.0, 2.0]))
    assert value == pytest.approx(np.exp(20.0) - 21.0 + np.exp(-2.0) + 1.0, rel=1e-6)
    np.testing.assert_allclose(grad, [0.0, 1 - np.exp(-2.0)], rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_work_entry_by_entry(estimator: Estimator) -> None:
    rng = np.random.default_rng(0)
    log_probs, ref_log_probs = rng.normal(size=(2, 3, 5)).astype(np.float32)
    batched = estimator(log_probs, ref_log_probs)
    assert batched.shape == (3, 5)
    np.testing.assert_allclose(jax.vmap(estimator)(log_probs, ref_log_probs), batched, rtol=1e-6)
    np.testing.assert_allclose(
        jax.jit(estimator)(log_probs, ref_log_probs), batched, rtol=1e-5, atol=1e-7
    )
    half = jnp.asarray(log_probs, jnp.bfloat16)
    assert estimator(half, half).dtype == jnp.float32
    with pytest.raises(AssertionError):
        estimator(log_probs, ref_log_probs[:1])


@pytest.mark.parametrize(
    "measured, expected",
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 0.5)),  # 10 % above it
        (60.0, 0.2 * (1 + 0.2 * 0.5)),  # clipped
        (-3.0, 0.2 * (1 - 0.2 * 0.5)),  # clipped
    ],
)
def test_the_coefficient_follows_the_proportional_error(measured: float, expected: float) -> None:
    given = kl.adaptive_coef(0.2, measured, target=6.0, horizon=100, num_samples=50)
    assert given == pytest.approx(expected, rel=1e-5)
    assert given.dtype == jnp.float32


def test_the_clip_of_the_coefficient_is_an_argument() -> None:
    given = kl.adaptive_coef(1.0, 60.0, target=6.0, horizon=10, num_samples=10, clip=0.5)
    assert given == pytest.approx(1.5)


def test_the_coefficient_can_be_traced_and_vmapped() -> None:
    def update(kl_coef: jax.Array, target: jax.Array) -> jax.Array:
        return kl.adaptive_coef(kl_coef, 6.6, target=target, horizon=10, num_samples=10)

    given = jax.jit(jax.vmap(update))(jnp.array([1.0, 2.0]), jnp.array([6.0, 6.6]))
    np.testing.assert_allclose(given, [1.1, 2.0], rtol=1e-5)
    with pytest.raises(AssertionError):
        kl.adaptive_coef(jnp.ones(2), 6.6, target=6.0, horizon=10, num_samples=10)
