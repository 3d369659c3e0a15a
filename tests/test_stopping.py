"""The turning point of histories whose peak is known, and how often noise looks like one."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import stopping
from rlhfjax.cli.metrics import MetricsLog

K, PEAK = 60, 20
POINTS = np.arange(K, dtype=np.float32)
KL = POINTS / 4
RISING, FALLING = KL, -KL
CONCAVE = -np.square((POINTS - PEAK) / 20)
turning_point = jax.jit(stopping.turning_point, static_argnames="window")
reached = jax.jit(stopping.reached, static_argnames="window")
plateau = jax.jit(stopping.plateau, static_argnames="patience")


def by_hand(
    kl: np.ndarray, proxy: np.ndarray, gold: np.ndarray, window: int, num_errors: float
) -> tuple[float, int]:
    """The docstring's inequalities in float64, on a history without missing points."""
    kl, proxy, gold = (np.asarray(x, np.float64) for x in (kl, proxy, gold))
    means = lambda x: np.convolve(x, np.ones(window) / window, "valid")  # noqa: E731
    error = lambda x: np.sqrt(np.mean(np.diff(x, 2) ** 2) / 6 * 2 / window)  # noqa: E731
    best = int(means(gold).argmax())
    fallen, risen = means(gold)[best] - means(gold)[-1], means(proxy)[-1] - means(proxy)[best]
    if fallen > num_errors * error(gold) and risen > num_errors * error(proxy):
        return means(kl)[best], best + (window - 1) // 2
    return np.inf, len(kl)


@pytest.mark.parametrize("window", [1, 3, 4, 9])
def test_a_clean_peak_is_found_in_the_middle_of_its_window(window: int) -> None:
    turn, index = turning_point(KL, RISING, CONCAVE, window=window)
    assert abs(int(index) - PEAK) <= 0.5
    np.testing.assert_allclose(turn, KL[PEAK], atol=0.5 / 4 + 1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_units_of_the_scores_do_not_matter(scale: float) -> None:
    assert turning_point(KL, scale * RISING, scale * CONCAVE + scale)[1] == PEAK


@pytest.mark.parametrize(
    ("proxy", "gold"),
    [
        (RISING, RISING),
        (RISING, np.tanh(KL)),
        (RISING, 0 * KL),
        (FALLING, FALLING),
        (FALLING, CONCAVE),
        (0 * KL, CONCAVE),
        (FALLING, RISING),
    ],
    ids=[
        "gold rises", "gold saturates", "gold is flat", "both fall",
        "proxy falls", "proxy is flat", "gold rises as the proxy falls",
    ],
)  # fmt: skip
def test_no_turn(proxy: np.ndarray, gold: np.ndarray) -> None:
    assert turning_point(KL, proxy, gold) == (np.inf, K)


def test_a_reward_that_only_hurts_turns_at_its_first_window() -> None:
    assert turning_point(KL, RISING, FALLING, window=5) == (KL[:5].mean(), 2)


def test_a_turn_is_not_reached_before_gold_has_fallen() -> None:
    before, after = PEAK + 1, PEAK + 20
    assert turning_point(KL[:before], RISING[:before], CONCAVE[:before])[1] == before
    assert turning_point(KL[:after], RISING[:after], CONCAVE[:after])[1] == PEAK


def test_gold_that_recovers_has_not_turned() -> None:
    dip = np.where(POINTS < 40, CONCAVE, 2.0)
    assert turning_point(KL[:40], RISING[:40], dip[:40])[1] == PEAK
    assert turning_point(KL, RISING, dip)[1] == K


def test_a_policy_held_at_one_kl_turns_too() -> None:
    assert turning_point(0 * KL + 7, RISING, CONCAVE) == (7.0, PEAK)


def test_kl_need_not_be_monotone() -> None:
    overshoot = np.where(POINTS < 40, KL, 20 - KL)
    turn, index = turning_point(overshoot, RISING, CONCAVE)
    assert (turn, index) == (KL[PEAK], PEAK)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
def test_missing_points_are_left_out(missing: float) -> None:
    rng = np.random.default_rng(0)
    logs = np.stack([KL, RISING, CONCAVE - 5])
    logs += 0.05 * rng.normal(size=(3, K)).astype(np.float32)
    gone = np.sort(rng.choice(K, 15, replace=False))
    holes = logs.copy()
    holes[rng.integers(3, size=15), gone] = missing
    kept = np.delete(np.arange(K), gone)
    turn, index = turning_point(*holes)
    expected, place = turning_point(*logs[:, kept])
    np.testing.assert_allclose(turn, expected, rtol=1e-6)
    assert index == kept[place] and np.isfinite(turn)


@pytest.mark.parametrize("real", [0, 1, 9])
def test_fewer_than_two_windows_are_no_turn(real: int) -> None:
    logs = np.stack([KL, RISING, FALLING])
    assert turning_point(*logs[:, :real], window=5) == (np.inf, real)
    logs[2, real:] = np.nan
    assert turning_point(*logs, window=5) == (np.inf, K)
    assert turning_point(*np.stack([KL, RISING, FALLING])[:, :10], window=5)[1] == 2


@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("num_errors", [1.0, 5.0])
def test_agrees_with_the_inequalities_on_random_histories(window: int, num_errors: float) -> None:
    rng = np.random.default_rng(window)
    drift = rng.normal(size=(2, 200, 1)) * CONCAVE + rng.normal(size=(2, 200, 1)) * RISING / 5
    proxy, gold = drift + rng.normal(size=(2, 200, K))
    kl = KL + rng.normal(size=(200, K))
    turns, indices = turning_point(kl, proxy, gold, window=window, num_errors=num_errors)
    expected = [by_hand(*row, window, num_errors) for row in zip(kl, proxy, gold, strict=True)]
    np.testing.assert_array_equal(indices, [index for _, index in expected])
    np.testing.assert_allclose(turns, [turn for turn, _ in expected], rtol=1e-5)
    assert 0 < np.isfinite(turns).sum() < 200


class TestNoise:
    """White noise around known curves, 4000 histories each."""

    @staticmethod
    def reached(gold: np.ndarray, num_points: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(1)
        x = np.linspace(0, 1, num_points)
        proxy, gold = (y + noise * rng.normal(size=(4000, num_points)) for y in (10 * x, gold))
        turn, index = turning_point(np.broadcast_to(x, gold.shape), proxy, gold)
        return np.isfinite(turn), np.asarray(index)

    @pytest.mark.parametrize("num_points", [12, 50, 200])
    @pytest.mark.parametrize("shape", ["flat", "rising", "saturating"])
    def test_is_no_turn(self, num_points: int, shape: str) -> None:
        x = np.linspace(0, 1, num_points)
        gold = {"flat": 0 * x, "rising": x, "saturating": np.minimum(2 * x, 1)}[shape]
        assert self.reached(gold, num_points, noise=0.3)[0].mean() <= 0.005

    @pytest.mark.parametrize(("num_points", "noise"), [(50, 0.1), (200, 0.3)])
    def test_does_not_hide_a_turn(self, num_points: int, noise: float) -> None:
        x = np.linspace(0, 1, num_points)
        reached, index = self.reached(1 - 4 * np.square(x - 0.5), num_points, noise)
        assert reached.mean() >= 0.95
        # A parabola is flat at its top: noise moves the maximum, by less than it can lower it.
        assert np.median(np.abs(index[reached] - num_points / 2)) <= num_points / 10

    def test_a_watched_run_is_seldom_stopped_for_nothing(self) -> None:
        """Flat gold, looked at after each of 100 points."""
        rng = np.random.default_rng(2)
        proxy, gold = (
            np.arange(100.0) + 0 * rng.normal(size=(500, 100)),
            rng.normal(size=(500, 100)),
        )
        seen = np.tri(100, dtype=bool)[:, None]
        logs = (np.where(seen, x, np.nan) for x in (proxy, proxy, gold))
        assert np.isfinite(turning_point(*logs)[0]).any(0).mean() <= 0.03


def test_batched_equals_vmapped() -> None:
    rng = np.random.default_rng(3)
    logs = np.stack([KL, RISING, CONCAVE])[:, None, None] + rng.normal(size=(3, 2, 5, K)) / 5
    whole = turning_point(*logs)
    mapped = jax.vmap(jax.vmap(turning_point))(*jnp.array(logs))
    for a, b in zip(whole, mapped, strict=True):
        assert a.shape == (2, 5)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [np.float16, np.int32, jnp.bfloat16])
def test_results_have_one_type(dtype: np.dtype) -> None:
    turn, index = turning_point(*(jnp.asarray(x, dtype) for x in (KL, RISING, CONCAVE)))
    assert (turn.dtype, index.dtype) == (jnp.float32, jnp.int32)


def test_wrong_arguments_are_refused() -> None:
    for logs in ((KL, KL, KL[:-1]), (KL[0], KL[0], KL[0])):
        with pytest.raises(AssertionError):
            stopping.turning_point(*logs)
    with pytest.raises(AssertionError, match="positive"):
        stopping.turning_point(KL, KL, KL, window=0)


def test_reads_a_log_as_the_docstring_does(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    names = ("objective/kl", "objective/scores", "gold/positive_rate")
    with MetricsLog(path) as log:
        log.write("reward", 0, {"loss": 1.0})
        for step, numbers in enumerate(zip(KL, RISING, CONCAVE, strict=True)):
            some = dict(zip(names, numbers, strict=True)) | (
                {names[0]: np.nan} if step == 3 else {}
            )
            log.write(
                "ppo", 10 * step, {k: v for k, v in some.items() if step != 7 or k != names[2]}
            )
    with path.open(encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["stage"] == "ppo"]
    kl, proxy, gold = (np.array([row.get(name) for row in rows], float) for name in names)
    turn, index = turning_point(kl, proxy, gold)
    assert turn == KL[PEAK] and rows[index]["step"] == 10 * PEAK


def reached_by_hand(x: np.ndarray, level: float, window: int) -> int:
    real = [i for i, number in enumerate(x) if np.isfinite(number)]
    for end in range(window, len(real) + 1):
        if np.mean(x[real[end - window : end]], dtype=np.float64) >= level:
            return real[end - 1]
    return len(x)


def plateau_by_hand(x: np.ndarray, patience: int, min_gain: float) -> int:
    best, since = -np.inf, 0
    for i, number in enumerate(x):
        if not np.isfinite(number):
            continue
        best, since = (number, 0) if number > best + min_gain else (best, since + 1)
        if since >= patience:
            return i
    return len(x)


HISTORIES = np.random.default_rng(4).integers(-8, 9, (40, 30)) / 4.0
HISTORIES = np.where(np.random.default_rng(5).random((40, 30)) < 0.2, np.nan, HISTORIES)


@pytest.mark.parametrize("window", [1, 4])
def test_a_level_is_reached_where_the_mean_of_a_window_does(window: int) -> None:
    found = reached(HISTORIES, level=0.75, window=window)
    expected = [reached_by_hand(x, 0.75, window) for x in HISTORIES]
    assert 30 in expected or window == 1
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32


@pytest.mark.parametrize("min_gain", [0.0, 0.5])
def test_a_plateau_is_so_many_points_without_a_new_best(min_gain: float) -> None:
    expected = [plateau_by_hand(x, 9, min_gain) for x in HISTORIES]
    assert len(set(expected)) > 3
    np.testing.assert_array_equal(plateau(HISTORIES, patience=9, min_gain=min_gain), expected)


def test_what_is_to_come_changes_nothing_that_was_found_before() -> None:
    seen = np.tri(30, dtype=bool)[:, None]
    watched = np.where(seen, HISTORIES, np.nan)
    for rule in (
        partial(reached, level=0.75, window=4),
        partial(plateau, patience=9),
    ):
        at = rule(HISTORIES)
        np.testing.assert_array_equal(rule(watched).argmin(0)[at < 30], at[at < 30])
        np.testing.assert_array_equal(jax.vmap(rule)(jnp.array(HISTORIES)), at)


def test_a_history_without_a_point_reaches_nothing() -> None:
    nothing = np.full(6, np.nan)
    assert reached(nothing, level=-1e30) == 6
    assert reached(nothing[:2], level=-1e30, window=3) == 2
    assert plateau(nothing, patience=1) == 6
    for rule in (partial(stopping.reached, level=0.0), partial(stopping.plateau, patience=1)):
        with pytest.raises(AssertionError):
            rule(jnp.float32(1))
