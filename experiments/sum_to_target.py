"""Three digits that add up to 15, learnt by PPO from observations, all seeds in one program.

The policy and the value function are small networks over an observation: how many digits there
are, their sum, the target. `ppo.make_step` trains them as it trains a language model.

    python experiments/sum_to_target.py --out runs/sum_to_target
    python experiments/sum_to_target.py --members 64

prints one line of JSON. `mean_reward` is that of the trained policy, seed by seed, and exact: the
mean over all responses with the policy's probabilities of them. `batch_mean_reward` is what the
last ten batches got, up to 320 samples of policies that were still being trained. A seed is solved
if the first reaches 0.99. With `--members` the time of a whole population, divided by its size, is
set against that of a single run, both without compilation.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from matplotlib.figure import Figure

from rlhfjax import models
from rlhfjax.algorithms import ppo
from rlhfjax.cli import plots
from rlhfjax.tasks import sum_to_target, tabular
from rlhfjax.types import Params, Rollout

SOLVED = 0.99


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Three digits that add up to 15, learnt by PPO, all seeds in one program."
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="decides everything that is random")
    add("--seeds", type=int, default=10, help="independent runs, trained at once")
    add("--members", type=int, help="as --seeds, and their time is set against a single run's")
    add("--target", type=int, default=15, help="what the digits should add up to")
    add("--num-digits", type=int, default=3, help="how many digits")
    add("--iterations", type=int, default=100, help="rounds of sampling and learning")
    add("--batch", type=int, default=32, help="samples in an iteration")
    add("--epochs", type=int, default=2, help="passes over each batch")
    add("--minibatches", type=int, default=8, help="updates in an epoch")
    add("--learning-rate", type=float, default=3e-3, help="of Adam")
    add("--width", type=int, default=16, help="of both networks' two hidden layers")
    add("--out", type=Path, help="folder for summary.json and curves.png")
    args = parser.parse_args(argv)
    counts = ("seeds", "members", "num_digits", "iterations", "epochs", "minibatches", "width")
    for name in counts:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch % args.minibatches:
        parser.error(f"--batch {args.batch} does not divide into --minibatches {args.minibatches}")
    return args


def network(width: int, size: int) -> nn.Module:
    """Its last layer starts at 0: every digit is equally likely, every value 0."""
    hidden = [nn.Dense(width), nn.relu, nn.Dense(width), nn.relu]
    return nn.Sequential([*hidden, nn.Dense(size, kernel_init=nn.initializers.zeros)])


def score(_: Params, samples: Rollout) -> Array:
    return sum_to_target.reward(samples.responses, samples.prompts[:, 0])


def actor_critic(args: argparse.Namespace) -> models.ActorCritic:
    length = args.num_digits
    actor = sum_to_target.policy(network(args.width, sum_to_target.NUM_DIGITS), length=length)
    return models.separate_trunks(actor, sum_to_target.value(network(args.width, 1), length=length))


def train(key: Array, args: argparse.Namespace) -> tuple[Params, Array]:
    """One run: the policy's parameters, and the mean score of each batch."""
    model, optimizer = actor_critic(args), optax.adam(args.learning_rate)
    config = ppo.Config(
        num_tokens=args.num_digits,
        pad_token=0,
        num_epochs=args.epochs,
        num_minibatches=args.minibatches,
    )
    step = ppo.make_step(model, score, optimizer, config)
    prompts = jnp.full((args.batch, 1), args.target)
    prompt_mask = jnp.ones(prompts.shape, bool)
    init_key, run_key = jax.random.split(key)
    # Without a KL penalty the reference has no say.
    state = ppo.init(model.init(init_key), optimizer, run_key, kl_coef=0.0)
    reference, hyper = state.params["policy"], ppo.Hyperparameters()

    def iterate(state: ppo.State, _: None) -> tuple[ppo.State, Array]:
        state, metrics = step(state, prompts, prompt_mask, reference, None, hyper)
        return state, metrics["objective/scores"]

    state, scores = jax.lax.scan(iterate, state, length=args.iterations)
    return state.params["policy"], scores


def exact_reward(params: Params, args: argparse.Namespace) -> Array:
    """The policy's mean reward over all responses."""
    task = sum_to_target.enumerate_task(target=args.target, length=args.num_digits)
    log_probs = tabular.log_probs(actor_critic(args).policy, params, task)
    return tabular.expected_reward(log_probs, task)[0]


def over_devices(run: Callable[[Array], Any], num_members: int) -> Callable[[Array], Any]:
    """The run for many keys at once, members spread over the devices."""
    num_devices = math.gcd(num_members, jax.device_count())
    mesh = jax.make_mesh((num_devices,), ("members",), axis_types=(AxisType.Auto,))
    of_members = PartitionSpec("members")
    return jax.shard_map(
        jax.vmap(run), mesh=mesh, in_specs=of_members, out_specs=of_members, check_vma=False
    )


def compiled(function: Callable[..., Any], keys: Array) -> tuple[Callable[..., Any], float]:
    """The program, and the seconds it took to trace and compile it."""
    start = time.perf_counter()
    # The last of LLVM's optimisations would take longer than they save.
    options = {"xla_backend_optimization_level": 1}
    program = jax.jit(function).lower(keys).compile(compiler_options=options)
    return program, time.perf_counter() - start


def fastest(programs: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Seconds of a call of each, taken in turns, so that all meet the same machine."""
    taken = dict.fromkeys(programs, math.inf)
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            taken[name] = min(taken[name], time.perf_counter() - start)
    return taken


def draw(scores: np.ndarray, path: Path) -> None:
    """The mean score of a batch by iteration: median, quartiles and extremes over seeds."""
    low, lower, median, upper, high = np.quantile(scores, [0, 0.25, 0.5, 0.75, 1], axis=0)
    iterations = np.arange(1, scores.shape[1] + 1)
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = figure.subplots()
        colour = plots.BLUE
        axis.fill_between(iterations, low, high, color=colour, alpha=0.15, lw=0, label="extremes")
        axis.fill_between(iterations, lower, upper, color=colour, alpha=0.35, lw=0, label="half")
        axis.plot(iterations, median, color=colour, label="median")
        axis.axhline(SOLVED, color=plots.FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_xlabel("PPO iteration")
        axis.set_ylabel("mean reward of a batch")
        axis.set_title(f"Sum to target, {len(scores)} seeds", loc="left", fontweight="bold")
        axis.legend(loc="lower right", frameon=False)
        figure.savefig(path, dpi=220)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    start = time.perf_counter()
    args = arguments(argv)
    keys = jax.random.split(jax.random.key(args.seed), args.members or args.seeds)
    run = partial(train, args=args)
    population, compile_seconds = compiled(over_devices(run, len(keys)), keys)
    params, scores = jax.device_get(population(keys))
    evaluate = jax.jit(jax.vmap(partial(exact_reward, args=args)))
    mean_reward = np.asarray(evaluate(params), np.float64)
    scores = np.asarray(scores, np.float64)
    summary = {
        "seeds": len(keys),
        "seeds_solved": int((mean_reward >= SOLVED).sum()),
        "mean_reward": np.round(mean_reward, 4).tolist(),
        "batch_mean_reward": np.round(scores[:, -10:].mean(1), 4).tolist(),
        "iterations": args.iterations,
        "compile_seconds": compile_seconds,
    }
    if args.members:
        single, single_compile_seconds = compiled(run, keys[0])
        programs = {"all": lambda: population(keys), "one": lambda: single(keys[0])}
        taken = fastest(programs, rounds=8)
        per_member = taken["all"] / args.members
        summary |= {
            "seconds_per_member": per_member,
            "seconds_single": taken["one"],
            "ratio": per_member / taken["one"],
            "compile_seconds_single": single_compile_seconds,
        }
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(scores, args.out / "curves.png")
    summary["seconds"] = time.perf_counter() - start
    if args.out:
        (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    # A device a core: XLA does not share out operations as small as these among threads.
    of_process = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    jax.config.update("jax_num_cpu_devices", len(of_process(0)))
    main()
