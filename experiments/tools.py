"""A small policy learns to ask a calculator and a keyed store, and to answer with what they say.

A problem is a sum of two numbers, `347+285=`, or the key of a record, `?kmd=`, in a store that is
another one in every episode. The policy may answer at once, `632.`, or write a call, `[347+285]`,
read what the tool says, and answer then. It has seen a few demonstrations, most of them wrong: some
answer at once with any number, others have digits and letters mixed up. PPO or GRPO teach the rest
from a reward of 1 for the right answer.

    python experiments/tools.py --out runs/tools
    python experiments/tools.py --algorithm grpo --out runs/tools_grpo

All seeds are trained in one program, from reset to update, and beside them one more whose tool
never answers: so much can be learned without. A run that was broken off goes on with `--resume`.

Success is measured on problems that training never poses (a + 2b and the sum of the letters are
divisible by 5 in these, and only in these), with the most probable tokens: of each trained policy
with the tool and with the tool removed, and of the demonstrations alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
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

from rlhfjax import models, rollout, sampling, sharding, tools
from rlhfjax.algorithms import grpo, iteration, ppo, sft
from rlhfjax.algorithms.train_state import descend
from rlhfjax.cli import plots
from rlhfjax.cli.run import Run
from rlhfjax.cli.samples import write_transcripts
from rlhfjax.cli.timing import Clock
from rlhfjax.data.cursor import batches_from
from rlhfjax.types import LanguageModel, Params

TEXT = "_.[]+*=?0123456789abcdefghij"
PAD, END, OPEN, CLOSE, PLUS, TIMES, EQUALS, WHAT = range(8)
DIGITS, LETTERS = range(8, 18), range(18, 28)
NO = tools.NO_TOKEN
KINDS = ("sums", "records")
NUM_TURNS, PROMPT, TURN, OBSERVATION, RECORDS = 2, 8, 9, 4, 8
LENGTH = PROMPT + NUM_TURNS * TURN + (NUM_TURNS - 1) * OBSERVATION
SHOWN, TESTED = 24, 512
SOLVED, ALONE = 0.95, 0.3


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A small policy learns to ask a calculator and a keyed store."
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/tools"), help="folder for all that is left behind")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--algorithm", choices=("ppo", "grpo"), default="ppo", help="what teaches the policy")
    add("--seed", type=int, default=0, help="decides everything that is random")
    add("--seeds", type=int, default=5, help="independent policies, trained at once")
    add("--demonstrations", type=int, default=512, help="that each policy begins with")
    add("--passes", type=int, default=60, help="over the demonstrations")
    add("--iterations", type=int, default=80, help="rounds of acting and learning")
    add("--episodes", type=int, default=256, help="in an iteration")
    add("--group", type=int, default=8, help="episodes of each problem, for GRPO")
    add("--epochs", type=int, default=2, help="passes over each batch of episodes")
    add("--minibatches", type=int, default=4, help="updates in an epoch")
    add("--learning-rate", type=float, default=1e-3, help="of Adam; falls to a tenth")
    add("--kl-coef", type=float, default=0.01, help="weight of the KL from the demonstrations")
    add("--width", type=int, default=64, help="of the hidden states")
    add("--layers", type=int, default=2, help="of the transformer")
    add("--save-every", type=int, default=20, help="iterations between two checkpoints")
    args = parser.parse_args(argv)
    for name in ("seeds", "demonstrations", "passes", "iterations", "width", "layers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    size = args.minibatches * (args.group if args.algorithm == "grpo" else 1)
    if args.episodes % size:
        parser.error(f"--episodes {args.episodes} do not divide into parts of {size}")
    return args


def pose(key: Array, *, unseen: bool) -> tuple[dict[str, Array], Array]:
    """A problem of either kind: what the environment knows of it, and the prompt."""
    at_random = iter(jax.random.uniform(key, (6 + 6 * RECORDS,)))

    def any_below(*sizes: int) -> list[Array]:
        return [jnp.floor(next(at_random) * size).astype(jnp.int32) for size in sizes]

    kind, rest, a, b, upper, _ = any_below(2, 4, 400, 80, 2, 1)
    # 0 for problems to be tested with, else one of 1 to 4.
    rest = jnp.int32(0) if unseen else 1 + rest
    a, b = 100 + a, 100 + 5 * b
    b += (rest - a - 2 * b) * 3 % 5
    keys = jnp.stack(any_below(*[10] * 3 * RECORDS)).reshape(RECORDS, 3)
    last = (rest - keys[0, :2].sum()) % 5 + 5 * upper
    keys = LETTERS[0] + keys.at[0, 2].set(last)
    values = DIGITS[0] + jnp.stack(any_below(*[10] * 3 * RECORDS)).reshape(RECORDS, 3)

    number = partial(tools.write_number, digits=DIGITS, size=3)
    plus, equals, what = (jnp.array([token]) for token in (PLUS, EQUALS, WHAT))
    of_sum = jnp.concatenate([number(a), plus, number(b), equals])
    of_record = jnp.concatenate([jnp.full(PROMPT - 5, NO), what, keys[0], equals])
    answer = jnp.where(kind == 0, number(a + b), values[0])
    state = {"kind": kind, "answer": answer, "keys": keys, "values": values}
    return state, jnp.where(kind == 0, of_sum, of_record)


def problems(works: Array, *, unseen: bool = False) -> rollout.Environment:
    """Sums and records in equal parts.

    Args:
      works: [] bool, whether the tools answer; traced.
      unseen: pose those that training never does.
    """

    def tool(state: dict[str, Array], tokens: Array) -> Array:
        call = tools.last_call(tokens, open_token=OPEN, close_token=CLOSE)
        result = tools.calculate(call, digits=DIGITS, plus=PLUS, times=TIMES, size=OBSERVATION)
        stored = jnp.pad(state["values"], ((0, 0), (OBSERVATION - 3, 0)), constant_values=NO)
        record = tools.look_up(call, state["keys"], stored)
        said = jnp.where((result != NO).any(), result, record)
        understood = works & (said != NO).any()
        said = jnp.where(understood, said, jnp.full(OBSERVATION, NO).at[-1].set(WHAT))
        return jnp.where((tokens == CLOSE).any(), said, NO)

    def grade(state: dict[str, Array], tokens: Array) -> Array:
        return (tokens == turn(state["answer"], END)).all()

    return rollout.with_tool(partial(pose, unseen=unseen), tool, grade)


def turn(tokens: Array, *ends: int) -> Array:
    """[T], the tokens and what ends them."""
    whole = jnp.concatenate([tokens, jnp.array(ends)])
    return jnp.pad(whole, (0, TURN - len(whole)), constant_values=NO)


def demonstrate(key: Array) -> tuple[Array, Array, Array]:
    """An episode of somebody who is often wrong: tokens, what is real, what is to be learned."""
    pose_key, key = jax.random.split(key)
    environment = problems(jnp.bool_(True))
    state, prompt = environment.reset(pose_key)

    changes, others = jax.random.uniform(key, (2, PROMPT + 3))
    others = jnp.floor(10 * others).astype(jnp.int32)

    def mixed_up(tokens: Array, first: int) -> Array:
        """One in ten digits becomes any digit, and of letters any letter."""
        here = slice(first, first + len(tokens))
        other = others[here] + jnp.where(tokens >= LETTERS[0], LETTERS[0], DIGITS[0])
        return jnp.where((changes[here] < 0.1) & (tokens >= DIGITS[0]), other, tokens)

    asked = mixed_up(prompt, 0)
    sum_call = jnp.concatenate([jnp.array([OPEN]), asked[:7], jnp.array([CLOSE])])
    record_call = turn(jnp.concatenate([jnp.array([OPEN]), asked[4:7]]), CLOSE)
    call = jnp.where(state["kind"] == 0, sum_call, record_call)
    _, said, *_ = environment.step(state, call)
    guess = DIGITS[0] + others[:3]
    read = jnp.where(said[0] == NO, said[1:], guess)  # nobody copies more than three digits
    answer = turn(mixed_up(read, PROMPT), END)
    skips = changes[3] * 10 % 1 < 0.4
    call = jnp.where(skips, turn(guess, END), call)
    said, answer = (jnp.where(skips, NO, x) for x in (said, answer))
    tokens = jnp.concatenate([prompt, call, said, answer])
    nothing = jnp.zeros(PROMPT, bool), jnp.zeros(OBSERVATION, bool)
    learned = jnp.concatenate([nothing[0], call != NO, nothing[1], answer != NO])
    return jnp.where(tokens == NO, PAD, tokens), tokens != NO, learned


def build(args: argparse.Namespace) -> LanguageModel:
    config = models.DecoderConfig(
        len(TEXT), LENGTH, width=args.width, num_layers=args.layers, num_heads=4
    )
    return models.decoder(config)


def perform(
    model: LanguageModel,
    params: Params,
    environment: rollout.Environment,
    reset_keys: Array,
    key: Array,
    **settings: Any,
) -> rollout.Episodes:
    return rollout.act(
        model, params, environment, reset_keys, key,
        num_turns=NUM_TURNS, num_tokens=TURN, pad_token=PAD, end_token=(END, CLOSE), **settings,
    )  # fmt: skip


def success(episodes: rollout.Episodes) -> dict[str, Array]:
    """Of each kind of problem, and of those that are harder."""
    kinds, right = episodes.state["kind"], episodes.returns
    each = [jnp.where(kinds == k, right, 0.0).sum() / (kinds == k).sum() for k in range(2)]
    return {f"success/{name}": x for name, x in zip(KINDS, each, strict=True)} | {
        "success": jnp.minimum(*each)
    }


def by_ppo(model: LanguageModel, args: argparse.Namespace, optimizer: Any) -> tuple[Any, ...]:
    """Start, learning from episodes, and the policy's parameters."""
    pair = models.shared_trunk(model, models.linear_head(args.width, stddev=0.01))
    config = ppo.Config(
        TURN, PAD, (END, CLOSE), num_epochs=args.epochs, num_minibatches=args.minibatches
    )
    hyper = ppo.Hyperparameters(gae_lambda=1.0, kl_horizon=jnp.inf)

    def start(policy: Params, key: Array) -> ppo.State:
        params = pair.init(key) | {"policy": policy}
        return ppo.init(params, optimizer, key, kl_coef=args.kl_coef)

    def learn(state: ppo.State, episodes: rollout.Episodes, reference: Params) -> Any:
        return ppo.learn(
            state, episodes.rollout, episodes.token_rewards, reference, hyper,
            model=pair, optimizer=optimizer, config=config,
        )  # fmt: skip

    return start, learn, lambda params: params["policy"]


def by_grpo(model: LanguageModel, args: argparse.Namespace, optimizer: Any) -> tuple[Any, ...]:
    """The same of GRPO."""
    config = grpo.Config(
        TURN, PAD, (END, CLOSE), group_size=args.group, num_epochs=args.epochs,
        num_minibatches=args.minibatches,
    )  # fmt: skip
    hyper = grpo.Hyperparameters(kl_coef=args.kl_coef)

    def learn(state: grpo.State, episodes: rollout.Episodes, reference: Params) -> Any:
        return grpo.learn(
            state, episodes.rollout, episodes.returns, reference, hyper,
            model=model, optimizer=optimizer, config=config,
        )  # fmt: skip

    return (
        lambda policy, key: grpo.init(policy, optimizer, key),
        learn,
        lambda params: params,
    )


def train_sft(args: argparse.Namespace, model: LanguageModel, keys: Array, run: Run) -> Params:
    """All policies imitate their demonstrations; a step is a pass over them."""
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, 8 * args.passes))

    def loss(params: Params, batch: tuple[Array, Array, Array]) -> Any:
        tokens, real, learned = batch
        return sft.loss(params, model, tokens, learned, real)

    def demonstrations(key: Array) -> tuple[Array, Array, Array]:
        return jax.vmap(demonstrate)(jax.random.split(key, args.demonstrations))

    @jax.vmap
    def one(state: sft.TrainState, data: Any, key: Array) -> tuple[sft.TrainState, Any]:
        key = jax.random.fold_in(key, state.step)
        params, opt_state, measured = descend(
            loss, state.params, state.opt_state, data, key,
            optimizer=optimizer, num_epochs=1, num_minibatches=8,
        )  # fmt: skip
        state = sft.TrainState(params, opt_state, state.step + 1, state.num_skipped)
        return state, {"loss": measured["loss"].mean(), "entropy": measured["entropy"].mean()}

    @sharding.Step
    def pass_over(state: sft.TrainState, data: Any, keys: Array) -> tuple[sft.TrainState, Any]:
        state, metrics = one(state, data, keys)
        return state, jax.tree.map(jnp.mean, metrics)

    data = jax.jit(jax.vmap(demonstrations))(keys)
    trained = run.train(
        "sft",
        jax.vmap(lambda key: sft.init(model.init(key), optimizer)),
        keys,
        step=lambda state, _: pass_over(state, data, keys),
        batches=partial(batches_from, epoch=numbers(args.passes)),
        num_steps=args.passes,
        save_every=args.passes,
        show={"loss": "loss"},
    )
    return trained.state.params


def algorithm(args: argparse.Namespace, model: LanguageModel) -> tuple[Any, ...]:
    """How all policies begin, an iteration of all of them, and where in the state they are."""
    num_updates = args.iterations * args.epochs * args.minibatches
    rate = optax.linear_schedule(args.learning_rate, 0.1 * args.learning_rate, num_updates)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    start, learn, policy_of = {"ppo": by_ppo, "grpo": by_grpo}[args.algorithm](
        model, args, optimizer
    )

    group = args.group if args.algorithm == "grpo" else 1

    @jax.vmap
    def one(state: Any, reference: Params, works: Array) -> tuple[Any, dict[str, Array]]:
        reset_key, key = jax.random.split(iteration.keys(state)[0])
        reset_keys = jnp.repeat(jax.random.split(reset_key, args.episodes // group), group)
        episodes = perform(model, policy_of(state.params), problems(works), reset_keys, key)
        state, metrics = learn(state, episodes, reference)
        return state, metrics | episodes.metrics | success(episodes)

    @sharding.Step
    def iterate(state: Any, reference: Params, works: Array) -> tuple[Any, dict[str, Array]]:
        state, metrics = one(state, reference, works)
        of_seeds = {name: x[: args.seeds].mean() for name, x in metrics.items()}
        each = {f"success/seed {i}": metrics["success"][i] for i in range(args.seeds)}
        return state, of_seeds | each | {"success/without tool": metrics["success"][-1]}

    return jax.vmap(start), iterate, policy_of


def numbers(count: int) -> Callable[[int, int], Iterator[int]]:
    """Steps that need no data but their number."""
    return lambda _, start: iter(range(start, count))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    clock, mesh = Clock(), sharding.mesh()
    config = {name: value for name, value in vars(args).items() if name not in ("out", "resume")}
    with (
        jax.set_mesh(mesh),
        Run(args.out, config, may_change=("save_every",), mesh=mesh, resume=args.resume) as run,
    ):
        return story(args, run, clock)


def story(args: argparse.Namespace, run: Run, clock: Clock) -> dict[str, Any]:
    model = build(args)
    # The last of them is the one whose tool never answers.
    num_members = args.seeds + 1
    works = jnp.arange(num_members) < args.seeds
    seeds = jax.vmap(partial(jax.random.fold_in, jax.random.key(args.seed)))
    sft_keys, rl_keys, test_keys = jax.vmap(partial(jax.random.split, num=3))(
        seeds(jnp.arange(num_members))
    ).T

    with clock("sft"):
        before = train_sft(args, model, sft_keys, run)

    start, iterate, policy_of = algorithm(args, model)
    with clock(args.algorithm):
        trained = run.train(
            args.algorithm,
            start,
            before,
            rl_keys,
            step=lambda state, _: iterate(state, before, works),
            batches=partial(batches_from, epoch=numbers(args.iterations)),
            num_steps=args.iterations,
            save_every=args.save_every,
            show={"success": "success", "without": "success/without tool"},
        )
    after = policy_of(trained.state.params)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0, 0))
    def test(params: Params, key: Array, works: Array) -> tuple[rollout.Episodes, Any]:
        environment = problems(works, unseen=True)
        reset_key, key = jax.random.split(key)
        reset_keys = jax.random.split(reset_key, TESTED)
        episodes = perform(model, params, environment, reset_keys, key, sampler=sampling.greedy)
        return episodes, success(episodes)

    with clock("test"):
        everywhere = jnp.ones(num_members, bool)
        episodes, with_tool = test(after, test_keys, works)
        _, removed = test(after, test_keys, ~everywhere)
        _, demonstrated = test(before, test_keys, everywhere)
    pieces = rollout.transcripts(jax.tree.map(lambda x: x[0, :SHOWN], episodes.rollout))
    texts = [[(own, "".join(TEXT[i] for i in ids)) for own, ids in row] for row in pieces]
    write_transcripts(args.out / "samples.md", texts, episodes.returns[0, :SHOWN])
    draw(trained.rows, args, args.out / "success.png")

    def told(measured: dict[str, Array]) -> dict[str, list[float]]:
        columns = {name: np.asarray(x)[: args.seeds] for name, x in measured.items()}
        return {name: np.round(x.astype(float), 3).tolist() for name, x in columns.items()}

    found, alone = told(with_tool), told(removed)
    summary = {
        "algorithm": args.algorithm,
        "seeds": args.seeds,
        "seeds_solved": sum(x >= SOLVED for x in found["success"]),
        "with_tool": found,
        "tool_removed": alone,
        "demonstrations_alone": told(demonstrated),
        "trained_without_tool": {name: round(float(x[-1]), 3) for name, x in with_tool.items()},
        "compilations_after_first_iteration": trained.recompilations,
        **{f"seconds/{name}": seconds for name, seconds in clock.seconds.items()},
        "seconds/compile": run.compilations.seconds,
        "seconds/total": clock.total(),
    }
    run.write("summary.json", summary)
    return summary


def draw(rows: Sequence[dict[str, Any]], args: argparse.Namespace, path: Path) -> None:
    """The success of a batch by iteration: each seed, and the one without a tool."""
    steps = [row["step"] for row in rows]
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = figure.subplots()
        names = [f"success/seed {i}" for i in range(args.seeds)]
        for number, name in enumerate(names):
            label = f"{args.seeds} seeds with tools" if number == 0 else None
            colour = plots.BLUE
            axis.plot(steps, [row[name] for row in rows], color=colour, alpha=0.6, label=label)
        without = [row["success/without tool"] for row in rows]
        axis.plot(steps, without, color=plots.ORANGE, label="trained without")
        axis.axhline(SOLVED, color=plots.FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.set_ylim(-0.03, 1.03)
        axis.set_xlabel(f"{args.algorithm.upper()} iteration")
        axis.set_ylabel("success, the harder kind")
        title = "Calling a calculator and a store"
        axis.set_title(title, loc="left", fontweight="bold")
        axis.legend(loc="center right", frameon=False)
        figure.savefig(path, dpi=220)


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
