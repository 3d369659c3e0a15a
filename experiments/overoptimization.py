"""Over-optimisation in miniature: a proxy that is followed too far leads away from the gold.

A prompt has 512 responses, so every score and KL is an exact sum. Each seed draws a gold reward, a
reference that was fine-tuned towards it (what it rarely writes tends to be bad), and pairs of its
responses, labelled by Bradley-Terry with the gold, some labels then turned round. A proxy, linear
in the tokens at each place as most of the gold is, learns from N of them. Best-of-n (its exact
law) and PPO (from samples) follow the proxy, all seeds × N × β in one program. The gold watches,
and so does a judge: a proxy that learnt from N other preferences. The setting was chosen for what
it shows: where the reference cares nothing for the gold, the gold hardly falls.

    python experiments/overoptimization.py --out runs/overoptimization

The folder then has `curves.png` and `summary.json`: for each N and method the peak and the end of
the gold, fits, what `stopping.turning_point` finds in each seed's history, and the mean gold of
runs that are stopped there. Scores are standardised under the reference; d = √KL. After Gao,
Schulman and Hilton 2022, Scaling Laws for Reward Model Overoptimization.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import rlhfjax.models as zoo
from rlhfjax import kl, stopping
from rlhfjax.algorithms import ppo
from rlhfjax.cli.plots import FAINT, STYLE
from rlhfjax.losses import reward
from rlhfjax.tasks import fixed_points, tabular

VOCAB, LENGTH = 8, 3
BEYOND = 0.3  # of the gold's variance is beyond the proxy
SIZES = {"num_prompts": 1, "vocab_size": VOCAB, "length": LENGTH}
POLICY, VALUE = tabular.logit_table(**SIZES), tabular.value_table(**SIZES)
FORMS: dict[str, Any] = {"linear": lambda d: d, "log": np.log}
COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#222222")
Scores = dict[str, Array]
Histories = dict[str, np.ndarray]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Every number that can be changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/overoptimization"), help="folder for the results")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--seeds", type=int, default=32, help="golds, each with its own preferences and runs")
    add("--preferences", type=int, nargs="+", default=[64, 256, 1024, 4096], help="N")
    add("--beta", type=float, nargs="+", default=[0.0, 0.1, 0.3], help="KL coefficients of PPO")
    add("--flipped", type=float, default=0.1, help="share of labels that are turned round")
    add("--points", type=int, default=150, help="at which PPO is measured")
    add("--iterations", type=int, default=4, help="of PPO between two points")
    add("--batch", type=int, default=128, help="responses in an iteration of PPO")
    add("--learning-rate", type=float, default=0.005, help="of PPO")
    add("--doublings", type=int, default=10, help="best-of-n goes up to n = 2 to the power of this")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: errors are taken over seeds")
    if args.points < 10 or args.doublings < 2 or args.iterations < 1:
        parser.error("fits take --points of 10, --doublings of 2 and --iterations of 1 at least")
    if min(args.preferences) < 1 or min(args.beta) < 0:
        parser.error("--preferences must be positive, --beta must not be negative")
    for name in ("preferences", "beta"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            parser.error(f"--{name} names a number twice")
    return args


def standardised(scores: Array, probs: Array) -> Array:
    """Scores [R] with mean 0 and variance 1 under the probabilities [R]."""
    centred = scores - jnp.sum(probs * scores)
    return centred / jnp.sqrt(jnp.sum(probs * jnp.square(centred)))


def draw(key: Array) -> tuple[tabular.Task, Array]:
    """The gold, and the reference's log-probabilities [R] ∝ exp(gold + another taste)."""
    task_key, key = jax.random.split(key)
    task = tabular.draw(task_key, **SIZES)
    uniform = jnp.full(len(task.responses), 1 / len(task.responses))
    tokens = jax.nn.one_hot(task.responses, VOCAB).reshape(len(uniform), -1)
    linear = tokens @ jax.random.normal(key, (VOCAB * LENGTH, 2))
    good, taste = jax.vmap(standardised, in_axes=(1, None))(linear, uniform)
    gold = (1 - BEYOND) ** 0.5 * good + BEYOND**0.5 * task.rewards[0]
    reference = jax.nn.log_softmax(gold + taste)
    gold = standardised(gold, jnp.exp(reference))
    return tabular.Task(task.prompts, task.responses, gold[None]), reference


def train_proxy(
    key: Array, size: Array, task: tabular.Task, reference: Array, args: argparse.Namespace
) -> Array:
    """Scores [R] of a proxy that saw the first `size` preferences."""
    pair_key, label_key = jax.random.split(key)
    most = max(args.preferences)
    first, second = jax.random.categorical(pair_key, reference, shape=(2, most))
    better = tabular.preference_probs(task)[0, first, second]
    wins = jax.random.bernoulli(label_key, args.flipped + (1 - 2 * args.flipped) * better)
    chosen, rejected = jnp.where(wins, first, second), jnp.where(wins, second, first)
    tokens = jax.nn.one_hot(task.responses, VOCAB).reshape(len(reference), -1)
    optimizer = optax.adamw(0.02, weight_decay=1e-3)

    def loss(weights: Array) -> Array:
        scores = tokens @ weights
        return reward.pairwise(scores[chosen], scores[rejected], jnp.arange(most) < size)[0]

    def update(carry: Any, _: None) -> tuple[Any, None]:
        weights, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(weights), opt_state, weights)
        return (optax.apply_updates(weights, updates), opt_state), None

    start = jnp.zeros(tokens.shape[1])
    (weights, _), _ = jax.lax.scan(update, (start, optimizer.init(start)), None, length=300)
    return standardised(tokens @ weights, jnp.exp(reference))


def measure(log_probs: Array, reference: Array, scores: Scores) -> Scores:
    """KL and expected scores of a distribution [R], exact."""
    expected = {name: jnp.sum(jnp.exp(log_probs) * score) for name, score in scores.items()}
    divergence = kl.of_distributions(log_probs=log_probs, ref_log_probs=reference)
    return expected | {"kl": jnp.maximum(divergence, 0.0)}


def train_policy(
    key: Array,
    beta: Array,
    task: tabular.Task,
    reference: Array,
    scores: Scores,
    args: argparse.Namespace,
) -> Scores:
    """PPO against the proxy from the reference: what `measure` says at every point."""
    model, optimizer = zoo.separate_trunks(POLICY, VALUE), optax.adam(args.learning_rate)
    config = ppo.Config(num_tokens=LENGTH, pad_token=0, num_epochs=2, num_minibatches=2)
    hyper = ppo.Hyperparameters(kl_horizon=jnp.inf, value_clip_range=jnp.inf)
    step = ppo.make_step(model, tabular.score, optimizer, config)
    proxy = replace(task, rewards=scores["proxy"][None])
    prompts = jnp.broadcast_to(task.prompts, (args.batch, task.prompts.shape[1]))
    mask = jnp.ones(prompts.shape, bool)
    # The logits of a prefix: the log-probability of all responses that begin so, token by token.
    levels = [reference.reshape(VOCAB**depth, VOCAB, -1) for depth in range(LENGTH)]
    ref_params = {"logits": jnp.concatenate([jax.nn.logsumexp(x, axis=-1) for x in levels])[None]}
    start = {"policy": ref_params, "value": VALUE.init(key)}

    def iterate(_: int, state: ppo.State) -> ppo.State:
        return step(state, prompts, mask, ref_params, proxy, hyper)[0]

    def point(state: ppo.State, _: None) -> tuple[ppo.State, Scores]:
        log_probs = tabular.log_probs(POLICY, state.params["policy"], task)[0]
        now = measure(log_probs, reference, scores)
        return jax.lax.fori_loop(0, args.iterations, iterate, state), now

    state = ppo.init(start, optimizer, key, kl_coef=beta)
    return jax.lax.scan(point, state, None, length=args.points)[1]


def study(key: Array, sizes: Array, betas: Array, n: Array, *, args: argparse.Namespace) -> Any:
    """One seed: best-of-n [N, n], PPO [N, β, points], and correlation of proxy and gold [N]."""
    task_key, proxy_key, judge_key, ppo_key = jax.random.split(key, 4)
    task, reference = draw(task_key)

    def of_size(size: Array) -> Any:
        proxy, judge = (
            train_proxy(key, size, task, reference, args) for key in (proxy_key, judge_key)
        )
        scores = {"proxy": proxy, "judge": judge, "gold": task.rewards[0]}
        followed = replace(task, rewards=proxy[None])

        def of_draws(n: Array) -> Scores:
            law = fixed_points.best_of_n(reference[None], followed, num_samples=n)[0]
            return measure(law, reference, scores)

        runs = jax.vmap(lambda beta: train_policy(ppo_key, beta, task, reference, scores, args))
        return (
            jax.vmap(of_draws)(n),
            runs(betas),
            jnp.sum(jnp.exp(reference) * proxy * scores["gold"]),
        )

    return jax.vmap(of_size)(sizes)


def fit(runs: Histories, form: str) -> dict[str, float]:
    """Least squares of gold = d·(α - β·f(d)) for each seed's path [S, K]; the mean over seeds.

    A path is taken at 50 even steps of d. `_error` is the standard error of the mean over seeds,
    `_ols_error` that of ordinary least squares, which takes the misfit of a path for noise.
    """
    order = np.argsort(runs["kl"], axis=1)
    path, gold = (np.take_along_axis(runs[name], order, axis=1) for name in ("kl", "gold"))
    d = np.linspace(0, np.sqrt(path[:, -1]), 51, axis=1)[:, 1:]
    y = np.array([np.interp(*of_seed) for of_seed in zip(d, np.sqrt(path), gold, strict=True)])
    x = np.stack([d, -d * FORMS[form](d)], axis=-1)
    inverse = np.linalg.inv(np.einsum("ski,skj->sij", x, x))
    each = np.einsum("sij,skj,sk->si", inverse, x, y)
    squares = np.square(y - np.einsum("ski,si->sk", x, each))
    variance = np.einsum("sii,sk->si", inverse, squares) / (y.shape[1] - 2)
    error, ols_error = each.std(0, ddof=1) / len(y) ** 0.5, np.sqrt(variance.sum(0)) / len(y)
    numbers = {"rmse": float(np.sqrt(squares.mean()))}
    for i, name in enumerate(("alpha", "beta")):
        kinds = {"": each.mean(0), "_error": error, "_ols_error": ols_error}
        numbers |= {f"{name}{kind}": float(row[i]) for kind, row in kinds.items()}
    return numbers


def describe(runs: Histories) -> dict[str, Any]:
    """What became of the gold along histories [S, K], and who would have stopped them where."""
    mean, gold = {name: x.mean(0) for name, x in runs.items()}, runs["gold"]
    turns, stopped = {}, {"nobody": gold[:, -1], "oracle": gold.max(1)}
    for monitor in ("gold", "judge"):
        logs = (jnp.asarray(runs[name]) for name in ("kl", "proxy", monitor))
        turn, index = map(np.asarray, stopping.turning_point(*logs))
        turns[monitor] = [float(x) if np.isfinite(x) else None for x in turn]
        place = np.minimum(index, gold.shape[1] - 1)[:, None]
        stopped[monitor] = np.take_along_axis(gold, place, axis=1)
    return {
        "peak": {name: float(x[mean["gold"].argmax()]) for name, x in mean.items()},
        "end": {name: float(x[-1]) for name, x in mean.items()},
        "fits": {form: fit(runs, form) for form in FORMS},
        "turning_points": turns,
        "gold_if_stopped_by": {name: float(x.mean()) for name, x in stopped.items()},
    }


def picture(panels: dict[str, tuple[str, Histories]], sizes: list[int], path: Path) -> None:
    """Means over seeds of each panel's histories [S, N, K] against d, with fits of the gold."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (title, (form, runs)) in zip(axes, panels.items(), strict=True):
            for i, size in enumerate(sizes):
                colour = COLOURS[i % len(COLOURS)]
                of_size = {name: x[:, i] for name, x in runs.items()}
                fitted = fit(of_size, form)
                kl, proxy, gold = (of_size[name].mean(0) for name in ("kl", "proxy", "gold"))
                d, top = np.sqrt(kl), gold.argmax()
                grid = np.linspace(0, d.max(), 51)[1:]
                curve = grid * (fitted["alpha"] - fitted["beta"] * FORMS[form](grid))
                axis.plot(d, gold, color=colour, label=f"{size} preferences")
                axis.plot(d[top], gold[top], "o", color=colour, markersize=4)
                axis.plot(d, proxy, color=colour, linestyle="--", linewidth=1)
                axis.plot(grid, curve, color=colour, linestyle=":", linewidth=1)
            axis.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
            axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            axis.set_xlabel("√KL from the reference")
        axes[0].set_ylabel("gold (dotted: fit, ●: peak) and proxy (dashed), sd")
        axes[0].legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=200)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs everything and returns what `summary.json` holds, without the curves."""
    args, start = arguments(argv), time.perf_counter()
    inputs = (
        jax.random.split(jax.random.key(args.seed), args.seeds),
        jnp.asarray(args.preferences),
        jnp.asarray(args.beta),
        2.0 ** jnp.linspace(0, args.doublings, 4 * args.doublings + 1),
    )
    program = jax.jit(jax.vmap(partial(study, args=args), in_axes=(0, None, None, None)))
    compiled = program.lower(*inputs).compile()
    compile_seconds = time.perf_counter() - start
    best, runs, agreement = jax.tree.map(np.float64, jax.device_get(compiled(*inputs)))
    methods = {"best_of_n": best}
    for j, beta in enumerate(args.beta):
        methods[f"ppo_beta_{beta:g}"] = {name: x[:, :, j] for name, x in runs.items()}
    summary: dict[str, Any] = {
        "members": args.seeds * len(args.preferences) * len(args.beta),
        "compile_seconds": compile_seconds,
        "seconds": time.perf_counter() - start,
    }
    for i, size in enumerate(args.preferences):
        summary[f"preferences_{size}"] = {"agreement": float(agreement[:, i].mean())} | {
            method: describe({name: x[:, i] for name, x in histories.items()})
            for method, histories in methods.items()
        }
    args.out.mkdir(parents=True, exist_ok=True)
    freest = f"{min(args.beta):g}"
    ppo_panel = ("log", methods[f"ppo_beta_{freest}"])
    panels = {"Best of n": ("linear", best), f"PPO, β = {freest}": ppo_panel}
    picture(panels, args.preferences, args.out / "curves.png")
    curves = {m: {name: x.mean(0).tolist() for name, x in h.items()} for m, h in methods.items()}
    settings = vars(args) | {"out": str(args.out)}
    content = json.dumps(summary | {"settings": settings, "curves": curves}, indent=2)
    (args.out / "summary.json").write_text(content + "\n", encoding="utf-8")
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    main()
