"""The study of over-optimisation at toy size: its parts against other ways to the same numbers."""

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.overoptimization import (
    arguments,
    describe,
    draw,
    fit,
    main,
    measure,
    train_proxy,
)
from rlhfjax.tasks import fixed_points

SIZES = [
    "--seeds", "3", "--preferences", "32", "2048", "--beta", "0", "1", "--points", "25",
    "--iterations", "2", "--batch", "32", "--learning-rate", "0.05", "--doublings", "6",
]  # fmt: skip
METHODS = ["best_of_n", "ppo_beta_0", "ppo_beta_1"]
TASK, REFERENCE = draw(jax.random.key(0))
GOLD = TASK.rewards[0]


class Run(NamedTuple):
    out: Path
    summary: dict[str, Any]
    printed: str

    def written(self) -> dict[str, Any]:
        return json.loads((self.out / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "not" / "made" / "yet"
    with redirect_stdout(StringIO()) as printed:
        summary = main([*SIZES, "--out", str(out)])
    return Run(out, summary, printed.getvalue())


class TestRun:
    def test_leaves_its_files_and_a_line(self, run: Run) -> None:
        assert {path.name for path in run.out.iterdir()} == {"summary.json", "curves.png"}
        assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
        (line,) = run.printed.splitlines()
        written = run.written()
        assert json.loads(line) == {name: written[name] for name in run.summary}
        assert written["settings"]["preferences"] == [32, 2048]
        assert np.shape(written["curves"]["ppo_beta_1"]["gold"]) == (2, 25)
        assert np.shape(written["curves"]["best_of_n"]["kl"]) == (2, 25)

    def test_every_size_and_method_is_described(self, run: Run) -> None:
        assert run.summary["members"] == 3 * 2 * 2
        for size in (32, 2048):
            entry = run.summary[f"preferences_{size}"]
            assert set(entry) == {"agreement", *METHODS}
            for method in METHODS:
                told = entry[method]
                assert all(len(turns) == 3 for turns in told["turning_points"].values())
                assert set(told["gold_if_stopped_by"]) == {"nobody", "oracle", "gold", "judge"}
                assert np.isfinite([list(f.values()) for f in told["fits"].values()]).all()

    def test_more_preferences_know_the_gold_better(self, run: Run) -> None:
        few, many = run.summary["preferences_32"], run.summary["preferences_2048"]
        assert few["agreement"] + 0.2 < many["agreement"] < 1
        assert few["best_of_n"]["peak"]["gold"] < many["best_of_n"]["peak"]["gold"]

    @pytest.mark.parametrize("method", METHODS)
    def test_starts_at_the_reference_and_raises_the_proxy(self, run: Run, method: str) -> None:
        curves = run.written()["curves"][method]
        start = [[row[0] for row in curves[name]] for name in ("kl", "proxy", "gold", "judge")]
        np.testing.assert_allclose(start, 0.0, atol=1e-4)
        assert all(row[-1] > 0.5 for row in curves["proxy"])
        # One who learnt from other preferences is not taken in so easily.
        assert curves["judge"][0][-1] < 0.8 * curves["proxy"][0][-1]

    def test_a_penalty_keeps_ppo_closer(self, run: Run) -> None:
        for size in (32, 2048):
            entry = run.summary[f"preferences_{size}"]
            free, held = (entry[f"ppo_beta_{beta}"]["end"]["kl"] for beta in (0, 1))
            assert held < 0.7 * free


def test_the_gold_is_standardised_and_the_reference_tends_to_it() -> None:
    probs, gold = np.exp(np.asarray(REFERENCE, np.float64)), np.asarray(GOLD, np.float64)
    np.testing.assert_allclose([probs.sum(), probs @ gold, probs @ gold**2], [1, 0, 1], atol=1e-5)
    assert gold.mean() < -0.5


@pytest.mark.parametrize("n", [1.5, 2.0, 10.0, 100.0, 1000.0])
def test_kl_of_best_of_n_is_below_that_of_a_continuous_reward(n: float) -> None:
    proxy = train_proxy(jax.random.key(1), jnp.int32(64), TASK, REFERENCE, arguments([]))
    followed = replace(TASK, rewards=proxy[None])
    law = fixed_points.best_of_n(REFERENCE[None], followed, num_samples=n)[0]
    divergence = measure(law, REFERENCE, {})["kl"]
    # Beirami et al. 2024: log n - (n - 1)/n, which ties and large probabilities only lower.
    assert 0 < divergence <= np.log(n) - (n - 1) / n + 1e-4


def test_labels_are_turned_round() -> None:
    """With half of the labels wrong nothing can be learnt, with all of them the opposite is."""
    probs = jnp.exp(REFERENCE)

    def agreement(flipped: str) -> float:
        args = arguments(["--flipped", flipped])
        proxy = train_proxy(jax.random.key(2), jnp.int32(4096), TASK, REFERENCE, args)
        return float(jnp.sum(probs * proxy * GOLD))

    assert agreement("0") > 0.7
    assert abs(agreement("0.5")) < 0.5
    assert agreement("1") < -0.7


@pytest.mark.parametrize(("form", "of"), [("linear", lambda d: d), ("log", np.log)])
def test_fits_find_what_the_gold_was_made_of(form: str, of: Any) -> None:
    d = np.linspace(0.01, 3, 400)
    alphas, betas = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0.5, 0.4, 0.6, 0.5])
    gold = d * (alphas[:, None] - betas[:, None] * of(d))
    fitted = fit({"kl": np.tile(d**2, (4, 1)), "gold": gold}, form)
    np.testing.assert_allclose([fitted["alpha"], fitted["beta"]], [3.0, 0.5], rtol=1e-2)
    expected = [alphas.std(ddof=1) / 2, betas.std(ddof=1) / 2]
    np.testing.assert_allclose([fitted["alpha_error"], fitted["beta_error"]], expected, rtol=2e-2)
    assert fitted["rmse"] < 2e-2
    other = fit(
        {"kl": np.tile(d**2, (4, 1)), "gold": gold}, {"linear": "log", "log": "linear"}[form]
    )
    assert other["rmse"] > 3 * fitted["rmse"]


def test_ols_errors_by_the_textbook() -> None:
    """Two seeds of the same path: NumPy's own least squares on one, over √2 for the mean of two."""
    d = np.linspace(0, 2, 51)[1:]
    gold = d - 0.3 * d**2 + 0.1 * np.random.default_rng(0).normal(size=50)
    x = np.stack([d, -(d**2)], axis=1)
    estimate, squares, *_ = np.linalg.lstsq(x, gold)
    error = np.sqrt(np.diag(np.linalg.inv(x.T @ x)) * squares[0] / 48)
    fitted = fit({"kl": np.tile(d**2, (2, 1)), "gold": np.tile(gold, (2, 1))}, "linear")
    np.testing.assert_allclose([fitted["alpha"], fitted["beta"]], estimate, rtol=1e-6)
    both = [fitted["alpha_ols_error"], fitted["beta_ols_error"]]
    np.testing.assert_allclose(both, error / np.sqrt(2), rtol=1e-6)


def test_a_run_is_described_by_hand() -> None:
    """Two seeds, of which one turns; a judge that sees nothing."""
    point = np.arange(30.0)
    gold = np.stack([point, -np.square(point - 10)])
    logs = {"kl": np.tile(point, (2, 1)), "proxy": np.tile(point, (2, 1)), "gold": gold}
    told = describe(logs | {"judge": np.zeros((2, 30))})
    assert told["turning_points"] == {"gold": [None, 10.0], "judge": [None, None]}
    ends = {"nobody": (29 - 361) / 2, "oracle": 14.5, "gold": 14.5, "judge": (29 - 361) / 2}
    assert told["gold_if_stopped_by"] == ends
    assert told["peak"]["kl"] == gold.mean(0).argmax()


def test_errors_need_two_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(["--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--seeds", "1"], ["--points", "1"], ["--beta", "0", "0"], ["--preferences", "0"]]
)
def test_bad_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(wrong)
    assert wrong[0] in capsys.readouterr().err
