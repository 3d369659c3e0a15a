"""KL estimators against the exact divergence of a distribution that can be enumerated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import kl

Estimator = Callable[..., jax.Array]
ESTIMATORS: list[Estimator] = [kl.k1, kl.k2, kl.k3, kl.absolute]
# Value and derivative at x = log π - log π_ref, in float64.
BY_HAND: dict[Estimator, tuple[Callable[..., float], Callable[..., float]]] = {
    kl.k1: (lambda x: x, lambda x: 1.0),
    kl.k2: (lambda x: x**2 / 2, lambda x: x),
    kl.k3: (lambda x: np.exp(-x) - 1 + x, lambda x: 1 - np.exp(-x)),
    kl.absolute: (abs, np.sign),
}

LOGITS = jnp.array([0.3, -1.0, 2.0, 0.7])
POLICY = jax.nn.log_softmax(LOGITS)
REF_LOGITS = jnp.array([1.0, 0.5, 0.2, -0.4])
REFERENCE = jax.nn.log_softmax(REF_LOGITS)
EXACT = float(jnp.sum(jnp.exp(POLICY) * (POLICY - REFERENCE)))


def test_values_by_hand() -> None:
    log_probs, ref_log_probs = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
    log2 = np.log(2.0)
    np.testing.assert_allclose(kl.k1(log_probs, ref_log_probs), [log2, -log2], rtol=1e-6)
    np.testing.assert_allclose(kl.k2(log_probs, ref_log_probs), [log2**2 / 2] * 2, rtol=1e-6)
    np.testing.assert_allclose(
        kl.k3(log_probs, ref_log_probs), [0.5 - 1 + log2, 2 - 1 - log2], rtol=1e-6
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum())


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p ‖ q), term by term."""
    return sum(np.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if a > -np.inf)


def total_variation(log_p: np.ndarray, log_q: np.ndarray) -> float:
    return np.abs(np.exp(log_p) - np.exp(log_q)).sum() / 2


def slope(function: Callable[[np.ndarray, np.ndarray], float]) -> np.ndarray:
    """The gradient of a function of (π, π_ref) by the policy's logits, from differences."""
    logits, step = np.asarray(LOGITS, np.float64), 1e-5 * np.eye(4)
    reference = log_softmax(REF_LOGITS)
    rises = [
        function(log_softmax(logits + s), reference) - function(log_softmax(logits - s), reference)
        for s in step
    ]
    return np.array(rises) / 2e-5


def expected_under_the_policy(logits: jax.Array, estimator: Estimator) -> jax.Array:
    """Of an estimate in a loss, over all tokens that may be sampled; sampling has no gradient."""
    return jnp.sum(jnp.exp(POLICY) * estimator(jax.nn.log_softmax(logits), REFERENCE))


def k3_with_the_gradient_of_k2(log_probs: jax.Array, ref_log_probs: jax.Array) -> jax.Array:
    return kl.straight_through(kl.k3(log_probs, ref_log_probs), kl.k2(log_probs, ref_log_probs))


@pytest.mark.parametrize(
    "estimator, derivative, pulls_along",
    [
        (kl.k1, lambda x: np.ones(4), np.zeros(4)),
        (kl.k2, lambda x: x, slope(divergence)),
        (kl.k3, lambda x: 1 - np.exp(-x), slope(lambda p, q: divergence(q, p))),
        (kl.absolute, np.sign, 2 * slope(total_variation)),
        (k3_with_the_gradient_of_k2, lambda x: x, slope(divergence)),
    ],
    ids=["k1", "k2", "k3", "absolute", "straight_through"],
)
def test_the_table_of_gradients_row_by_row(
    estimator: Estimator, derivative: Callable[..., np.ndarray], pulls_along: np.ndarray
) -> None:
    by_token = jax.grad(lambda policy: estimator(policy, REFERENCE).sum())(POLICY)
    np.testing.assert_allclose(by_token, derivative(POLICY - REFERENCE), rtol=1e-5)
    grad = jax.grad(expected_under_the_policy)(LOGITS, estimator)
    np.testing.assert_allclose(grad, pulls_along, rtol=1e-4, atol=1e-6)


def test_as_a_reward_k1_gives_the_gradient_of_the_divergence() -> None:
    def policy_gradient(logits: jax.Array) -> jax.Array:
        return jnp.sum(jnp.exp(POLICY) * kl.k1(POLICY, REFERENCE) * jax.nn.log_softmax(logits))

    np.testing.assert_allclose(
        jax.grad(policy_gradient)(LOGITS), slope(divergence), rtol=1e-4, atol=1e-6
    )


def test_of_close_policies_k2_and_k3_vary_less_than_k1_and_the_absolute_ratio_always() -> None:
    for reference, smaller in (
        (POLICY + 0.1 * (REFERENCE - POLICY), {kl.k2, kl.k3, kl.absolute}),
        (jax.nn.log_softmax(LOGITS + 3 * (REF_LOGITS - LOGITS)), {kl.absolute}),
    ):
        estimates = {e: np.asarray(e(POLICY, reference), np.float64) for e in ESTIMATORS}
        weights = np.exp(log_softmax(LOGITS))
        spread = {e: weights @ (values - weights @ values) ** 2 for e, values in estimates.items()}
        assert {e for e in ESTIMATORS if spread[e] < spread[kl.k1]} == smaller


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3, k3_with_the_gradient_of_k2])
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


def test_k3_is_never_negative_however_small_the_difference() -> None:
    sizes = jnp.geomspace(1e-12, 80.0, 1000)
    for run in (kl.k3, jax.jit(kl.k3)):
        for log_ratio in (sizes, -sizes):
            assert (run(log_ratio, jnp.zeros(1000)) >= 0).all()


# From where an exponential, then a square overflows, to a token that one policy excludes.
RATIOS = np.array([0.0, 1e-4, 0.3, 2.0, 15.0, 85.0, 95.0, 1e4, 1e25, np.inf])


@pytest.mark.parametrize("bound", [10.0, np.array(4.0, np.float32)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_bound_holds_the_estimate_and_stops_its_gradient(
    estimator: Estimator, bound: float
) -> None:
    log_ratios = np.concatenate([-RATIOS, RATIOS])
    function, derivative = BY_HAND[estimator]
    with np.errstate(over="ignore", invalid="ignore"):
        estimates = np.array([function(x) for x in log_ratios])
        slopes = np.array([derivative(x) for x in log_ratios])
    # exp(inf) - inf is not a number to NumPy either.
    estimates = np.nan_to_num(estimates, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    run = jax.vmap(jax.value_and_grad(lambda x: estimator(x, jnp.float32(0), bound=bound)))
    values, grads = jax.jit(run)(jnp.float32(log_ratios))
    np.testing.assert_allclose(values, np.clip(estimates, -bound, bound), rtol=1e-5, atol=1e-8)
    inside = abs(estimates) < bound
    np.testing.assert_allclose(grads, np.where(inside, slopes, 0), rtol=1e-5, atol=1e-7)


def test_k3_can_hold_the_log_ratio_before_the_exponential() -> None:
    log_ratios = jnp.array([-jnp.inf, -1e25, -95.0, -3.0, 0.5, 3.0, 1e4, jnp.inf])
    held = np.clip(np.asarray(log_ratios, np.float64), -2, 2)
    for bound in (None, 100.0, 3.0):
        values, grads = jax.vmap(
            jax.value_and_grad(
                lambda x, bound=bound: kl.k3(x, jnp.float32(0), log_ratio_clip=2.0, bound=bound)
            )
        )(log_ratios)
        expected = np.minimum(np.exp(-held) - 1 + held, np.inf if bound is None else bound)
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        np.testing.assert_allclose(grads, [0] * 4 + [1 - np.exp(-0.5)] + [0] * 3, rtol=1e-6)


def test_k3_without_a_bound_overflows_to_infinity_and_not_to_nan() -> None:
    log_ratios = jnp.array([-80.0, -95.0, -1e25, -jnp.inf])
    values, grads = jax.vmap(jax.value_and_grad(kl.k3))(log_ratios, jnp.zeros(4))
    np.testing.assert_allclose(values, [np.exp(80.0), np.inf, np.inf, np.inf], rtol=1e-5)
    np.testing.assert_allclose(grads, [-np.exp(80.0), -np.inf, -np.inf, 0], rtol=1e-5)


def test_straight_through_keeps_the_value_to_the_bit() -> None:
    value, gradient = jnp.array([1e-6, 0.1, 3e8]), jnp.array([1e4, -7.3, 1e-3])
    given, grads = jax.vjp(kl.straight_through, value, gradient)
    np.testing.assert_array_equal(given, value)
    to_value, to_gradient = grads(jnp.ones(3))
    np.testing.assert_array_equal(to_value, np.zeros(3))
    np.testing.assert_array_equal(to_gradient, np.ones(3))
    assert kl.straight_through(jnp.ones(1, int), jnp.ones(1, jnp.bfloat16)).dtype == jnp.float32
    with pytest.raises(AssertionError):
        kl.straight_through(value, gradient[:1])


INF = np.inf
DISTRIBUTIONS = [  # logits, reference logits, KL if it is not to be taken from a loop
    ([0.3, -1.0, 2.0, 0.7], [1.0, 0.5, 0.2, -0.4], None),
    ([1e4, 1e4 + 1, 1e4 - 2, 0.0], [-1e4, -1e4 + 2, -1e4, -1e4], None),
    ([300.0, -300.0, 0.0, 0.0], [-300.0, 300.0, 0.0, 0.0], None),
    ([0.5, 0.5, 0.5, 0.5], [7.0, 7.0, 7.0, 7.0], 0.0),
    ([0.3, -INF, 2.0, -INF], [1.0, 0.5, 0.2, -0.4], None),
    ([0.3, -INF, 2.0, -INF], [1.0, -INF, 0.2, -INF], None),
    ([-INF, -INF, 2.0, -INF], [1.0, 0.5, 0.2, -INF], None),
    ([0.3, -1.0, 2.0, 0.7], [1.0, -INF, 0.2, -0.4], INF),
    ([0.3, -1.0, 2.0, 0.7], [-INF, -INF, -INF, -INF], INF),
    ([-INF, -INF, -INF, -INF], [1.0, 0.5, 0.2, -0.4], 0.0),
]


@pytest.mark.parametrize("logits, ref_logits, known", DISTRIBUTIONS)
def test_the_exact_divergence_and_its_gradients(
    logits: list[float], ref_logits: list[float], known: float | None
) -> None:
    value, grads = jax.jit(
        jax.value_and_grad(lambda a, b: kl.categorical(logits=a, ref_logits=b), (0, 1))
    )(jnp.float32(logits), jnp.float32(ref_logits))
    expected, own_grad, ref_grad = known, np.zeros(4), np.zeros(4)
    if known is None:
        shifted, ref_shifted = (
            np.array(logits) - max(logits),
            np.array(ref_logits) - max(ref_logits),
        )
        log_p, log_q = log_softmax(shifted), log_softmax(ref_shifted)
        p, q = np.exp(log_p), np.exp(log_q)
        expected = divergence(log_p, log_q)
        ratio = np.where(p > 0, log_p - np.where(p > 0, log_q, 0), 0)
        own_grad, ref_grad = np.where(p > 0, p * (ratio - expected), 0), q - p
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grads[0], own_grad, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(grads[1], ref_grad, rtol=1e-3, atol=1e-6)


def test_the_exact_divergence_of_all_log_probabilities_is_that_of_the_logits() -> None:
    rng = np.random.default_rng(1)
    logits, ref_logits = rng.normal(0, 2, (2, 3, 5)).astype(np.float32)
    logits[1, 2] = -np.inf
    log_p, log_q = (np.array([log_softmax(row) for row in x]) for x in (logits, ref_logits))
    expected = [divergence(a, b) for a, b in zip(log_p, log_q, strict=True)]
    given = kl.categorical(logits=logits, ref_logits=ref_logits)
    np.testing.assert_allclose(given, expected, rtol=1e-5)
    log_q[1, 2] = np.nan  # Whatever the reference says of a token without probability.
    given = kl.of_distributions(log_probs=jnp.float32(log_p), ref_log_probs=jnp.float32(log_q))
    np.testing.assert_allclose(given, expected, rtol=1e-5)
    swapped = kl.categorical(logits=ref_logits, ref_logits=logits)
    assert swapped[1] == np.inf and abs(swapped[0] - given[0]) > 1e-2
    assert kl.categorical(logits=jnp.bfloat16(logits), ref_logits=logits).dtype == jnp.float32
    for function in (
        lambda a, b: kl.categorical(logits=a, ref_logits=b),
        lambda a, b: kl.of_distributions(log_probs=a, ref_log_probs=b),
    ):
        with pytest.raises(AssertionError):
            function(logits, ref_logits[:1])


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


def test_an_infinite_horizon_is_the_fixed_coefficient() -> None:
    for measured in (-5.0, 6.0, 1e6):
        given = kl.adaptive_coef(0.3, measured, target=6.0, horizon=np.inf, num_samples=100)
        assert given == np.float32(0.3)


def test_the_coefficient_can_be_traced_and_vmapped() -> None:
    def update(kl_coef: jax.Array, target: jax.Array) -> jax.Array:
        return kl.adaptive_coef(kl_coef, 6.6, target=target, horizon=10, num_samples=10)

    given = jax.jit(jax.vmap(update))(jnp.array([1.0, 2.0]), jnp.array([6.0, 6.6]))
    np.testing.assert_allclose(given, [1.1, 2.0], rtol=1e-5)
    with pytest.raises(AssertionError):
        kl.adaptive_coef(jnp.ones(2), 6.6, target=6.0, horizon=10, num_samples=10)
