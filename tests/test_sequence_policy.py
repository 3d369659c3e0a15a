"""Losses of responses against their equations response by response, and against one another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
    ADVANTAGES,
    COUNT,
    LENGTHS,
    MASK,
    NEW,
    OF_RESPONSES,
    OLD,
    WEIGHTS,
    B,
    Equation,
    Loss,
    T,
    assert_close,
    compiled,
    every_reduction,
    every_reduction_by_loop,
    metrics_by_hand,
)

from rlhfjax import masked
from rlhfjax.losses import policy, reductions
from rlhfjax.losses import sequence_policy as sequence

SPREAD = np.repeat(OF_RESPONSES[:, None], T, axis=1)
RATIOS = [np.exp((NEW - OLD)[b][MASK[b]].astype(np.float64)) for b in range(B - 1)]


def clipped(ratio: Any, a: Any, low: float, high: float) -> Any:
    return -np.minimum(ratio * a, np.clip(ratio, 1 - low, 1 + high) * a)


def gspo(*, low: float = 3e-4, high: float = 3e-4) -> Equation:
    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        return clipped(np.exp(np.mean(new - old)), a, low, high)

    return equation


def gspo_token(*, low: float = 3e-4, high: float = 3e-4, bound: float = 10.0) -> Equation:
    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        log_ratio = np.mean(now - old) + new - now
        return clipped(np.exp(np.minimum(log_ratio, bound)), a, low, high)

    return equation


def rloo(*, low: float = 0.2, high: float = 0.2) -> Equation:
    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        return clipped(np.prod(np.exp(new - old)), a, low, high)

    return equation


def gmpo(*, low: float = 0.4, high: float = 0.4) -> Equation:
    def equation(new: np.ndarray, old: np.ndarray, a: np.ndarray, now: np.ndarray) -> np.ndarray:
        log_ratio, sign = new - old, np.sign(a)
        worse = sign * np.minimum(sign * log_ratio, sign * np.clip(log_ratio, -low, high))
        return -a * np.prod(np.exp(worse)) ** (1 / len(new))

    return equation


NARROW, WIDE = {"low": 0.02, "high": 0.3}, {"low": 0.3, "high": 0.02}


@pytest.mark.parametrize("bounds", [{}, NARROW, WIDE])
@pytest.mark.parametrize(
    "loss, equation, a",
    [
        (sequence.gspo, gspo, OF_RESPONSES),
        (sequence.gspo_token, gspo_token, ADVANTAGES),
        (sequence.rloo_clip, rloo, OF_RESPONSES),
        (sequence.gmpo, gmpo, OF_RESPONSES),
    ],
)
def test_loss_and_gradient_are_those_of_the_equation_under_every_reduction(
    loss: Loss, equation: Any, a: np.ndarray, bounds: dict[str, float]
) -> None:
    names = {"low": "clip_range", "high": "clip_range_high"}
    options = {names[name]: bound for name, bound in bounds.items()}
    given = every_reduction(loss, NEW, OLD, a, MASK, weights=WEIGHTS, **options)
    by_token = SPREAD if a.ndim == 1 else a
    assert_close(given, every_reduction_by_loop(equation(**bounds), NEW, OLD, by_token, NEW))


def test_gspo_by_token_has_an_upper_bound_of_the_log_ratio() -> None:
    arguments, options = (OLD, ADVANTAGES, MASK), {"log_ratio_clip": 0.05, "clip_range": 0.9}
    given = every_reduction(sequence.gspo_token, NEW, *arguments, weights=WEIGHTS, **options)
    equation = gspo_token(low=0.9, high=0.9, bound=0.05)
    assert_close(given, every_reduction_by_loop(equation, NEW, OLD, ADVANTAGES, NEW))


def test_gspo_by_token_is_gspo_where_advantages_and_weights_are_those_of_responses() -> None:
    options = {"weights": WEIGHTS[:, :1], "clip_range": 0.1, "clip_range_high": 0.3}
    of_responses = every_reduction(sequence.gspo, NEW, OLD, OF_RESPONSES, MASK, **options)
    of_tokens = every_reduction(sequence.gspo_token, NEW, OLD, SPREAD, MASK, **options)
    assert_close(of_tokens, of_responses)


def test_rloo_of_responses_of_one_token_is_ppo() -> None:
    new, old, a = (x[MASK][:, None] for x in (NEW, OLD, ADVANTAGES))
    mask, options = np.ones((COUNT, 1), bool), {"clip_range": 0.1, "clip_range_high": 0.3}
    assert_close(
        every_reduction(sequence.rloo_clip, new, old, a[:, 0], mask, **options),
        every_reduction(policy.ppo_clip, new, old, a, mask, **options),
    )
    _, metrics = compiled(sequence.rloo_clip)(new, old, a[:, 0], mask, **options)
    _, expected = compiled(policy.ppo_clip)(new, old, a, mask, **options)
    del expected["dual_clip_fraction"]
    assert_close(metrics, expected)


@pytest.mark.parametrize("clip_range", [0.3, 0.0])
@pytest.mark.parametrize(
    "loss, a, factor",
    [
        (sequence.gspo, OF_RESPONSES, 1),
        (sequence.gspo_token, SPREAD, 1),
        (sequence.gmpo, OF_RESPONSES, 1),
        (sequence.rloo_clip, OF_RESPONSES, LENGTHS[:, None]),
    ],
)
def test_on_the_policy_that_sampled_every_loss_has_the_gradient_of_reinforce(
    loss: Loss, a: np.ndarray, factor: Any, clip_range: float
) -> None:
    """That of `rloo_clip` is longer by the length of the response: its ratio is a product."""
    weights = np.repeat(WEIGHTS[:, :1], T, axis=1)
    options = {"clip_range": clip_range, "clip_range_high": clip_range}
    _, grads = every_reduction(loss, OLD, OLD, a, MASK, weights=weights, **options)
    _, expected = every_reduction_by_loop(
        lambda new, old, a, now: -a * new, OLD, OLD, SPREAD, OLD, weights=weights
    )
    assert_close(grads, factor * expected)


class TestMetrics:
    def options(self, **more: float) -> dict[str, float]:
        return {"clip_range": 0.1, "clip_range_high": 0.02, **more}

    @staticmethod
    def is_clipped(ratio: np.ndarray, a: np.ndarray) -> np.ndarray:
        return clipped(ratio, a, 0.1, 0.02) > -ratio * a

    def test_of_gspo_and_rloo_count_the_responses_that_have_a_token(self) -> None:
        products = np.array([ratios.prod() for ratios in RATIOS])
        for loss, ratio in (
            (sequence.gspo, products ** (1 / LENGTHS[:-1])),
            (sequence.rloo_clip, products),
        ):
            _, metrics = compiled(loss)(NEW, OLD, OF_RESPONSES, MASK, **self.options())
            is_clipped = self.is_clipped(ratio, OF_RESPONSES[:-1])
            assert_close(metrics, metrics_by_hand(np.log(ratio), ratio, is_clipped))

    def test_of_gspo_by_token_count_tokens_with_the_ratio_of_their_response(self) -> None:
        log_ratio = np.array([np.log(ratios).mean() for ratios in RATIOS]).repeat(LENGTHS[:-1])
        ratio = np.exp(np.minimum(log_ratio, 0.05))
        _, metrics = compiled(sequence.gspo_token)(
            NEW, OLD, ADVANTAGES, MASK, **self.options(log_ratio_clip=0.05)
        )
        is_clipped = self.is_clipped(ratio, ADVANTAGES[MASK])
        assert_close(metrics, metrics_by_hand(log_ratio, ratio, is_clipped))

    def test_of_gmpo_count_tokens(self) -> None:
        ratio = np.concatenate(RATIOS)
        _, metrics = compiled(sequence.gmpo)(NEW, OLD, OF_RESPONSES, MASK, **self.options())
        helps = np.where(SPREAD[MASK] > 0, np.log(ratio) > 0.02, np.log(ratio) < -0.1)
        assert_close(metrics, metrics_by_hand(np.log(ratio), ratio, helps))


@pytest.mark.parametrize(
    "loss, expected, slope",
    [
        (sequence.gspo, [-1.0003, 0, np.inf, 0, 0, 0.9997], np.inf),
        (sequence.gspo_token, [-1.0003, 0, np.exp(10.0), 0, 0, 0.9997], 0),
        (
            partial(sequence.gspo_token, log_ratio_clip=None),
            [-1.0003, 0, np.inf, 0, 0, 0.9997],
            np.inf,
        ),
        (sequence.rloo_clip, [-1.2, 0, np.inf, 0, 0, 0.8], np.inf),
        (sequence.gmpo, [-np.exp(0.4), 0, np.inf, 0, 0, np.exp(-0.4)], np.inf),
    ],
)
def test_ratios_that_overflow(loss: Loss, expected: list[float], slope: float) -> None:
    """Of log ratios of ±100 a token with an advantage of 1, 0 and -1; the last token is masked."""
    new, mask = jnp.full((6, 3), -101.0), jnp.ones((6, 3), bool).at[:, -1].set(False)
    old = new - jnp.repeat(jnp.array([100.0, -100.0]), 3)[:, None]
    a = jnp.array([1.0, 0.0, -1.0] * 2)
    a = jnp.repeat(a[:, None], 3, axis=1) if "token" in str(loss) else a

    def total(new: jax.Array) -> tuple[jax.Array, Any]:
        losses, metrics = loss(new, old, a, mask, reduce=masked.fill)
        return losses.sum(), (losses, metrics)

    grad, (losses, metrics) = jax.jit(jax.grad(total, has_aux=True))(new)
    slopes = np.zeros((6, 3))
    slopes[2] = slope
    assert_close(losses, np.where(mask, np.array(expected)[:, None], 0.0))
    assert_close(grad, np.where(mask, slopes, 0.0))
    assert not any(np.isnan(x) for x in metrics.values())


@pytest.mark.parametrize("loss", [sequence.gspo, sequence.rloo_clip, sequence.gmpo])
def test_weights_of_0_remove_a_response_even_if_its_ratio_overflows(loss: Loss) -> None:
    removed = np.array([False, True, True, False, False])
    weights = ~removed[:, None] * WEIGHTS

    @jax.jit
    def of_old(old: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(
            lambda new: loss(new, old, OF_RESPONSES, MASK, weights=weights, reduce=masked.mean)[0]
        )(NEW)

    value, grad = of_old(np.where(removed[:, None], -200, OLD))
    assert_close((value, grad), of_old(np.where(removed[:, None], NEW, OLD)))
    assert (np.asarray(grad)[removed] == 0).all() and (grad[0] != 0).any()


def test_packed_responses_have_the_loss_and_the_gradient_of_rows() -> None:
    segments = np.repeat(np.arange(1, B + 1), T)[None]

    def packed(new: jax.Array, old: jax.Array, mask: jax.Array, **options: Any) -> Any:
        (new, of_segment), (old, _) = (
            reductions.by_segment(x, mask, segments, num_segments=B) for x in (new, old)
        )
        return sequence.gspo(new, old, OF_RESPONSES[None], of_segment, clip_range=0.1, **options)

    losses, grads = every_reduction(packed, *(x.reshape(1, -1) for x in (NEW, OLD, MASK)))
    expected = every_reduction(sequence.gspo, NEW, OLD, OF_RESPONSES, MASK, clip_range=0.1)
    assert_close((losses, grads.reshape(-1, B, T)), expected)
