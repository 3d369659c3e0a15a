"""Trains every algorithm on a task whose optimum is known, and says how near it comes.

    python experiments/exact_optimum.py --algorithm ppo --seed 0
    python experiments/exact_optimum.py --algorithm all

The task is a table: P prompts, V^T responses, standard normal rewards. The policy is a table of
logits, the reference's are standard normal, or a transformer. An algorithm starts at the reference,
sees samples or, if it is a direct one, labelled pairs, and should end at its fixed point, which
docs/fixed_points.md derives. β falls to its value over the first half of the training. One JSON
line each, in nats and rewards: `kl_to_fixed_point`, the mean over prompts of KL(trained ‖ fixed
point); `objective` E[r] - β·KL of the trained policy, `fixed_point_objective` and
`optimal_objective` of the fixed point and of the best policy there is; `gain`, what the best has
over the reference; `regret` against the fixed point, `regret_to_optimum` against the best. Where
the fixed point is the best policy, these two are the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhfjax import models
from rlhfjax.algorithms import (
    best_of_n,
    cispo,
    cpo,
    dapo,
    dpo,
    dr_grpo,
    grpo,
    gspo,
    ipo,
    kto,
    online_dpo,
    orpo,
    ppo,
    reinforce,
    reinforce_plus_plus,
    rejection_sampling,
    remax,
    rloo,
    simpo,
)
from rlhfjax.losses import preference, reference_free
from rlhfjax.tasks import fixed_points, tabular
from rlhfjax.types import LanguageModel, Params, PreferenceBatch, ScalarModel

BATCH = 1024  # responses, pairs, or groups for best-of-n, of an iteration
EPSILON, MARGIN = 0.1, 0.5  # the label smoothing of cDPO, the margin of SimPO


class Problem(NamedTuple):
    """A task, its reference, and models that can be any policy and any value function."""

    task: tabular.Task
    model: LanguageModel
    critic: ScalarModel
    ref_params: Params
    ref_log_probs: Array
    beta: float
    num_iterations: int
    learning_rate: float

    @property
    def length(self) -> int:
        return self.task.responses.shape[1]

    def prompts(self, number: int, parts: int = 1) -> tuple[Array, Array]:
        """All prompts, again and again until there are about as many, in equal parts."""
        copies = parts * max(1, number // (parts * len(self.task.prompts)))
        prompts = jnp.tile(self.task.prompts, (copies, 1))
        return prompts, jnp.ones(prompts.shape, bool)

    def log_probs(self, params: Params) -> Array:
        return tabular.log_probs(self.model, params, self.task)


class Run(NamedTuple):
    """How an algorithm is trained, and where it should end."""

    train: Callable[[Array], Array]  # from a key to log-probabilities [P, N]
    fixed_point: Array  # [P, N]
    num_iterations: int


def pose(args: argparse.Namespace) -> Problem:
    """The problem of a seed."""
    sizes = {"num_prompts": args.prompts, "vocab_size": args.vocab, "length": args.length}
    task_key, reference_key = jax.random.split(jax.random.key(args.seed))
    task, model = tabular.draw(task_key, **sizes), tabular.logit_table(**sizes)
    if args.policy == "transformer":
        context_length = task.prompts.shape[1] + args.length
        model = models.decoder(
            models.DecoderConfig(args.vocab, context_length, width=64, num_layers=1, num_heads=2)
        )
    ref_params = model.init(reference_key)
    ref_log_probs = tabular.log_probs(model, ref_params, task)
    critic = tabular.value_table(**sizes)
    learning_rate = {"table": 0.05, "transformer": 0.003}[args.policy]
    numbers = (args.beta, args.iterations, learning_rate)
    return Problem(task, model, critic, ref_params, ref_log_probs, *numbers)


def annealed(problem: Problem, num_updates: int) -> optax.GradientTransformation:
    """Adam whose steps shrink to nothing, so that the noise of sampling averages out."""
    return optax.adam(optax.cosine_decay_schedule(problem.learning_rate, num_updates), b2=0.99)


def beta_schedule(beta: float, num_iterations: int) -> Array:
    """β of each iteration, eight times its value at first and that value from the middle on.

    A policy that turns to one branch before it knows the others comes back only slowly.
    """
    to_come = jnp.maximum(1.0 - 2.0 * jnp.linspace(0.0, 1.0, num_iterations), 0.0)
    return beta * 8.0**to_come


def run_sampled(
    algorithm: Any,
    problem: Problem,
    fixed_point: Array,
    *,
    num_iterations: int | None = None,
    num_minibatches: int = 1,
    batch: int = BATCH,
    **options: Any,
) -> Run:
    """An algorithm that samples, from the reference."""
    num_iterations = num_iterations or problem.num_iterations
    config = algorithm.Config(
        problem.length, pad_token=0, num_minibatches=num_minibatches, **options
    )
    hyper = algorithm.Hyperparameters()
    prompts, mask = problem.prompts(batch // config.group_size, num_minibatches)
    optimizer = annealed(problem, num_iterations * config.num_epochs * num_minibatches)
    step = algorithm.make_step(problem.model, tabular.score, optimizer, config)

    def train(key: Array) -> Array:
        def iterate(state: Any, beta: Array) -> tuple[Any, None]:
            numbers = replace(hyper, kl_coef=beta)
            return step(state, prompts, mask, problem.ref_params, problem.task, numbers)[0], None

        start = algorithm.init(problem.ref_params, optimizer, key)
        state, _ = jax.lax.scan(iterate, start, beta_schedule(problem.beta, num_iterations))
        return problem.log_probs(state.params)

    return Run(train, fixed_point, num_iterations)


def run_ppo(problem: Problem) -> Run:
    """PPO, with a table of values; two epochs of four minibatches an iteration."""
    num_iterations = problem.num_iterations // 4
    config = ppo.Config(problem.length, pad_token=0, num_epochs=2)
    hyper = ppo.Hyperparameters(kl_horizon=jnp.inf)
    prompts, mask = problem.prompts(BATCH, config.num_minibatches)
    optimizer = annealed(problem, num_iterations * config.num_epochs * config.num_minibatches)
    model = models.separate_trunks(problem.model, problem.critic)
    step = ppo.make_step(model, tabular.score, optimizer, config)

    def train(key: Array) -> Array:
        def iterate(state: ppo.State, beta: Array) -> tuple[ppo.State, None]:
            state = replace(state, kl_coef=beta)
            return step(state, prompts, mask, problem.ref_params, problem.task, hyper)[0], None

        params = {"policy": problem.ref_params, "value": problem.critic.init(key)}
        start = ppo.init(params, optimizer, key, kl_coef=problem.beta)
        state, _ = jax.lax.scan(iterate, start, beta_schedule(problem.beta, num_iterations))
        return problem.log_probs(state.params["policy"])

    return Run(train, best(problem), num_iterations)


def run_direct(algorithm: Any, problem: Problem, fixed_point: Array, **numbers: Any) -> Run:
    """A direct method, from the reference: pairs of responses drawn uniformly, with the probability
    that a Bradley-Terry judge prefers the first."""
    prompts, mask = problem.prompts(BATCH)
    optimizer = annealed(problem, problem.num_iterations)
    step = algorithm.make_step(problem.model, optimizer)
    hyper, task = algorithm.Hyperparameters(**numbers), problem.task

    def pairs(key: Array) -> PreferenceBatch:
        first, second = jax.random.randint(key, (2, len(prompts)), 0, len(task.responses))
        rows = jnp.arange(len(prompts)) % len(task.prompts)
        real = jnp.ones((len(prompts), problem.length), bool)
        preferred = jax.nn.sigmoid(task.rewards[rows, first] - task.rewards[rows, second])
        sides = (task.responses[first], real, task.responses[second], real)
        return PreferenceBatch(prompts, mask, *sides, preferred)

    def train(key: Array) -> Array:
        def update(state: Any, key: Array) -> tuple[Any, None]:
            return step(state, pairs(key), problem.ref_params, hyper)[0], None

        start = algorithm.init(problem.ref_params, optimizer)
        state, _ = jax.lax.scan(update, start, jax.random.split(key, problem.num_iterations))
        return problem.log_probs(state.params)

    return Run(train, fixed_point, problem.num_iterations)


def run_rejection_sampling(problem: Problem) -> Run:
    """Rejection sampling: one round from the reference, a thousand times as large as a batch."""
    num_minibatches = min(problem.num_iterations, 1000)
    return run_sampled(
        rejection_sampling,
        problem,
        law_of_eight(problem),
        num_iterations=1,
        num_epochs=problem.num_iterations // num_minibatches,
        num_minibatches=num_minibatches,
        batch=BATCH * num_minibatches,
        group_size=8,
    )


def run_best_of_n(problem: Problem) -> Run:
    """Best-of-n trains nothing: its policy is how often each response was chosen."""
    config = best_of_n.Config(problem.length, pad_token=0, group_size=8)
    prompts, mask = problem.prompts(BATCH)
    step = best_of_n.make_step(problem.model, tabular.score, config)

    def train(key: Array) -> Array:
        def draw(carry: Any, _: None) -> tuple[Any, None]:
            state, counts = carry
            state, samples, _ = step(
                state, prompts, mask, problem.task, best_of_n.Hyperparameters()
            )
            return (state, counts.at[tabular.numbers(problem.task, samples)].add(1.0)), None

        start = best_of_n.init(problem.ref_params, key), jnp.zeros(problem.task.rewards.shape)
        (_, counts), _ = jax.lax.scan(draw, start, length=problem.num_iterations)
        return jnp.log(counts / counts.sum(1, keepdims=True))

    return Run(train, law_of_eight(problem), problem.num_iterations)


def best(problem: Problem) -> Array:
    return tabular.optimum(problem.ref_log_probs, problem.task, kl_coef=problem.beta)


def law_of_eight(problem: Problem) -> Array:
    return fixed_points.best_of_n(problem.ref_log_probs, problem.task, num_samples=8)


def of_group(problem: Problem, group_size: int) -> Array:
    return fixed_points.group_std(
        problem.ref_log_probs, problem.task, kl_coef=problem.beta, num_responses=group_size
    )


def of_pairs(problem: Problem, loss: Callable[..., Any]) -> Array:
    """The minimiser of a loss over all pairs."""
    uniform = jnp.zeros(problem.task.rewards.shape)
    return fixed_points.of_pairs(loss, problem.ref_log_probs, uniform, problem.task)


def without_reference(loss: Callable[..., Any], *, scale: float, likelihood: float) -> Any:
    """A loss of log-probabilities times `scale`, beside the likelihood of the chosen response."""

    def both(chosen: Array, rejected: Array, *_: Array, weights: Array, reduce: Any) -> Any:
        value, metrics = loss(scale * chosen, scale * rejected, weights=weights, reduce=reduce)
        everywhere = jnp.ones(chosen.shape, bool)
        return value - likelihood * reduce(weights * chosen, everywhere), metrics

    return both


def cdpo_of(p: Problem) -> Run:
    loss = partial(preference.cdpo, beta=p.beta, label_smoothing=EPSILON)
    return run_direct(dpo, p, of_pairs(p, loss), beta=p.beta, label_smoothing=EPSILON)


def ipo_of(p: Problem) -> Run:
    uniform = jnp.zeros(p.task.rewards.shape)
    fixed_point = fixed_points.ipo(p.ref_log_probs, uniform, p.task, kl_coef=p.beta)
    return run_direct(ipo, p, fixed_point, beta=p.beta)


def kto_of(p: Problem) -> Run:
    if p.beta > 1:
        raise ValueError(f"KTO has more than one limit for β > 1, and β is {p.beta}")
    uniform = jnp.zeros(p.task.rewards.shape)
    fixed_point = fixed_points.kto(p.ref_log_probs, uniform, p.task, kl_coef=p.beta)
    return run_direct(kto, p, fixed_point, beta=p.beta)


def simpo_of(p: Problem) -> Run:
    loss = partial(reference_free.simpo, beta=p.beta, margin=MARGIN)
    loss = without_reference(loss, scale=1 / p.length, likelihood=0.0)
    return run_direct(simpo, p, of_pairs(p, loss), beta=p.beta, margin=MARGIN)


def orpo_of(p: Problem) -> Run:
    loss = partial(reference_free.orpo, beta=p.beta)
    loss = without_reference(loss, scale=1 / p.length, likelihood=1 / p.length)
    return run_direct(orpo, p, of_pairs(p, loss), beta=p.beta)


def cpo_of(p: Problem) -> Run:
    loss = partial(reference_free.cpo, beta=p.beta)
    loss = without_reference(loss, scale=1.0, likelihood=1 / p.length)
    return run_direct(cpo, p, of_pairs(p, loss), beta=p.beta)


ALGORITHMS: dict[str, Callable[[Problem], Run]] = {
    "ppo": run_ppo,
    "reinforce": lambda p: run_sampled(reinforce, p, best(p)),
    "reinforce-plus-plus": lambda p: run_sampled(reinforce_plus_plus, p, best(p)),
    "rloo": lambda p: run_sampled(rloo, p, best(p), group_size=16),
    "remax": lambda p: run_sampled(remax, p, best(p)),
    "dr-grpo": lambda p: run_sampled(
        dr_grpo,
        p,
        fixed_points.token_k2(p.ref_log_probs, p.task, kl_coef=p.beta * 64 / 63),
        group_size=64,
    ),
    "grpo": lambda p: run_sampled(grpo, p, of_group(p, 2), group_size=2),
    "dapo": lambda p: run_sampled(dapo, p, of_group(p, 8), group_size=8),
    "gspo": lambda p: run_sampled(gspo, p, of_group(p, 2), group_size=2),
    "cispo": lambda p: run_sampled(cispo, p, of_group(p, 2), group_size=2),
    "online-dpo": lambda p: run_sampled(online_dpo, p, best(p)),
    "best-of-n": run_best_of_n,
    "rejection-sampling": run_rejection_sampling,
    "dpo": lambda p: run_direct(dpo, p, best(p), beta=p.beta),
    "cdpo": cdpo_of,
    "ipo": ipo_of,
    "kto": kto_of,
    "orpo": orpo_of,
    "simpo": simpo_of,
    "cpo": cpo_of,
}


def report(run: Run, problem: Problem, seed: int) -> tuple[dict[str, Any], Array]:
    """Trains an algorithm and measures where it ended."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    start = time.perf_counter()
    compiled = jax.jit(run.train).lower(key).compile()
    compile_seconds = time.perf_counter() - start
    trained = jax.block_until_ready(compiled(key))
    seconds = time.perf_counter() - start - compile_seconds

    def objective(log_probs: Array) -> float:
        reference, beta = problem.ref_log_probs, problem.beta
        return float(tabular.objective(log_probs, reference, problem.task, kl_coef=beta))

    def mean_kl(log_probs: Array, other: Array) -> float | None:
        divergence = tabular.divergence(log_probs, other).mean()
        return max(float(divergence), 0.0) if jnp.isfinite(divergence) else None

    reached, there = objective(trained), objective(run.fixed_point)
    optimal, reference = objective(best(problem)), objective(problem.ref_log_probs)
    return {
        "kl_to_fixed_point": mean_kl(trained, run.fixed_point),
        "kl_from_fixed_point": mean_kl(run.fixed_point, trained),
        "objective": reached,
        "fixed_point_objective": there,
        "optimal_objective": optimal,
        "gain": optimal - reference,
        "regret": there - reached,
        "regret_to_optimum": optimal - reached,
        "iterations": run.num_iterations,
        "seconds": round(seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
    }, trained


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=[*ALGORITHMS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0, help="of the task and of the training")
    parser.add_argument("--vocab", type=int, default=4, help="V")
    parser.add_argument("--length", type=int, default=3, help="T")
    parser.add_argument("--prompts", type=int, default=4, help="P")
    parser.add_argument("--beta", type=float, default=0.5, help="β")
    parser.add_argument("--policy", choices=["table", "transformer"], default="table")
    parser.add_argument(
        "--iterations", type=int, default=6000, help="of 1024 samples; a quarter for PPO"
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FILE.npz",
        help="β, rewards, and log-probabilities of the reference, of the fixed point and of the "
        "trained policy, [prompts, V**T] with the first token slowest; with --algorithm all, the "
        "name of the algorithm is added to the file's",
    )
    args = parser.parse_args(argv)
    least = {"vocab": 2, "length": 1, "prompts": 1, "iterations": 4}
    for name, number in least.items():
        if getattr(args, name) < number:
            parser.error(f"--{name} must be at least {number}, not {getattr(args, name)}")
    if not args.beta > 0:
        parser.error(f"--beta must be positive, not {args.beta}: there is no fixed point without")
    names = list(ALGORITHMS) if args.algorithm == "all" else [args.algorithm]
    if args.save is not None:
        args.save.parent.mkdir(parents=True, exist_ok=True)
    problem = pose(args)
    for name in names:
        row: dict[str, Any] = {"algorithm": name, "seed": args.seed}
        try:
            run = ALGORITHMS[name](problem)
        except ValueError as error:  # Its fixed point is beyond reach; the others' may not be.
            if len(names) == 1:
                parser.error(str(error))
            print(json.dumps(row | {"error": str(error)}), flush=True)
            continue
        measured, trained = report(run, problem, args.seed)
        print(json.dumps(row | measured, allow_nan=False), flush=True)
        if args.save is not None:
            stem = args.save.stem if len(names) == 1 else f"{args.save.stem}-{name}"
            np.savez(
                args.save.with_stem(stem),
                beta=problem.beta,
                rewards=problem.task.rewards,
                ref_log_probs=problem.ref_log_probs,
                fixed_point_log_probs=run.fixed_point,
                log_probs=trained,
            )


if __name__ == "__main__":
    main()
