"""Selections of tokens against NumPy's quantile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import selection

RNG = np.random.default_rng(0)
ENTROPIES = RNG.uniform(0.0, 2.0, (4, 6)).astype(np.float32)
MASK = np.arange(6) < np.array([6, 3, 1, 0])[:, None]


def by_numpy(quantile: float) -> np.ndarray:
    return MASK & np.greater_equal(ENTROPIES, np.quantile(ENTROPIES[MASK], quantile))


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 0.8, 0.93, 1.0])
def test_tokens_at_or_above_the_quantile_of_the_real_ones(quantile: float) -> None:
    given = selection.high_entropy_mask(ENTROPIES, MASK, quantile=quantile)
    np.testing.assert_array_equal(given, by_numpy(quantile))
    assert given.dtype == jnp.bool_


def test_all_that_tie_with_the_quantile_are_selected() -> None:
    entropies = jnp.array([[1.0, 2.0, 2.0, 2.0, 9.0]])
    mask = jnp.array([[True, True, True, True, False]])
    for quantile in (0.5, 0.9):
        given = selection.high_entropy_mask(entropies, mask, quantile=quantile)
        np.testing.assert_array_equal(given, [[False, True, True, True, False]])


def test_without_a_real_token_nothing_is_selected() -> None:
    assert not selection.high_entropy_mask(ENTROPIES, np.zeros_like(MASK), quantile=0.0).any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_entropies_are_not_read(garbage: float) -> None:
    filled = np.where(MASK, ENTROPIES, np.float32(garbage))
    np.testing.assert_array_equal(
        selection.high_entropy_mask(filled, MASK, quantile=0.8),
        selection.high_entropy_mask(ENTROPIES, MASK, quantile=0.8),
    )


def test_the_quantile_is_traced() -> None:
    given = jax.jit(jax.vmap(lambda q: selection.high_entropy_mask(ENTROPIES, MASK, quantile=q)))(
        jnp.array([0.2, 0.8])
    )
    for selected, quantile in zip(given, (0.2, 0.8), strict=True):
        np.testing.assert_array_equal(selected, by_numpy(quantile))


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError):
        selection.high_entropy_mask(ENTROPIES, MASK[:, :-1], quantile=0.5)
    with pytest.raises(AssertionError):
        selection.high_entropy_mask(ENTROPIES, MASK.astype(np.float32), quantile=0.5)
