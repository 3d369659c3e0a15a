"""A line world whose reward nobody tells: it is learnt from ratings or from preferences.

    python experiments/line_world.py --out runs/line_world

1. A policy that knows nothing explores from random starts.
2. Reward models of observation and action are learnt, (a) by regression on the reward of each step
   ("ratings"), (b) from pairs of segments: the one with more reward is preferred, and either half
   the time if both have the same ("preferences", Christiano et al. 2017).
3. PPO trains a policy on each learnt reward. The true one is measured, and used nowhere.

Preferences leave a constant open: r + c at every step explains them as well. Where arriving ends
an episode such a constant is a reason to hurry or to stay. So here nothing ends: whoever is done
stays where he is until all have made the same number of steps, in the segments and in the games
of PPO, and a constant adds the same to everything.

Prints a line of JSON for each length and each source of reward. A seed is solved if the most
probable actions lead from every state to the right end in as few steps as possible.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
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
from matplotlib.figure import Figure

from rlhfjax import advantages, masked
from rlhfjax.algorithms.train_state import descend
from rlhfjax.cli import plots
from rlhfjax.log_probs import token_log_probs
from rlhfjax.losses import policy, reward, value
from rlhfjax.tasks.line_world import NUM_ACTIONS, LineWorld, State, line_world
from rlhfjax.types import Loss, Params

SOURCES = ("ratings", "preferences")
EXPLORED, REWARD_EPOCHS, BATCH = 512, 20, 32
GAMMA, GAE_LAMBDA, VALUE_COEF = 0.95, 0.95, 0.5
OPTIMIZER = optax.adam(1e-2)


def network(size: int) -> nn.Module:
    """Its last layer starts at 0: every action is equally likely, every number 0."""
    last = nn.Dense(size, kernel_init=nn.initializers.zeros)
    return nn.Sequential([nn.Dense(32), nn.relu, last])


actor, critic, judge = network(NUM_ACTIONS), network(1), network(1)


def play(world: LineWorld, params: Params, key: Array, num_episodes: int) -> tuple[Array, ...]:
    """Observations [B, T + 1, n]; actions, log-probabilities and true rewards [B, T]."""

    def advance(state: State, key: Array) -> tuple[State, tuple[Array, ...]]:
        observation = world.observe(state)
        logits = actor.apply(params, observation)
        action = jax.random.categorical(key, logits)
        state, _, gain, _ = world.step(state, action)
        return state, (observation, action, token_log_probs(logits, action), gain)

    def episode(key: Array) -> tuple[Array, ...]:
        start_key, run_key = jax.random.split(key)
        keys = jax.random.split(run_key, world.num_steps)
        state, (observations, *rest) = jax.lax.scan(advance, world.reset(start_key), keys)
        return jnp.concatenate([observations, world.observe(state)[None]]), *rest

    return jax.vmap(episode)(jax.random.split(key, num_episodes))


def judged(params: Params, observations: Array, actions: Array) -> Array:
    """The learnt reward of each step."""
    inputs = jnp.concatenate([observations, jax.nn.one_hot(actions, NUM_ACTIONS)], axis=-1)
    return judge.apply(params, inputs)[..., 0]


def reward_loss(params: dict[str, Params], pairs: tuple[Array, ...]) -> Loss:
    """Of both reward models, side by side: neither has a parameter of the other."""
    observations, actions, rewards = pairs
    of_ratings, _ = reward.rating(judged(params["ratings"], observations, actions), rewards)
    first, second = judged(params["preferences"], observations, actions).sum(-1).T
    preference = 0.5 + 0.5 * jnp.sign(rewards[:, 0].sum(-1) - rewards[:, 1].sum(-1))
    of_preferences, _ = reward.pairwise(first, second, preference=preference)
    return of_ratings + of_preferences, {}


def learn_rewards(key: Array, explored: tuple[Array, ...]) -> dict[str, Params]:
    """From random pairs of segments, each half an episode: [B, 2, T / 2]."""
    init_key, pair_key, descent_key = jax.random.split(key, 3)
    order = jax.random.permutation(pair_key, 2 * EXPLORED).reshape(EXPLORED, 2)

    def pairs(x: Array) -> Array:
        return x.reshape(2 * EXPLORED, -1, *x.shape[2:])[order]

    inputs = jnp.zeros(explored[0].shape[-1] + NUM_ACTIONS)
    params = {name: judge.init(init_key, inputs) for name in SOURCES}
    params, _, _ = descend(
        reward_loss,
        params,
        OPTIMIZER.init(params),
        jax.tree.map(pairs, explored),
        descent_key,
        optimizer=OPTIMIZER,
        num_epochs=REWARD_EPOCHS,
        num_minibatches=EXPLORED // BATCH,
    )
    return params


def ppo_loss(params: dict[str, Params], batch: tuple[Array, ...]) -> Loss:
    observations, actions, old_log_probs, whitened, returns = batch
    mask = jnp.ones(actions.shape, bool)
    log_probs = token_log_probs(actor.apply(params["actor"], observations), actions)
    values = critic.apply(params["critic"], observations)[..., 0]
    policy_loss, metrics = policy.ppo_clip(log_probs, old_log_probs, whitened, mask)
    value_loss, _ = value.value_loss(values, returns, mask)
    return policy_loss + VALUE_COEF * value_loss, metrics


def train(key: Array, num_states: Array, *, width: int, iterations: int) -> dict[str, Array]:
    """A whole run; results [2, …] in the order of SOURCES, which share every random number."""
    init_key, explore_key, reward_key, run_key = jax.random.split(key, 4)
    world = line_world(num_states=num_states, width=width, num_steps=2 * width)
    start = {
        "actor": actor.init(init_key, jnp.zeros(width)),
        "critic": critic.init(init_key, jnp.zeros(width)),
    }
    observations, actions, _, rewards = play(world, start["actor"], explore_key, EXPLORED)
    explored = observations[:, :-1], actions
    learnt = learn_rewards(reward_key, (*explored, rewards))
    discounts = GAMMA ** jnp.arange(world.num_steps)

    def learn_policy(reward_params: Params) -> dict[str, Array]:
        rewards = judged(reward_params, *explored)
        mean, var = rewards.mean(), rewards.var()

        def iterate(carry: tuple[Any, ...], key: Array) -> tuple[tuple[Any, ...], Array]:
            params, opt_state = carry
            play_key, descent_key = jax.random.split(key)
            observations, actions, log_probs, true = play(world, params["actor"], play_key, BATCH)
            rewards = judged(reward_params, observations[:, :-1], actions)
            values = critic.apply(params["critic"], observations)[..., 0]
            mask = jnp.ones(actions.shape, bool)
            step_advantages, returns = advantages.gae(
                masked.standardize(rewards, mean, var),
                values[:, :-1],
                mask,
                gamma=GAMMA,
                gae_lambda=GAE_LAMBDA,
                bootstrap_value=values[:, -1],
            )
            whitened = masked.whiten(step_advantages, mask)
            params, opt_state, _ = descend(
                ppo_loss,
                params,
                opt_state,
                (observations[:, :-1], actions, log_probs, whitened, returns),
                descent_key,
                optimizer=OPTIMIZER,
                num_epochs=4,
                num_minibatches=4,
            )
            return (params, opt_state), (true @ discounts).mean()

        keys = jax.random.split(run_key, iterations)
        (params, _), true_return = jax.lax.scan(iterate, (start, OPTIMIZER.init(start)), keys)
        return {"true_return": true_return, "solved": solved(world, params["actor"])}

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(learnt[name] for name in SOURCES))
    return jax.vmap(learn_policy)(stacked)


def solved(world: LineWorld, params: Params) -> Array:
    """Whether the greedy policy takes the shortest way from every state, in the world itself."""

    def advance(state: State, _: None) -> tuple[State, Array]:
        action = jnp.argmax(actor.apply(params, world.observe(state)))
        state, _, gain, _ = world.step(state, action)
        return state, gain > 0

    def arrives_in_time(position: Array) -> Array:
        start = State(position, jnp.int32(0))
        _, arrived = jax.lax.scan(advance, start, length=world.width)
        return arrived[world.num_states - 2 - position]

    positions = jnp.arange(world.width)
    return jnp.all(jax.vmap(arrives_in_time)(positions) | (positions > world.num_states - 2))


def draw(returns: np.ndarray, lengths: Sequence[int], path: Path) -> None:
    """Median, quartiles and extremes over seeds; a line at the mean return of the shortest ways."""
    with matplotlib.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.2, 2.6 * len(lengths)), layout="constrained")
        axes = figure.subplots(len(lengths), 2, sharex=True, sharey="row", squeeze=False)
        for (row, column), axis in np.ndenumerate(axes):
            colour = (plots.BLUE, plots.ORANGE)[column]
            levels = np.quantile(returns[row, :, column], [0, 0.25, 0.5, 0.75, 1], axis=0)
            iterations = np.arange(1, levels.shape[1] + 1)
            axis.fill_between(iterations, levels[0], levels[4], color=colour, alpha=0.15, lw=0)
            axis.fill_between(iterations, levels[1], levels[3], color=colour, alpha=0.35, lw=0)
            axis.plot(iterations, levels[2], color=colour)
            axis.axhline(np.mean(GAMMA ** np.arange(lengths[row] - 1)), color=plots.FAINT, lw=0.8)
            axis.set_title(f"{lengths[row]} states, reward from {SOURCES[column]}", loc="left")
        figure.supxlabel("PPO iteration", fontsize=9)
        figure.supylabel("true discounted return", fontsize=9)
        figure.savefig(path, dpi=220)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description="A line world whose reward is learnt.")
    add = parser.add_argument
    add("--states", type=int, nargs="+", default=[3, 16], help="lengths of the line")
    add("--seeds", type=int, default=10, help="independent runs of each, trained at once")
    add("--seed", type=int, default=0, help="decides everything that is random")
    add("--iterations", type=int, default=40, help="rounds of playing and learning")
    add("--out", type=Path, help="folder for summary.json and curves.png")
    args = parser.parse_args(argv)
    if min(args.states) < 2 or args.seeds < 1 or args.iterations < 1:
        parser.error("--states must be at least 2 each, --seeds and --iterations at least 1")

    keys = jax.random.split(jax.random.key(args.seed), args.seeds)
    run = partial(train, width=max(args.states), iterations=args.iterations)
    lowered = jax.jit(jax.vmap(jax.vmap(run, (0, None)), (None, 0))).lower(
        keys, jnp.array(args.states)
    )
    # It runs once, for two seconds: the last of LLVM's optimisations would take longer than that.
    program = lowered.compile(compiler_options={"xla_backend_optimization_level": 1})
    compiled = time.perf_counter()
    results = jax.device_get(program(keys, jnp.array(args.states)))
    ran = time.perf_counter()
    returns = np.asarray(results["true_return"], np.float64)
    summary = [
        {
            "states": length,
            "reward": source,
            "seeds": args.seeds,
            "seeds_solved": int(results["solved"][row, :, column].sum()),
            "true_return": np.round(returns[row, :, column, -1], 4).tolist(),
            "seconds": ran - start,
            "compile_seconds": compiled - start,
        }
        for row, length in enumerate(args.states)
        for column, source in enumerate(SOURCES)
    ]
    for line in summary:
        print(json.dumps(line))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(returns, args.states, args.out / "curves.png")
        (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
