"""Gradient accumulation: the same update from any number of parts, in less memory."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram, left_padded

from rlhfjax import masked, models
from rlhfjax.algorithms import (
    dapo,
    dpo,
    grpo,
    kto,
    online_dpo,
    orpo,
    ppo,
    reinforce,
    rejection_sampling,
    remax,
    reward_model,
    rloo,
    sft,
    simpo,
)
from rlhfjax.algorithms.micro_batches import in_micro_batches
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import LanguageModel, Params, PreferenceBatch, Rollout

# What takes memory is B·T·V numbers, the logits of a batch; the parameters are 2·V·4.
V, WIDTH, B, P, T = 512, 4, 24, 4, 16
RNG = np.random.default_rng(0)


def init(key: jax.Array) -> Params:
    embedding, head = jax.random.normal(key, (2, V, WIDTH))
    return {"embedding": embedding, "head": head / WIDTH**0.5}


MODEL = bigram(V)._replace(
    init=init,
    hidden=lambda params, tokens, attention_mask, first=0: params["embedding"][tokens[:, first:]],
    logits=lambda params, hidden: hidden @ params["head"].T,
)
WIDE = MODEL._replace(hidden=lambda *args, **kw: MODEL.logits(args[0], MODEL.hidden(*args, **kw)))
SCALAR = models.scalar_model(WIDE, models.linear_head(V, stddev=0.1))
SHARED = models.shared_trunk(MODEL, models.linear_head(WIDTH, stddev=0.5))
SEPARATE = models.separate_trunks(MODEL, SCALAR)
REF = MODEL.init(jax.random.key(1))
SGD = optax.sgd(1.0)


def ragged(low: int) -> np.ndarray:
    return np.arange(T) < RNG.integers(low, T + 1, (B, 1))


PROMPTS, PROMPT_MASK = left_padded(RNG, list(RNG.integers(1, P + 1, B)), P, 0, V)
CHOSEN, REJECTED = RNG.integers(0, V, (2, B, T)).astype(np.int32)
# Without a token in the one or the other response, a row is no pair.
BATCH = PreferenceBatch(
    PROMPTS, PROMPT_MASK, CHOSEN, ragged(0), REJECTED, ragged(0), RNG.random(B, np.float32)
)
MASK = ragged(1)
TOKENS = np.concatenate([PROMPTS, CHOSEN], axis=1)
ATTENTION_MASK = np.concatenate([PROMPT_MASK, MASK], axis=1)
LOSS_MASK = ATTENTION_MASK & (RNG.random(TOKENS.shape) < 0.8)
DRIFT, VALUES = RNG.normal(size=(2, B, T)).astype(np.float32)
SCORES = RNG.normal(size=B).astype(np.float32)
SCORES[[3, 4, 9]] = np.nan


def samples_of(params: Params, values: Any = None) -> Rollout:
    """What a slightly different policy sampled."""
    log_probs, _ = response_log_probs(MODEL, params, TOKENS, ATTENTION_MASK, T)
    log_probs = masked.fill(log_probs + 0.1 * DRIFT, MASK)
    return Rollout(TOKENS, ATTENTION_MASK, MASK, log_probs, values)


Setup = tuple[Any, Callable[[int], Any], tuple[Any, ...]]
"""A state, the program for a number of micro-batches, and what else the program reads."""


def without_critic(module: ModuleType) -> Setup:
    pairs = {} if module in (remax, online_dpo) else {"group_size": 2}
    config = module.Config(T, pad_token=0, num_minibatches=2, **pairs)
    params = MODEL.init(jax.random.key(0))

    def program(num_micro_batches: int) -> Any:
        own = replace(config, num_micro_batches=num_micro_batches)
        return module.make_halves(MODEL, SGD, own)[1]

    state = module.init(params, SGD, jax.random.key(0))
    return state, program, (samples_of(params), SCORES, REF, module.Hyperparameters())


def proximal(model: models.ActorCritic) -> Setup:
    config = ppo.Config(T, pad_token=0, num_epochs=1, num_minibatches=2)
    state = ppo.init(model.init(jax.random.key(0)), SGD, jax.random.key(0), kl_coef=0.1)

    def program(num_micro_batches: int) -> Any:
        own = replace(config, num_micro_batches=num_micro_batches)
        return ppo.make_halves(model, SGD, own)[1]

    samples = samples_of(state.params["policy"], VALUES if model is SHARED else None)
    return state, program, (samples, SCORES, REF, ppo.Hyperparameters(entropy_coef=0.1))


def direct(module: ModuleType) -> Setup:
    return (
        module.init(MODEL.init(jax.random.key(0)), SGD),
        lambda number: module.make_step(MODEL, SGD, num_micro_batches=number),
        (BATCH, REF, module.Hyperparameters()),
    )


def supervised() -> Setup:
    return (
        sft.init(MODEL.init(jax.random.key(0)), SGD),
        lambda number: sft.make_step(MODEL, SGD, num_micro_batches=number),
        (TOKENS, LOSS_MASK, ATTENTION_MASK),
    )


def of_rewards() -> Setup:
    return (
        reward_model.init(SCALAR.init(jax.random.key(0)), SGD),
        lambda number: reward_model.make_step(SCALAR, SGD, num_micro_batches=number),
        (BATCH,),
    )


# The others have the forward pass of these.
CRITIC_FREE = (reinforce, rloo, remax, grpo, dapo, online_dpo, rejection_sampling)
SETUPS: dict[str, Callable[[], Setup]] = {
    "ppo_shared": lambda: proximal(SHARED),
    "ppo_separate": lambda: proximal(SEPARATE),
    "sft": supervised,
    "reward_model": of_rewards,
}
for module in CRITIC_FREE:
    SETUPS[module.__name__.split(".")[-1]] = lambda module=module: without_critic(module)
for module in (dpo, kto, orpo, simpo):
    SETUPS[module.__name__.split(".")[-1]] = lambda module=module: direct(module)


@cache
def advance(name: str, num_micro_batches: int) -> tuple[Any, int]:
    """The state and the metrics after a step, and the bytes that it needs on the way."""
    state, program, rest = SETUPS[name]()
    step = program(num_micro_batches).lower(state, *rest).compile()
    memory = step.memory_analysis().temp_size_in_bytes
    return step(state, *rest), memory


@pytest.mark.parametrize("name", SETUPS)
def test_a_step_in_micro_batches_is_the_same_step_in_less_memory(name: str) -> None:
    start = SETUPS[name]()[0].params
    whole, much = advance(name, 1)
    parts, little = advance(name, 6)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole[0].params, start)
    assert max(jax.tree.leaves(moved)) > 1e-3
    # The same numbers, added up in another order.
    assert_close(parts, whole, atol=1e-6)
    assert little < 0.4 * much


def test_any_number_of_micro_batches_gives_the_same_step() -> None:
    whole, _ = advance("kto", 1)
    for number in (2, 16, 2 * B):
        assert_close(advance("kto", number)[0], whole, atol=1e-6)


def test_a_number_that_divides_the_batch_but_not_a_minibatch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"24 rows do not divide into 16 .* num_micro_batches"):
        advance("grpo", 8)
    with pytest.raises(ValueError, match="6 rows do not divide into 4 micro-batches"):
        advance("remax", 4)
    with pytest.raises(ValueError, match="48 rows do not divide into 5 micro-batches"):
        advance("dpo", 5)


class TestInMicroBatches:
    SCALE = jnp.float32(2.0)
    ROWS = jnp.arange(12.0).reshape(6, 2), jnp.arange(6)

    @staticmethod
    def function(scale: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        return {"numbers": scale * x, "sums": (x.sum(1) + y, y)}

    @pytest.mark.parametrize("number", [1, 2, 3, 6])
    def test_rows_stay_in_order_whatever_the_result_is(self, number: int) -> None:
        divided = in_micro_batches(self.function, number)
        assert_same(divided(self.SCALE, *self.ROWS), self.function(self.SCALE, *self.ROWS))

    def test_one_is_the_function_itself(self) -> None:
        assert in_micro_batches(self.function, 1) is self.function

    def test_each_part_has_rows_from_all_over_the_batch(self) -> None:
        def least(_: None, x: jax.Array) -> jax.Array:
            return jnp.full(len(x), x.min())

        least_of_part = in_micro_batches(least, 2)(None, jnp.array([3, 1, 4, 2]))
        np.testing.assert_array_equal(least_of_part, [3, 1, 3, 1])

    @pytest.mark.parametrize("number", [0, 4, 12])
    def test_rows_that_do_not_divide_are_refused(self, number: int) -> None:
        with pytest.raises(ValueError, match=f"6 rows do not divide into {number} micro-batches"):
            in_micro_batches(self.function, number)(self.SCALE, *self.ROWS)

    def test_a_sweep_is_a_vmap_over_parameters(self) -> None:
        def loss(scale: jax.Array) -> jax.Array:
            numbers = in_micro_batches(self.function, 3)(scale, *self.ROWS)["numbers"]
            return jnp.square(numbers).sum()

        # d/ds of s²·Σx² with Σx² = 506.
        grads = jax.vmap(jax.grad(loss))(jnp.array([1.0, 2.0]))
        np.testing.assert_allclose(grads, [1012.0, 2024.0])


def test_with_rematerialised_blocks_it_takes_less_still() -> None:
    tokens, mask = RNG.integers(0, 8, (16, 32)), np.ones((16, 32), bool)
    memory, grads = {}, {}
    for remat in (False, True):
        config = models.DecoderConfig(8, 32, width=16, num_layers=3, num_heads=2, remat=remat)
        model = models.decoder(config)
        params = jax.jit(model.init)(jax.random.key(0))

        @jax.jit
        @jax.grad
        def gradient(params: Params, model: LanguageModel = model) -> jax.Array:
            return jnp.square(in_micro_batches(model.hidden, 4)(params, tokens, mask)).mean()

        compiled = gradient.lower(params).compile()
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        grads[remat] = compiled(params)
    assert_close(grads[True], grads[False], atol=1e-5)
    assert memory[True] < 0.8 * memory[False]
