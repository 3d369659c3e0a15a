"""Losses of the value function by hand and against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
    ADVANTAGES,
    MASK,
    NEW,
    OLD,
    Loss,
    assert_close,
    every_reduction,
    every_reduction_by_loop,
)

from rlhfjax.losses import value

RETURNS, ONES = ADVANTAGES, np.ones_like(NEW)


def plain(values: np.ndarray, old: np.ndarray, returns: np.ndarray) -> np.ndarray:
    return np.square(values - returns) / 2


def clipped(values: np.ndarray, old: np.ndarray, returns: np.ndarray) -> np.ndarray:
    bounded = np.clip(values, old - 0.3, old + 0.3)
    return np.maximum(np.square(values - returns), np.square(bounded - returns)) / 2


def test_losses_and_gradients_are_those_of_the_equations_under_every_reduction() -> None:
    given = every_reduction(value.clipped_value_loss, NEW, OLD, RETURNS, MASK, clip_range=0.3)
    assert_close(given, every_reduction_by_loop(clipped, NEW, OLD, RETURNS, weights=ONES))
    given = every_reduction(value.value_loss, NEW, RETURNS, MASK)
    assert_close(given, every_reduction_by_loop(plain, NEW, OLD, RETURNS, weights=ONES))


def test_clipped_loss_by_hand() -> None:
    # Tokens: inside the range; clipped with the larger error; clipped with the smaller one.
    values, old_values = jnp.array([1.1, 2.0, 2.0]), jnp.ones(3)
    returns = jnp.array([0.1, 0.0, 5.0])
    (loss, metrics), grad = jax.value_and_grad(value.clipped_value_loss, has_aux=True)(
        values, old_values, returns, jnp.ones(3, bool), clip_range=0.5
    )
    assert loss == pytest.approx((1.0**2 + 2.0**2 + 3.5**2) / 6)
    assert metrics["clip_fraction"] == pytest.approx(1 / 3)
    assert_close(grad, [1.0 / 3, 2.0 / 3, 0.0])


@pytest.mark.parametrize("clip_range, values", [(100.0, NEW), (0.0, OLD)])
def test_a_range_that_is_never_left_gives_the_plain_loss(
    clip_range: float, values: np.ndarray
) -> None:
    """A range of 0 too, before the first step: a value on a bound has not left the range."""

    def both(loss: Loss, *arrays: np.ndarray, **options: float) -> tuple:
        (total, metrics), grad = jax.value_and_grad(loss, has_aux=True)(*arrays, MASK, **options)
        return (total, grad), metrics

    given, metrics = both(value.clipped_value_loss, values, OLD, RETURNS, clip_range=clip_range)
    assert metrics == {"clip_fraction": 0}
    expected, metrics = both(value.value_loss, values, RETURNS)
    assert metrics == {}
    assert_close(given, expected)


def test_the_range_is_traced() -> None:
    ranges = jnp.array([0.3, 100.0])
    losses = jax.jit(
        jax.vmap(lambda r: value.clipped_value_loss(NEW, OLD, RETURNS, MASK, clip_range=r)[0])
    )(ranges)
    tokens = [x[MASK] for x in (NEW, OLD, RETURNS)]
    assert_close(losses, [clipped(*tokens).mean(), plain(*tokens).mean()])
