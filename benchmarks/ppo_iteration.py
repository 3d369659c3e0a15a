"""Times full PPO iterations on random weights; prints one JSON line.

    python benchmarks/ppo_iteration.py --layers 4 --width 256 --heads 4 --vocab 512 --batch 64 \
        --prompt 16 --response 32 --epochs 4 --minibatches 4 --iters 6

Policy, reference, separate value model and reward model are all of that size; the end token is
disabled, the arithmetic float32, the optimiser AdamW with one update a minibatch.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
import tyro

from rlhfjax import models
from rlhfjax.algorithms import ppo, reward_model


@dataclass(frozen=True)
class Args:
    """Times full PPO iterations on random weights."""

    layers: int = 4
    """Blocks of every model."""
    width: int = 256
    """Size of the hidden states."""
    heads: int = 4
    """Attention heads."""
    vocab: int = 512
    """Size of the vocabulary."""
    batch: int = 64
    """Prompts in an iteration."""
    prompt: int = 16
    """Tokens of a prompt."""
    response: int = 32
    """Tokens of a response."""
    epochs: int = 4
    """Passes over each batch."""
    minibatches: int = 4
    """Updates in each pass."""
    iters: int = 6
    """Iterations that are timed, after the first."""


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds until everything that the function returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def best_of(count: int, function: Callable[[], object]) -> float:
    """The least of several timings, after one that compiles."""
    function()
    return min(seconds(function) for _ in range(count))


def gemm_rate() -> float:
    """Operations a second of a large float32 matrix product."""
    size = 2048
    matrix = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / best_of(10, lambda: product(matrix, matrix))


def operations(args: Args) -> float:
    """Floating-point operations of an iteration, counted by formula.

    A forward pass of a token costs 2·12·D² a layer in projections, 4·S·D a layer in attention
    (scores and mixing, every pair of positions) and, where logits are asked for, 2·D·V in the
    head. Counted are the rollout, the policy's log-probabilities, the reference, value and reward
    passes, and three forward passes' worth for every update of policy and value model. No token
    is left out, whether or not an implementation can do without it.
    """
    length = args.prompt + args.response
    trunk = args.layers * (24 * args.width**2 + 4 * length * args.width) * length
    head = 2 * args.width * args.vocab * args.response
    scoring = 5 * trunk + 3 * head
    training = 3 * args.epochs * (2 * trunk + head)
    return float(args.batch * (scoring + training))


def main(args: Args) -> dict[str, object]:
    """Builds the program, runs it and its phases, returns the figures."""
    rate = gemm_rate()
    model = models.decoder(
        models.DecoderConfig(
            vocab_size=args.vocab,
            context_length=args.prompt + args.response,
            width=args.width,
            num_layers=args.layers,
            num_heads=args.heads,
        )
    )
    scalar = models.scalar_model(model, models.linear_head(args.width, stddev=0.05))
    actor_critic = models.separate_trunks(model, scalar)
    config = ppo.Config(
        num_tokens=args.response,
        pad_token=0,
        num_epochs=args.epochs,
        num_minibatches=args.minibatches,
    )
    optimizer = optax.adamw(1e-5)

    def reward(params, rollout):
        return reward_model.score(
            scalar, params, rollout.tokens, rollout.attention_mask, first=args.prompt
        )

    params_key, reward_key, run_key, prompt_key = jax.random.split(jax.random.key(0), 4)
    params = jax.jit(actor_critic.init)(params_key)
    reference, reward_params = params["policy"], jax.jit(scalar.init)(reward_key)
    prompts = jax.random.randint(prompt_key, (args.batch, args.prompt), 0, args.vocab)
    mask, hyper = jnp.ones(prompts.shape, bool), ppo.Hyperparameters()
    state = ppo.init(params, optimizer, run_key, kl_coef=0.1)
    step = ppo.make_step(actor_critic, reward, optimizer, config)

    start = time.perf_counter()
    run = step.lower(state, prompts, mask, reference, reward_params, hyper).compile()
    compile_s = time.perf_counter() - start
    times = []
    for _ in range(args.iters + 1):
        start = time.perf_counter()
        state, metrics = run(state, prompts, mask, reference, reward_params, hyper)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:])

    # The phases once more, each a program of its own: their sum is not exactly the iteration.
    sample = jax.jit(partial(ppo.sample, model=actor_critic, config=config))
    rollout = sample(state, prompts, mask, hyper)
    score = jax.jit(reward)
    scores = score(reward_params, rollout)
    experience = jax.jit(partial(ppo.experience, model=actor_critic))
    phases = {
        "rollout": best_of(3, lambda: sample(state, prompts, mask, hyper)),
        "reward": best_of(3, lambda: score(reward_params, rollout)),
        "experience": best_of(
            3,
            lambda: experience(state.params, rollout, scores, reference, hyper, state.kl_coef),
        ),
    }
    floor = operations(args) / rate
    return {
        "compile_s": compile_s,
        "first_s": times[0],
        "median_s": median,
        "all": times[1:],
        "response_tokens_per_s": args.batch * args.response / median,
        "gemm_gflops": rate / 1e9,
        "floor_s": floor,
        "fraction_of_floor": floor / median,
        "phases_s": phases | {"updates": median - sum(phases.values())},
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Args))))
