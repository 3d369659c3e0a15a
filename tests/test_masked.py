"""Masked statistics: NumPy over the selected entries says what they are."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import masked

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, (4, 6)).astype(np.float32)
MASK = RNG.random((4, 6)) < 0.6
MASK[2] = False

Statistic = Callable[[jax.Array, jax.Array], jax.Array]
STATISTICS: dict[str, Statistic] = {
    "sum": masked.sum,
    "mean": masked.mean,
    "mean of rows": lambda x, mask: masked.mean(x, mask, axis=-1),
    "biased variance": masked.var,
    "unbiased variance": lambda x, mask: masked.var(x, mask, ddof=1),
    "whiten": masked.whiten,
    "whiten, mean kept": lambda x, mask: masked.whiten(x, mask, shift_mean=False, ddof=1),
}
each_statistic = pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)


def test_sum_and_mean_are_those_of_the_selected_entries() -> None:
    np.testing.assert_allclose(masked.sum(X, MASK), X[MASK].sum(), rtol=1e-6)
    np.testing.assert_allclose(masked.mean(X, MASK), X[MASK].mean(), rtol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_variance_is_that_of_the_selected_entries(ddof: int) -> None:
    np.testing.assert_allclose(masked.var(X, MASK, ddof=ddof), X[MASK].var(ddof=ddof), rtol=1e-5)


def test_an_axis_is_reduced_row_by_row() -> None:
    rows = [row[mask] for row, mask in zip(X, MASK, strict=True)]
    sums = [row.sum() for row in rows]
    means = [row.mean() if row.size else 0.0 for row in rows]
    variances = [row.var(ddof=1) if row.size > 1 else 0.0 for row in rows]
    np.testing.assert_allclose(masked.sum(X, MASK, axis=-1), sums, rtol=1e-5)
    np.testing.assert_allclose(masked.mean(X, MASK, axis=-1), means, rtol=1e-5)
    np.testing.assert_allclose(masked.var(X, MASK, axis=-1, ddof=1), variances, rtol=1e-5)
    np.testing.assert_allclose(masked.sum(X, MASK, axis=(0, 1)), X[MASK].sum(), rtol=1e-5)


def test_a_mean_of_means_weighted_by_their_counts_is_the_mean() -> None:
    means, counts = masked.mean(X, MASK, axis=-1), MASK.sum(-1)
    np.testing.assert_allclose(
        (means * counts).sum() / counts.sum(), masked.mean(X, MASK), rtol=1e-5
    )


def test_variance_survives_a_mean_that_dwarfs_it() -> None:
    x = jnp.array([10000.0, 10001.0, 10002.0])
    assert masked.var(x, jnp.ones(3, bool)) == pytest.approx(2 / 3, rel=1e-5)


@pytest.mark.parametrize("count, ddof", [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3)])
def test_variance_without_a_degree_of_freedom_is_0(count: int, ddof: int) -> None:
    x, mask = jnp.array([1.0, 4.0, 9.0]), jnp.arange(3) < count
    assert masked.var(x, mask, ddof=ddof) == 0
    grad = jax.grad(lambda x: masked.var(x, mask, ddof=ddof))(x)
    np.testing.assert_array_equal(grad, np.zeros(3))


@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_entries_have_mean_0_and_variance_1(ddof: int) -> None:
    whitened = np.asarray(masked.whiten(X, MASK, ddof=ddof))
    assert whitened[MASK].mean() == pytest.approx(0.0, abs=1e-6)
    assert whitened[MASK].var(ddof=ddof) == pytest.approx(1.0, rel=1e-5)
    assert (whitened[~MASK] == 0).all()


def test_whitening_can_keep_the_mean() -> None:
    kept = np.asarray(masked.whiten(X, MASK, shift_mean=False))
    shifted = np.asarray(masked.whiten(X, MASK))
    np.testing.assert_allclose(kept[MASK], shifted[MASK] + X[MASK].mean(), rtol=1e-5, atol=1e-6)
    assert (kept[~MASK] == 0).all()


def test_eps_is_added_to_the_variance() -> None:
    x = jnp.array([-1.0, 1.0])
    whitened = masked.whiten(x, jnp.ones(2, bool), eps=3.0)
    np.testing.assert_allclose(whitened, [-0.5, 0.5], rtol=1e-6)


def test_equal_entries_whiten_to_0() -> None:
    np.testing.assert_array_equal(masked.whiten(jnp.full(3, 5.0), jnp.ones(3, bool)), np.zeros(3))


def test_positions_count_the_real_tokens_before_each() -> None:
    mask = jnp.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 2, 2]]
    np.testing.assert_array_equal(masked.positions(mask), expected)
    np.testing.assert_array_equal(jax.vmap(masked.positions)(mask), expected)
    assert masked.positions(mask).dtype == jnp.int32


@each_statistic
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_entries_are_ignored_to_the_last_bit(statistic: Statistic, garbage: float) -> None:
    def total(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = statistic(x, MASK)
        return jnp.sum(value * jnp.cos(jnp.arange(value.size)).reshape(value.shape)), value

    differentiated = jax.grad(total, has_aux=True)
    clean_grad, clean = differentiated(jnp.where(MASK, X, 0.0))
    grad, value = differentiated(jnp.where(MASK, X, garbage))
    np.testing.assert_array_equal(value, clean)
    np.testing.assert_array_equal(grad, clean_grad)
    assert np.isfinite(grad).all() and (np.asarray(grad)[~MASK] == 0).all()


@each_statistic
def test_nothing_selected_gives_0(statistic: Statistic) -> None:
    assert (np.asarray(statistic(X, np.zeros_like(MASK))) == 0).all()


@each_statistic
def test_results_are_float32_and_the_same_under_jit(statistic: Statistic) -> None:
    value = statistic(X, MASK)
    np.testing.assert_allclose(jax.jit(statistic)(X, MASK), value, rtol=1e-5, atol=1e-6)
    assert statistic(jnp.asarray(X, jnp.bfloat16), MASK).dtype == jnp.float32
    assert statistic(jnp.ones((4, 6), jnp.int32), MASK).dtype == jnp.float32


@pytest.mark.parametrize("statistic", [masked.sum, masked.mean, masked.var])
def test_an_axis_equals_vmap(statistic: Callable[..., jax.Array]) -> None:
    np.testing.assert_allclose(
        jax.vmap(statistic)(X, MASK), statistic(X, MASK, axis=-1), rtol=1e-5, atol=1e-6
    )


@each_statistic
def test_a_mask_that_is_not_bool_or_does_not_fit_is_refused(statistic: Statistic) -> None:
    with pytest.raises(AssertionError):
        statistic(X, MASK.astype(np.float32))
    with pytest.raises(AssertionError):
        statistic(X, MASK[:1])
