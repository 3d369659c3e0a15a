"""Masked statistics: NumPy over the selected entries says what they are."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

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
    "whiten rows": lambda x, mask: masked.whiten(x, mask, axis=-1, eps=0.0, std_eps=1e-4),
    "mean of the moments": lambda x, mask: masked.moments(x, mask).mean,
    "variance of the moments": lambda x, mask: masked.moments(x, mask).var,
}
each_statistic = pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)


def test_fill_replaces_what_is_masked() -> None:
    np.testing.assert_array_equal(masked.fill(X, MASK), np.where(MASK, X, 0))
    np.testing.assert_array_equal(masked.fill(X, MASK, value=X[:, :1]), np.where(MASK, X, X[:, :1]))
    np.testing.assert_array_equal(jax.grad(lambda x: masked.fill(x, MASK).sum())(X), MASK)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32, bool])
def test_fill_takes_its_value_in_float32_whatever_it_fills(dtype: type) -> None:
    for value in (0.1, 1e30, -np.inf):
        filled = masked.fill(jnp.ones(2, dtype), jnp.array([True, False]), value=value)
        np.testing.assert_array_equal(filled, np.array([1, value], np.float32))
        assert filled.dtype == jnp.float32


@pytest.mark.parametrize("axis", [None, 0, -1, (0, 1)])
def test_reduced_axes_can_stay_with_size_1(axis: int | tuple[int, ...] | None) -> None:
    counts = MASK.sum(axis=axis, keepdims=True)
    sums = np.sum(X, where=MASK, axis=axis, keepdims=True)
    means = sums / np.maximum(counts, 1)
    squares = np.sum((X - means) ** 2, where=MASK, axis=axis, keepdims=True)
    for statistic, expected in (
        (masked.sum, sums),
        (masked.mean, means),
        (masked.var, squares / np.maximum(counts, 1)),
    ):
        kept = statistic(X, MASK, axis=axis, keepdims=True)
        assert kept.shape == expected.shape
        np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(statistic(X, MASK, axis=axis), kept.squeeze(axis))


def test_sum_and_mean_are_those_of_the_selected_entries() -> None:
    np.testing.assert_allclose(masked.sum(X, MASK), X[MASK].sum(), rtol=1e-6)
    np.testing.assert_allclose(masked.mean(X, MASK), X[MASK].mean(), rtol=1e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_variance_is_that_of_the_selected_entries(ddof: int) -> None:
    np.testing.assert_allclose(masked.var(X, MASK, ddof=ddof), X[MASK].var(ddof=ddof), rtol=1e-5)


def test_the_gradient_of_the_variance_is_that_by_hand() -> None:
    grad = jax.grad(lambda x: masked.var(x, MASK, ddof=1))(X)
    expected = np.where(MASK, 2 * (X - X[MASK].mean()) / (MASK.sum() - 1), 0)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("entry", [0.1, -1000.1, 3.3e7, 1e-20])
def test_equal_entries_whiten_to_0_to_the_bit_though_their_sum_is_rounded(
    entry: float, eps: float
) -> None:
    x, mask = jnp.full(8, entry), jnp.arange(8) < 7
    for run in (masked.whiten, jax.jit(masked.whiten, static_argnames="shift_mean")):
        np.testing.assert_array_equal(run(x, mask, eps=eps), np.zeros(8))
        kept = run(x, mask, eps=eps, shift_mean=False)
        np.testing.assert_array_equal(kept, np.where(mask, np.float32(entry), 0))
    assert masked.var(x, mask) == 0


def test_entries_a_bit_apart_whiten_to_plus_and_minus_1_without_an_eps() -> None:
    x = jnp.array([1.0, 1.0 + 2**-22])
    np.testing.assert_allclose(masked.whiten(x, jnp.ones(2, bool), eps=0.0), [-1, 1], rtol=1e-6)
    assert abs(masked.whiten(x, jnp.ones(2, bool))).max() < 0.01


@pytest.mark.parametrize("x", [[1e30, -1e30, 3e30], [7.0, 0.0, 0.0], [1e-30, -1e-30, 0.0]])
def test_whitening_has_a_finite_gradient_at_extremes(x: list[float]) -> None:
    mask = jnp.array([True, x[1] != 0, x[2] != 0])
    for eps in (0.0, 1e-8):
        value, grad = jax.value_and_grad(
            lambda x, eps=eps: (masked.whiten(x, mask, eps=eps) * jnp.arange(1.0, 4.0)).sum()
        )(jnp.array(x))
        assert np.isfinite(value) and np.isfinite(grad).all()


@pytest.mark.parametrize("axis", [None, -1, 0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ddof": 1, "eps": 0.0, "std_eps": 0.5},
        {"shift_mean": False, "eps": 2.0, "min_var": 20.0},
        {"min_var": 5.0, "std_eps": 0.1, "ddof": 1},
    ],
)
def test_whitening_is_that_of_a_loop_over_sets_of_entries(
    options: dict[str, Any], axis: int | None
) -> None:
    group = {None: np.zeros((4, 6)), -1: np.indices((4, 6))[0], 0: np.indices((4, 6))[1]}[axis]
    given = {"ddof": 0, "eps": 1e-8, "std_eps": 0.0, "min_var": 0.0, "shift_mean": True} | options
    expected = np.zeros((4, 6))
    for number in np.unique(group):
        chosen = (group == number) & MASK
        entries = X[chosen].astype(np.float64)
        if not entries.size:
            continue
        freedom = len(entries) - given["ddof"]
        variance = ((entries - entries.mean()) ** 2).sum() / freedom if freedom > 0 else 0.0
        std = np.sqrt(max(variance, given["min_var"]) + given["eps"]) + given["std_eps"]
        back = 0.0 if given["shift_mean"] else entries.mean()
        expected[chosen] = (entries - entries.mean()) / std + back
    whitened = masked.whiten(X, MASK, axis=axis, **options)
    np.testing.assert_allclose(whitened, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 2.0),
        ({"eps": 12.0}, 1.0),
        ({"std_eps": 6.0}, 0.5),
        ({"min_var": 1.0}, 2.0),
        ({"min_var": 16.0}, 1.0),
        ({"min_var": 11.0, "eps": 5.0, "std_eps": 4.0}, 0.5),
        ({"shift_mean": False}, 3.0),
        ({"shift_mean": False, "std_eps": 2.0}, 2.0),
    ],
)
def test_standardizing_5_by_mean_1_and_variance_4(options: dict[str, Any], expected: float) -> None:
    one, four = jnp.float32(1), jnp.float32(4)
    given = masked.standardize(jnp.array([5, 5]), one, four, **{"eps": 0.0, **options})
    np.testing.assert_array_equal(given, np.full(2, expected, np.float32))


def test_standardizing_without_a_spread_gives_0_or_the_mean_and_no_nan() -> None:
    def total(x: jax.Array, var: jax.Array, shift_mean: bool) -> jax.Array:
        one = jnp.float32(1)
        return masked.standardize(x, one, var, eps=0.0, shift_mean=shift_mean).sum()

    for shift_mean, expected in ((True, 0), (False, 2)):
        value, grads = jax.value_and_grad(total, (0, 1))(X[0, :2], jnp.float32(0), shift_mean)
        assert value == expected
        assert all((np.asarray(grad) == 0).all() for grad in grads)


def test_statistics_that_do_not_broadcast_to_the_entries_are_refused() -> None:
    masked.standardize(X, jnp.ones((4, 1)), jnp.ones(6))
    with pytest.raises(AssertionError):
        masked.standardize(X[0], jnp.ones((4, 1)), jnp.float32(1))
    with pytest.raises(AssertionError):
        masked.standardize(X, jnp.float32(1), jnp.ones((1, 4, 6)))


# Of different sizes and levels; one is empty, one a single number, one constant.
BATCHES = [np.float32(x) for x in ([5, 6, 7, 1], [], [1e3], [2, 2, 2], [-4, 0.5])]
MOMENTS = [masked.moments(jnp.asarray(batch), np.ones(len(batch), bool)) for batch in BATCHES]


def assert_moments(moments: masked.Moments, entries: np.ndarray) -> None:
    entries = entries.astype(np.float64)
    expected = (entries.mean(), entries.var(), entries.size) if entries.size else (0, 0, 0)
    np.testing.assert_allclose(dataclasses.astuple(moments), expected, rtol=1e-5)


def test_moments_are_mean_variance_and_number_of_the_selected_entries() -> None:
    assert_moments(masked.moments(X, MASK), X[MASK])
    assert_moments(masked.moments(X, np.zeros_like(MASK)), X[:0])
    for moments, batch in zip(MOMENTS, BATCHES, strict=True):
        assert_moments(moments, batch)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_merged_moments_are_those_of_the_whole_in_any_order_and_grouping(
    order: tuple[int, ...],
) -> None:
    for chosen in ([0, 1, 2], [2, 3, 4], [1, 3, 4]):
        first, second, third = (MOMENTS[chosen[at]] for at in order)
        whole = np.concatenate([BATCHES[at] for at in chosen])
        merge = masked.merge_moments
        assert_moments(merge(merge(first, second), third), whole)
        assert_moments(merge(first, merge(second, third)), whole)


def test_an_empty_batch_changes_no_moments_to_the_bit() -> None:
    for moments in MOMENTS:
        assert masked.merge_moments(moments, MOMENTS[1]) == moments
        assert masked.merge_moments(MOMENTS[1], moments) == moments


def test_moments_keep_the_digits_of_the_batch_that_outweighs_the_other() -> None:
    start = masked.Moments(*jnp.array([0.0, 1.0, 1e-24]))
    batch = masked.Moments(*jnp.array([3.0, 1e-6, 8.0]))
    merged = masked.merge_moments(start, batch)
    np.testing.assert_allclose(dataclasses.astuple(merged), dataclasses.astuple(batch), rtol=1e-6)


def test_moments_can_be_carried_through_a_scan() -> None:
    def step(moments: masked.Moments, batch: tuple[jax.Array, jax.Array]) -> tuple:
        return masked.merge_moments(moments, masked.moments(*batch)), None

    zero = masked.Moments(*jnp.zeros(3))
    assert_moments(jax.lax.scan(step, zero, (X, MASK))[0], X[MASK])


@pytest.mark.parametrize("ddof", [0, 1, 3])
def test_the_standard_deviation_of_moments_can_be_unbiased(ddof: int) -> None:
    for moments, batch in zip(MOMENTS, BATCHES, strict=True):
        expected = batch.std(ddof=ddof) if len(batch) > ddof else 0.0
        np.testing.assert_allclose(masked.moments_std(moments, ddof=ddof), expected, rtol=1e-6)


def test_the_standard_deviation_of_moments_without_a_spread_has_no_nan_in_its_gradient() -> None:
    for moments in (MOMENTS[1], MOMENTS[2]):
        grads = jax.grad(lambda moments: masked.moments_std(moments, ddof=1))(moments)
        assert all(grad == 0 for grad in dataclasses.astuple(grads))


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
