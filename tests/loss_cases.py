"""Arrays for the tests of losses, and what a loss is by a loop over responses, in float64."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.losses import reductions
from rlhfjax.types import Reduction

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
Equation = Callable[..., np.ndarray]
"""The losses [n] of a response's n tokens of: log-probabilities that have a gradient, those of the
sampler, advantages, and log-probabilities that have no gradient."""

RNG = np.random.default_rng(0)
B, T = 5, 6
# Responses that are full, with gaps, short, of one token, and empty.
MASK = np.array(
    [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0] * T], bool
)
COUNT, LENGTHS = MASK.sum(), MASK.sum(-1)
OLD = RNG.uniform(-2.0, -0.5, (B, T)).astype(np.float32)
NEW = OLD + RNG.normal(0.0, 0.4, (B, T)).astype(np.float32)
ADVANTAGES = RNG.normal(size=(B, T)).astype(np.float32)
ADVANTAGES[0, 1] = 0.0
OF_RESPONSES = np.array([1.3, -0.7, -1.1, 0.4, 2.0], np.float32)
WEIGHTS = RNG.uniform(0.5, 2.0, (B, T)).astype(np.float32)
WEIGHTS[1, 1] = 0.0

Rows = list[np.ndarray]
REDUCTIONS: dict[str, tuple[Reduction, Callable[[Rows], Any]]] = {
    "DAPO": (reductions.token_mean, lambda rows: np.concatenate(rows).mean()),
    "GRPO": (reductions.sequence_mean, lambda rows: np.mean([r.mean() for r in rows if r.size])),
    "GRPO, TRL": (
        partial(reductions.sequence_mean, count_empty=True),
        lambda rows: sum(r.mean() for r in rows if r.size) / len(rows),
    ),
    "sum": (reductions.sequence_sum, lambda rows: np.mean([r.sum() for r in rows if r.size])),
    "Dr.GRPO": (
        partial(reductions.constant_length, length=9.0),
        lambda rows: np.mean([r.sum() / 9.0 for r in rows if r.size]),
    ),
    "Dr.GRPO, TRL": (
        partial(reductions.constant_length, length=9.0, count_empty=True),
        lambda rows: sum(r.sum() / 9.0 for r in rows) / len(rows),
    ),
    "Dr.GRPO, verl": (
        partial(reductions.constant_total, total=11.0),
        lambda rows: sum(r.sum() for r in rows) / 11.0,
    ),
}


compiled = cache(jax.jit)


def every_reduction(loss: Loss, *arrays: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """The loss [R] under each reduction, and its derivatives [R, …] by the first array."""
    grads, losses = _derivatives(loss)(*arrays, **options)
    return losses, grads


@cache
def _derivatives(loss: Loss) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def reduced(*arrays: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
        losses = loss(*arrays, reduce=_every, **options)[0]
        return losses, losses

    return jax.jit(jax.jacrev(reduced, has_aux=True))


def _every(x: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.stack([reduce(x, mask) for reduce, _ in REDUCTIONS.values()])


def every_reduction_by_loop(
    equation: Equation, x: np.ndarray, *others: np.ndarray, weights: np.ndarray = WEIGHTS
) -> tuple[np.ndarray, np.ndarray]:
    """The same by a loop over the rows, and by central differences."""

    def reduced(x: np.ndarray) -> np.ndarray:
        rows = [np.zeros(0)] * len(MASK)
        for b in np.flatnonzero(MASK.any(-1)):
            real = (array[b][MASK[b]].astype(np.float64) for array in (x, *others))
            rows[b] = weights[b][MASK[b]] * equation(*real)
        return np.array([of_rows(rows) for _, of_rows in REDUCTIONS.values()])

    x, step = x.astype(np.float64), 1e-6
    grads = np.zeros((len(REDUCTIONS), *x.shape))
    for at in np.ndindex(x.shape):
        shift = np.zeros(x.shape)
        shift[at] = step
        grads[(slice(None), *at)] = (reduced(x + shift) - reduced(x - shift)) / (2 * step)
    return reduced(x), grads


def metrics_by_hand(
    log_ratio: np.ndarray, ratio: np.ndarray, is_clipped: np.ndarray
) -> dict[str, float]:
    return {
        "clip_fraction": is_clipped.mean(),
        "approx_kl": np.square(log_ratio).mean() / 2,
        "ratio": ratio.mean(),
        "ratio_var": ratio.var(),
    }


def assert_close(given: Any, expected: Any, *, rtol: float = 2e-5, atol: float = 1e-6) -> None:
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), given, expected)
