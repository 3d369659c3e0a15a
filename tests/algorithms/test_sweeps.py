"""Sweeps: seeds, learning rates and every traced number in one program, for every algorithm.

The members of a program are a base, one for each number that differs from it there alone, one
with another learning rate and one with another seed. Each must equal its run alone, and none of
them may equal the base.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, bigram

from rlhfjax import models
from rlhfjax.algorithms import (
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
    reward_model,
    rloo,
    sft,
    simpo,
)
from rlhfjax.tasks import tabular
from rlhfjax.types import PreferenceBatch

V, T, P, N = 3, 2, 2, 4
SIZES = {"num_prompts": P, "vocab_size": V, "length": T}
TASK = jax.jit(partial(tabular.draw, **SIZES))(jax.random.key(7))
TABLE = tabular.logit_table(**SIZES)
REF = TABLE.init(jax.random.key(8))
PROMPTS = jnp.tile(TASK.prompts, (N // P, 1))
PROMPT_MASK = jnp.ones(PROMPTS.shape, bool)
# An end token, so that responses differ in length.
LENGTHS = {"num_tokens": T, "pad_token": 0, "end_token": 2, "num_epochs": 2, "num_minibatches": 2}

BIGRAM = bigram(V)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, V, (3, N, 3)), jnp.int32)
MASKS = jnp.asarray(np.arange(3) < RNG.integers(1, 4, (3, N, 1)))
BATCH = PreferenceBatch(
    TOKENS[0], MASKS[0][:, ::-1], TOKENS[1], MASKS[1], TOKENS[2], MASKS[2], jnp.linspace(0.2, 1, N)
)
BIGRAM_REF = BIGRAM.init(jax.random.key(8))
REWARD_MODEL = models.scalar_model(BIGRAM, models.linear_head(V, stddev=0.5))

# A large epsilon, so that Adam does not turn rounding of tiny gradients into steps.
OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=0.05, eps=1e-3)
NUM_ITERATIONS = 10


class Sweep(NamedTuple):
    """How an algorithm starts and goes on, its numbers, and other values of each of them."""

    init: Callable[[jax.Array], Any]
    advance: Callable[[Any, Any], Any]
    base: Any = ()
    others: dict[str, float] = {}  # noqa: RUF012


def critic_free(module: Any, others: dict[str, float], **changes: Any) -> Sweep:
    config = module.Config(**LENGTHS, **changes)
    step = module.make_step(TABLE, tabular.score, OPTIMIZER, config)
    num_rounds = getattr(config, "num_rounds", 1)
    prompts, mask = (jnp.tile(x, (num_rounds, 1)) for x in (PROMPTS, PROMPT_MASK))
    base = module.Hyperparameters()
    small = {"kl_coef": 0.1, "clip_range": 0.1, "clip_range_high": 0.1, "overlong_buffer": 1.0}
    names = {field.name for field in fields(base)}
    base = replace(base, **{name: x for name, x in small.items() if name in names})
    return Sweep(
        lambda key: module.init(TABLE.init(key), OPTIMIZER, key),
        lambda state, hyper: step(state, prompts, mask, REF, TASK, hyper)[0],
        base,
        others,
    )


def proximal() -> Sweep:
    model = models.separate_trunks(TABLE, tabular.value_table(**SIZES))
    step = ppo.make_step(model, tabular.score, OPTIMIZER, ppo.Config(**LENGTHS))
    return Sweep(
        lambda key: ppo.init(model.init(key), OPTIMIZER, key, kl_coef=0.1),
        lambda state, hyper: step(state, PROMPTS, PROMPT_MASK, REF, TASK, hyper)[0],
        ppo.Hyperparameters(
            clip_range=0.1, value_clip_range=0.1, value_coef=1.0, kl_target=0.1, kl_horizon=50.0
        ),
        {
            "temperature": 0.7,
            "gamma": 0.8,
            "gae_lambda": 0.5,
            "clip_range": 0.02,
            "value_clip_range": 0.02,
            "value_coef": 0.3,
            "entropy_coef": 0.2,
            "kl_target": 3.0,
            "kl_horizon": 20.0,
        },
    )


def direct(module: Any, others: dict[str, float]) -> Sweep:
    step = module.make_step(BIGRAM, OPTIMIZER)
    return Sweep(
        lambda key: module.init(BIGRAM.init(key), OPTIMIZER),
        lambda state, hyper: step(state, BATCH, BIGRAM_REF, hyper)[0],
        module.Hyperparameters(),
        others,
    )


def supervised() -> Sweep:
    step = sft.make_step(BIGRAM, OPTIMIZER)
    return Sweep(
        lambda key: sft.init(BIGRAM.init(key), OPTIMIZER),
        lambda state, hyper: step(state, TOKENS[0], MASKS[0], MASKS[0])[0],
    )


def of_rewards() -> Sweep:
    step = reward_model.make_step(REWARD_MODEL, OPTIMIZER)
    return Sweep(
        lambda key: reward_model.init(REWARD_MODEL.init(key), OPTIMIZER),
        lambda state, hyper: step(state, BATCH)[0],
    )


SAMPLED = {"temperature": 0.7, "kl_coef": 0.5}
CLIPPED = SAMPLED | {"clip_range": 0.02}
GROUPED = CLIPPED | {"std_eps": 0.5}
ASYMMETRIC = GROUPED | {"clip_range_high": 0.02}
SWEEPS: dict[str, Callable[[], Sweep]] = {
    "ppo": proximal,
    "reinforce": lambda: critic_free(reinforce, SAMPLED | {"gamma": 0.8}, group_size=2),
    "reinforce_plus_plus": lambda: critic_free(reinforce_plus_plus, CLIPPED, group_size=2),
    "rloo": lambda: critic_free(rloo, CLIPPED, group_size=3),
    "remax": lambda: critic_free(remax, SAMPLED),
    "grpo": lambda: critic_free(grpo, GROUPED, group_size=3),
    "dr_grpo": lambda: critic_free(dr_grpo, CLIPPED, group_size=3),
    "dapo": lambda: critic_free(
        dapo,
        ASYMMETRIC | {"overlong_buffer": 2.0, "overlong_factor": 0.3},
        group_size=3,
        num_rounds=2,
    ),
    "gspo": lambda: critic_free(gspo, ASYMMETRIC, group_size=3),
    "cispo": lambda: critic_free(cispo, ASYMMETRIC, group_size=3),
    "online_dpo": lambda: critic_free(online_dpo, SAMPLED | {"score_temperature": 0.5}),
    "rejection_sampling": lambda: critic_free(
        rejection_sampling, {"temperature": 0.7, "kl_coef": 0.3}, group_size=3
    ),
    "dpo": lambda: direct(dpo, {"beta": 0.5, "label_smoothing": 0.2}),
    "ipo": lambda: direct(ipo, {"beta": 0.5}),
    "kto": lambda: direct(kto, {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 0.5}),
    "orpo": lambda: direct(orpo, {"beta": 0.5}),
    "simpo": lambda: direct(simpo, {"beta": 1.0, "margin": 0.1}),
    "cpo": lambda: direct(cpo, {"beta": 0.5, "likelihood_coef": 0.3}),
    "sft": supervised,
    "reward_model": of_rewards,
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_member_of_a_sweep_equals_its_run_alone(name: str) -> None:
    sweep = SWEEPS[name]()
    base = jax.tree.map(jnp.float32, sweep.base)
    numbers = {field.name for field in fields(base)} if sweep.base else set()
    assert sweep.others.keys() == numbers

    init = jax.jit(sweep.init)
    state = init(jax.random.key(0))
    faster = init(jax.random.key(0))
    faster.opt_state.hyperparams["learning_rate"] = jnp.float32(0.1)
    members = {
        "base": (state, base),
        "learning_rate": (faster, base),
        "seed": (init(jax.random.key(1)), base),
    }
    if name == "ppo":
        # The one number that changes on the way, and so is part of the state.
        members["kl_coef"] = (replace(state, kl_coef=jnp.float32(0.5)), base)
    for number, value in sweep.others.items():
        members[number] = (state, replace(base, **{number: jnp.float32(value)}))

    def run(state: Any, hyper: Any) -> Any:
        def iterate(state: Any, _: None) -> tuple[Any, None]:
            return sweep.advance(state, hyper), None

        return jax.lax.scan(iterate, state, length=NUM_ITERATIONS)[0]

    together = jax.jit(jax.vmap(run))(*jax.tree.map(lambda *x: jnp.stack(x), *members.values()))
    of_base = jax.tree.map(lambda x: x[0], together.params)
    for index, (member, (start, hyper)) in enumerate(members.items()):
        alone = jax.tree.map(jnp.copy, start)
        for _ in range(NUM_ITERATIONS):
            alone = sweep.advance(alone, hyper)
        assert together.step[index] == alone.step == NUM_ITERATIONS
        swept = jax.tree.map(lambda x, i=index: x[i], together.params)
        assert_close(swept, alone.params, atol=1e-5)
        apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), swept, of_base)
        # The one number that is only reported.
        idle = member == "base" or (name, member) == ("rejection_sampling", "kl_coef")
        if not idle:
            assert max(jax.tree.leaves(apart)) > 1e-3, member
