"""Advantages within groups against a loop over the responses of each group."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import advantages

RNG = np.random.default_rng(0)
# Groups of 5, 4, 2, 2 and 1, of which the mask leaves 4, 2, 2, 1 and 1.
IDS = np.array([7, -3, 7, 0, -3, 7, 100, 0, 7, -3, 7, -3, 42, 42], np.int32)
MASK = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 1], bool)
EVERYTHING = np.ones_like(MASK)
SCORES = RNG.normal(size=IDS.size).astype(np.float32)
SCORES[2] = SCORES[5]
SCORES[[3, 11]] = 0.0
LENGTHS = RNG.integers(1, 9, IDS.size).astype(np.int32)
LENGTHS[5] = 0

Function = Callable[..., jax.Array]


def opo(
    scores: jax.Array, ids: jax.Array, mask: Any, lengths: np.ndarray = LENGTHS, **options: Any
) -> jax.Array:
    return advantages.opo(scores, lengths[: len(scores)], ids, mask, **options)


# Given the own score, those of the group and the position in it, and the group's lengths.
BY_HAND: dict[str, tuple[Function, Callable[..., float]]] = {
    "group_relative": (advantages.group_relative, lambda own, group, at, _: own - group.mean()),
    "leave_one_out": (
        advantages.leave_one_out,
        lambda own, group, at, _: own - np.delete(group, at).mean(),
    ),
    "opo": (
        opo,
        lambda own, group, at, lengths: own - (group * lengths).sum() / lengths.sum(),
    ),
    "pass_at_k": (
        advantages.pass_at_k,
        lambda own, group, at, _: max(0.0, own - np.delete(group, at).max()),
    ),
}
each_function = pytest.mark.parametrize("function, of_response", BY_HAND.values(), ids=BY_HAND)
each_mask = pytest.mark.parametrize("mask", [EVERYTHING, MASK], ids=["all", "masked"])


def members(response: int, mask: np.ndarray) -> list[int]:
    """Those of the same group that count, or nobody if the response does not count itself."""
    same = [other for other in range(IDS.size) if IDS[other] == IDS[response] and mask[other]]
    return same if mask[response] else []


def by_loop(
    of_response: Callable[..., float],
    mask: np.ndarray,
    *,
    keep_singletons: bool = False,
    scores: np.ndarray = SCORES,
) -> np.ndarray:
    result = np.zeros(IDS.size)
    for response in range(IDS.size):
        group = members(response, mask)
        own = np.float64(scores[response])
        if len(group) > 1:
            values, lengths = scores[group].astype(np.float64), LENGTHS[group]
            result[response] = of_response(own, values, group.index(response), lengths)
        elif group and keep_singletons:
            result[response] = own
    return result


def std_by_loop(scores: np.ndarray, mask: np.ndarray, ddof: int) -> np.ndarray:
    """Of each response's group; NaN where the group is too small to have one."""
    result = np.full(IDS.size, np.nan)
    for response in range(IDS.size):
        group = scores[members(response, mask)].astype(np.float64)
        if len(group) > ddof:
            result[response] = np.sqrt(((group - group.mean()) ** 2).sum() / (len(group) - ddof))
    return result


def close(given: jax.Array, expected: np.ndarray) -> None:
    assert given.dtype == jnp.float32
    np.testing.assert_allclose(given, expected, rtol=2e-5, atol=1e-6)


@each_mask
@each_function
def test_advantages_are_those_of_a_loop_over_the_groups(
    function: Function, of_response: Callable[..., float], mask: np.ndarray
) -> None:
    close(function(SCORES, IDS, mask), by_loop(of_response, mask))
    close(
        function(SCORES.astype(np.float16), IDS, mask),
        by_loop(of_response, mask, scores=SCORES.astype(np.float16)),
    )
    if function is not advantages.pass_at_k:
        expected = by_loop(of_response, mask, keep_singletons=True)
        close(function(SCORES, IDS, mask, keep_singletons=True), expected)


@each_mask
def test_gpg_scales_by_the_share_of_scores_that_are_not_0(mask: np.ndarray) -> None:
    scale = mask.sum() / (mask & (SCORES != 0)).sum()
    for keep in (False, True):
        expected = by_loop(BY_HAND["group_relative"][1], mask, keep_singletons=keep)
        close(advantages.gpg(SCORES, IDS, mask, keep_singletons=keep), scale * expected)
    zeros = np.zeros_like(SCORES)
    np.testing.assert_array_equal(advantages.gpg(zeros, IDS, mask), zeros)


def test_a_group_without_tokens_has_the_baseline_0_of_opo() -> None:
    given = advantages.opo(jnp.array([3.0, 5.0]), jnp.array([0, 0]), jnp.array([1, 1]))
    np.testing.assert_array_equal(given, [3, 5])


@each_mask
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ddof": 0, "eps": 1e-2},
        {"eps": 0.0},
        {"ddof": 2},
        {"min_std": 0.5, "eps": 0.1},
        {"min_std": 1e3, "eps": 0.0},
    ],
)
def test_scaling_by_the_deviation_of_the_group(mask: np.ndarray, options: dict[str, Any]) -> None:
    baseline = RNG.normal(size=IDS.size).astype(np.float32)
    given = advantages.scale_by_group_std(baseline, SCORES, IDS, mask, **options)
    settings = {"ddof": 1, "eps": 1e-4, "min_std": 0.0, **options}
    std = std_by_loop(SCORES, mask, settings["ddof"])
    divisor = np.maximum(std, settings["min_std"]) + settings["eps"]
    close(given, np.where(mask, baseline / np.where(np.isnan(std), 1, divisor), 0))


def test_by_hand() -> None:
    scores, ids = jnp.array([1.0, 0.0, 0.0, 1.0, 5.0, 1.0]), jnp.array([2, 2, 9, 2, 9, 2])
    relative = advantages.group_relative(scores, ids)
    np.testing.assert_array_equal(relative, [0.25, -0.75, -2.5, 0.25, 2.5, 0.25])
    np.testing.assert_allclose(
        advantages.leave_one_out(scores, ids), [1 / 3, -1, -5, 1 / 3, 5, 1 / 3], rtol=1e-6
    )
    np.testing.assert_array_equal(advantages.pass_at_k(scores, ids), [0, 0, 0, 0, 5, 0])
    lengths = jnp.array([1, 5, 3, 1, 1, 1])
    np.testing.assert_array_equal(
        advantages.opo(scores, lengths, ids), [0.625, -0.375, -1.25, 0.625, 3.75, 0.625]
    )
    np.testing.assert_array_equal(advantages.gpg(scores, ids), relative * (6 / 4))
    scaled = advantages.scale_by_group_std(relative, scores, ids, eps=0.0)
    np.testing.assert_allclose(scaled, [0.5, -1.5, -(0.5**0.5), 0.5, 0.5**0.5, 0.5], rtol=1e-6)


@each_mask
def test_relative_to_all_is_a_share_of_relative_to_the_others(mask: np.ndarray) -> None:
    sizes = np.array([len(members(response, mask)) for response in range(IDS.size)])
    share = (sizes - 1) / np.maximum(sizes, 1)
    others = advantages.leave_one_out(SCORES, IDS, mask)
    close(advantages.group_relative(SCORES, IDS, mask), share * others)


@each_mask
def test_advantages_of_a_group_cancel(mask: np.ndarray) -> None:
    for given, weights in (
        (advantages.group_relative(SCORES, IDS, mask), 1),
        (advantages.leave_one_out(SCORES, IDS, mask), 1),
        (advantages.opo(SCORES, LENGTHS, IDS, mask), LENGTHS),
    ):
        for response in range(IDS.size):
            assert abs(np.asarray(given * weights)[members(response, mask)].sum()) < 1e-5


@each_mask
@each_function
def test_shifted_scores_have_the_same_advantages(
    function: Function, of_response: Callable[..., float], mask: np.ndarray
) -> None:
    np.testing.assert_allclose(
        function(SCORES + 64, IDS, mask), function(SCORES, IDS, mask), atol=3e-5
    )


@each_mask
@each_function
def test_normalised_advantages_have_no_scale(
    function: Function, of_response: Callable[..., float], mask: np.ndarray
) -> None:
    def normalised(scores: np.ndarray, eps: float) -> jax.Array:
        given = function(scores, IDS, mask)
        return advantages.scale_by_group_std(given, scores, IDS, mask, eps=eps)

    close(function(1e3 * SCORES, IDS, mask), 1e3 * function(SCORES, IDS, mask))
    for scale in (1e-6, 1e6):
        close(normalised(scale * SCORES, 0.0), normalised(SCORES, 0.0))
    assert abs(normalised(1e-6 * SCORES, 1e-2)).max() < 1e-3


@each_function
def test_permuted_responses_have_permuted_advantages(
    function: Function, of_response: Callable[..., float]
) -> None:
    order = RNG.permutation(IDS.size)
    options = {"lengths": LENGTHS[order]} if function is opo else {}
    expected = by_loop(of_response, MASK)[order]
    for ids in (IDS[order], 5 - 3 * IDS[order]):
        close(function(SCORES[order], ids, MASK[order], **options), expected)


GROUP_OF_7 = np.full(7, 3, np.int32)


@pytest.mark.parametrize("function", [*(f for f, _ in BY_HAND.values()), advantages.gpg])
def test_equal_scores_have_no_advantage_to_the_bit_whatever_the_eps(
    function: Function,
) -> None:
    def scaled(scores: jax.Array, eps: float) -> jax.Array:
        given = function(scores, GROUP_OF_7, None)
        return advantages.scale_by_group_std(given, scores, GROUP_OF_7, eps=eps)

    compiled = jax.jit(scaled)
    for score in (0.1, -1000.1, 3.3e7, 1e-20, 0.0):
        for eps in (0.0, 1e-9):
            for run in (scaled, compiled):
                np.testing.assert_array_equal(run(jnp.full(7, score), eps), np.zeros(7))


def test_of_nearly_equal_scores_eps_decides() -> None:
    scores = np.ones(7, np.float32)
    scores[3] += 2**-10
    relative = (scores - 1) - 2**-10 / 7
    given = advantages.group_relative(scores, GROUP_OF_7)
    np.testing.assert_allclose(given, relative, rtol=1e-3)
    std = 2**-10 / 7**0.5
    for eps in (0.0, 1e-9, 1e-4, 1e-2):
        scaled = advantages.scale_by_group_std(given, scores, GROUP_OF_7, eps=eps)
        np.testing.assert_allclose(scaled, relative / (std + eps), rtol=1e-3)


@each_function
def test_one_response_nothing_that_counts_and_extremes(
    function: Function, of_response: Callable[..., float]
) -> None:
    one, number = jnp.array([2.5]), jnp.array([4])
    assert function(one, number, None) == 0
    if function is not advantages.pass_at_k:
        assert function(one, number, None, keep_singletons=True) == 2.5
    assert advantages.scale_by_group_std(one, one, number) == 2.5
    nothing = function(jnp.array([jnp.nan, jnp.inf]), jnp.array([1, 1]), jnp.zeros(2, bool))
    np.testing.assert_array_equal(nothing, [0, 0])
    huge = jnp.array([1e30, -1e30, 2e30])
    given = function(huge, jnp.array([1, 1, 1]), None)
    assert np.isfinite(given).all() and given[2] > 0
    # Their variance is not finite in float32: no advantage rather than NaN.
    scaled = advantages.scale_by_group_std(given, huge, jnp.array([1, 1, 1]))
    np.testing.assert_array_equal(scaled, np.zeros(3))


def test_gradients_are_finite_where_scores_are_equal() -> None:
    def total(scores: jax.Array) -> jax.Array:
        relative = advantages.leave_one_out(scores, IDS, MASK)
        scaled = advantages.scale_by_group_std(relative, scores, IDS, MASK, eps=0.0)
        return (scaled * jnp.arange(IDS.size)).sum()

    for scores in (SCORES, np.where(MASK, 0.3, np.nan).astype(np.float32)):
        grad = jax.jit(jax.grad(total))(scores)
        assert np.isfinite(grad).all() and (grad[~MASK] == 0).all()


@each_function
def test_what_does_not_fit_is_refused(
    function: Function, of_response: Callable[..., float]
) -> None:
    scale = partial(advantages.scale_by_group_std, SCORES)
    for refuses in (function, scale):
        for scores, ids, mask in (
            (SCORES, IDS.astype(np.float32), MASK),
            (SCORES, IDS[:-1], MASK),
            (SCORES, IDS, MASK.astype(np.float32)),
            (SCORES, IDS, MASK[:-1]),
            (SCORES[None], IDS[None], MASK[None]),
        ):
            with pytest.raises(AssertionError):
                refuses(scores, ids, mask)
    with pytest.raises(AssertionError):
        advantages.opo(SCORES, LENGTHS[1:], IDS)


class TestOptimalTokenBaseline:
    T = 5
    LENGTHS = np.array([5, 2, 3, 0, 5, 4, 1, 5, 0, 3, 5, 2, 4, 0])
    MASK = np.arange(T) < LENGTHS[:, None]
    MASK[4, 1] = MASK[7, 0] = False
    REWARDS = RNG.normal(size=MASK.shape).astype(np.float32)
    LOG_PROBS = np.log(RNG.uniform(0.05, 0.95, MASK.shape)).astype(np.float32)
    COLLISIONS = (np.exp(LOG_PROBS) ** 2 + 0.01).astype(np.float32)

    def by_definition(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gₜ and Wₜ, 0 where masked, and the baseline of each group and position."""
        returns, weights, baselines = np.zeros((3, *self.MASK.shape))
        for row, t in zip(*np.nonzero(self.MASK), strict=True):
            later, before = self.MASK[row].copy(), self.MASK[row].copy()
            later[:t], before[t + 1 :] = False, False
            returns[row, t] = self.REWARDS[row, later].sum()
            likelihoods = np.exp(self.LOG_PROBS[row, before].astype(np.float64))
            weights[row, t] = (1 - 2 * likelihoods + self.COLLISIONS[row, before]).sum()
        for row, t in zip(*np.nonzero(self.MASK), strict=True):
            group = members(row, self.MASK.any(-1))
            if len(group) > 1:
                total = weights[group, t].sum()
                baselines[row, t] = (returns[group, t] * weights[group, t]).sum() / total
        return returns, weights, baselines

    def test_against_a_loop_over_positions_and_groups(self) -> None:
        given = advantages.optimal_token_baseline(
            self.REWARDS, self.LOG_PROBS, self.COLLISIONS, self.MASK, IDS
        )
        returns, weights, baselines = self.by_definition()
        np.testing.assert_allclose(given, (returns - baselines) * self.MASK, rtol=1e-4, atol=1e-5)
        # The weighted square of what is left is smallest: its derivative by the baseline is 0.
        group = members(0, self.MASK.any(-1))
        np.testing.assert_allclose(
            (weights * np.asarray(given))[group].sum(0), np.zeros(self.T), atol=1e-5
        )
        np.testing.assert_allclose(given[6], returns[6], rtol=1e-6)

    def test_what_does_not_fit_is_refused(self) -> None:
        arrays = [self.REWARDS, self.LOG_PROBS, self.COLLISIONS, self.MASK, IDS]
        for at, wrong in (
            (0, self.REWARDS[1:]),
            (2, self.COLLISIONS[:, 1:]),
            (3, self.MASK.astype(int)),
            (4, IDS[1:]),
            (4, IDS.astype(np.float32)),
        ):
            with pytest.raises(AssertionError):
                advantages.optimal_token_baseline(*arrays[:at], wrong, *arrays[at + 1 :])
