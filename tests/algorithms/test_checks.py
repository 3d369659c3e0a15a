"""What is refused before anything is compiled, and that nothing is lost by looking."""

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import bigram, left_padded

from rlhfjax import models
from rlhfjax.algorithms import (
    best_of_n,
    checks,
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
from rlhfjax.types import LabelledBatch, LanguageModel, Params, PreferenceBatch, Rollout

V, N, P, T = 7, 4, 3, 2
LEARNING = (
    *(ppo, reinforce, reinforce_plus_plus, rloo, remax, grpo, dr_grpo, dapo, gspo, cispo),
    *(online_dpo, rejection_sampling),
)
DIRECT = (dpo, ipo, kto, simpo, cpo, orpo)
OPTIMIZER = optax.sgd(0.1)
PROMPTS, MASK = left_padded(np.random.default_rng(0), [3, 1, 2, 3], P, 0, V)


def name_of(module: ModuleType) -> str:
    return module.__name__.split(".")[-1]


def untraceable(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was traced")


# Refusing must come before tracing, and long before compiling.
UNTRACEABLE = LanguageModel(*[untraceable] * 5, V, P + T)
SCORER = models.scalar_model(UNTRACEABLE, models.linear_head(V, stddev=1.0))


def policy_and_value(module: ModuleType, model: LanguageModel = UNTRACEABLE) -> Any:
    return models.shared_trunk(model, models.linear_head(V, stddev=1.0)) if module is ppo else model


def step_of(module: ModuleType, model: LanguageModel = UNTRACEABLE, **tokens: Any) -> Any:
    config = module.Config(T, **({"pad_token": 0} | tokens))
    if module is best_of_n:
        return module.make_step(model, untraceable, config)
    return module.make_step(policy_and_value(module, model), untraceable, OPTIMIZER, config)


def spoiled(tokens: np.ndarray, token: int) -> np.ndarray:
    """At padding, if there is any: the first place of the second row."""
    tokens = np.array(tokens)
    tokens[1, 0] = token
    return tokens


def refuses(name: str, token: int) -> Any:
    return pytest.raises(
        ValueError, match=rf"^{name}: row 1 has token {token} at position 0, .* {V} tokens, 0 to 6:"
    )


@pytest.mark.parametrize("token", [-1, -100, V, 50256])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_unknown_tokens_are_named_with_their_place(token: int, convert: Callable[..., Any]) -> None:
    checks.known_tokens(convert(PROMPTS), vocab_size=V)
    with refuses("tokens", token):
        checks.known_tokens(convert(spoiled(PROMPTS, token)), vocab_size=V)


UNKNOWN = [("pad_token", V), ("pad_token", -1), ("end_token", V), ("end_token", (1, V))]


def refuses_special(name: str, token: int | tuple[int, ...]) -> Any:
    wanted = (
        rf"^{name}={np.ravel(token)[-1]} is not in the model's vocabulary of {V} tokens, 0 to 6"
    )
    return pytest.raises(ValueError, match=wanted)


@pytest.mark.parametrize("module", [*LEARNING, best_of_n], ids=name_of)
class TestStepsThatSample:
    def test_refuse_prompts_of_unknown_tokens(self, module: ModuleType) -> None:
        with refuses("prompts", V):
            step_of(module)(None, spoiled(PROMPTS, V), MASK, *[None] * (2 + (module in LEARNING)))

    @pytest.mark.parametrize(("name", "token"), UNKNOWN)
    def test_refuse_a_config_of_unknown_tokens(
        self, module: ModuleType, name: str, token: int | tuple[int, ...]
    ) -> None:
        with refuses_special(name, token):
            step_of(module, **{name: token})


@pytest.mark.parametrize("module", LEARNING, ids=name_of)
class TestHalves:
    def halves(self, module: ModuleType, **tokens: Any) -> Any:
        config = module.Config(T, **({"pad_token": 0} | tokens))
        return module.make_halves(policy_and_value(module), OPTIMIZER, config)

    def samples(self, module: ModuleType, length: int) -> Rollout:
        tokens = np.zeros((N * getattr(module.Config(T, 0), "group_size", 1), length), np.int32)
        mask = np.ones((len(tokens), T), bool)
        return Rollout(tokens, np.ones(tokens.shape, bool), mask, np.zeros(mask.shape))

    def test_refuse_prompts_and_samples_of_unknown_tokens(self, module: ModuleType) -> None:
        sample, learn = self.halves(module)
        with refuses("prompts", -1):
            sample(None, hyper=None, prompts=spoiled(PROMPTS, -1), prompt_mask=MASK)
        samples = self.samples(module, P + T)
        with refuses("samples.tokens", V):
            learn(None, replace(samples, tokens=spoiled(samples.tokens, V)), None, None, None)

    @pytest.mark.parametrize(("name", "token"), UNKNOWN)
    def test_refuse_a_config_of_unknown_tokens(
        self, module: ModuleType, name: str, token: int | tuple[int, ...]
    ) -> None:
        with refuses_special(name, token):
            self.halves(module, **{name: token})

    def test_refuse_samples_that_are_longer_than_the_context(self, module: ModuleType) -> None:
        _, learn = self.halves(module)
        samples = self.samples(module, P + T + 1)
        params, more = ({"policy": ()}, {"kl_coef": 0.1}) if module is ppo else ((), {})
        state = module.init(params, OPTIMIZER, jax.random.key(0), **more)
        with pytest.raises(ValueError, match=r"sequences of 6 tokens.* context of 5"):
            learn(state, samples, np.zeros(len(samples.tokens)), (), module.Hyperparameters())


def batch_of(length: int = T) -> PreferenceBatch:
    tokens, mask = np.zeros((N, length), np.int32), np.ones((N, length), bool)
    return PreferenceBatch(PROMPTS, MASK, tokens, mask, tokens, mask)


def reads_pairs(module: ModuleType) -> Callable[[PreferenceBatch], Any]:
    """A step on pairs, its state and the rest already there."""
    if module is reward_model:
        step = reward_model.make_step(SCORER, OPTIMIZER)
        return lambda batch: step(reward_model.init((), OPTIMIZER), batch)
    step, hyper = module.make_step(UNTRACEABLE, OPTIMIZER), module.Hyperparameters()
    return lambda batch: step(module.init((), OPTIMIZER), batch, (), hyper)


@pytest.mark.parametrize("module", [*DIRECT, reward_model], ids=name_of)
class TestAlgorithmsOfPairs:
    @pytest.mark.parametrize("column", ["prompts", "chosen", "rejected"])
    def test_refuse_unknown_tokens(self, module: ModuleType, column: str) -> None:
        batch = batch_of()
        with refuses(f"batch.{column}", -100):
            reads_pairs(module)(replace(batch, **{column: spoiled(getattr(batch, column), -100)}))

    def test_refuse_pairs_that_are_longer_than_the_context(self, module: ModuleType) -> None:
        with pytest.raises(ValueError, match=r"sequences of 6 tokens.* context of 5"):
            reads_pairs(module)(batch_of(T + 1))


@pytest.mark.parametrize("module", [kto, reward_model], ids=name_of)
class TestAlgorithmsOfLabels:
    def batch(self, length: int = T) -> LabelledBatch:
        tokens, mask = jnp.zeros((N, 2, length), int), np.ones((N, 2, length), bool)
        return LabelledBatch(PROMPTS, MASK, tokens, mask, np.ones((N, 2), bool))

    def test_refuse_unknown_tokens(self, module: ModuleType) -> None:
        batch = self.batch()
        with refuses("batch.prompts", V):
            reads_pairs(module)(replace(batch, prompts=spoiled(PROMPTS, V)))
        responses = batch.responses.at[2, 1, 0].set(V)
        with pytest.raises(ValueError, match=rf"^batch.responses: row 2, 1 has token {V} at pos"):
            reads_pairs(module)(replace(batch, responses=responses))

    def test_refuse_responses_that_are_longer_than_the_context(self, module: ModuleType) -> None:
        with pytest.raises(ValueError, match=r"sequences of 6 tokens.* context of 5"):
            reads_pairs(module)(self.batch(T + 1))


class TestSupervisedFineTuning:
    STEP = staticmethod(sft.make_step(UNTRACEABLE, OPTIMIZER))

    def test_refuses_unknown_tokens(self) -> None:
        with refuses("tokens", V):
            self.STEP(sft.init((), OPTIMIZER), spoiled(PROMPTS, V), MASK, MASK)

    def test_refuses_texts_that_are_longer_than_the_context(self) -> None:
        texts, mask = np.zeros((N, 6), np.int32), np.ones((N, 6), bool)
        with pytest.raises(ValueError, match=r"sequences of 6 tokens.* context of 5"):
            self.STEP(sft.init((), OPTIMIZER), texts, mask, mask)


def test_a_scorer_of_an_unknown_vocabulary_looks_at_nothing() -> None:
    table = models.scalar_model(bigram(V), models.linear_head(V, stddev=1.0))
    unknown = table._replace(vocab_size=None, context_length=None)
    step = reward_model.make_step(unknown, OPTIMIZER)
    state = reward_model.init(table.init(jax.random.key(0)), OPTIMIZER)
    batch = replace(batch_of(), chosen=spoiled(batch_of().chosen, -1))
    assert step(state, batch)[0].step == 1


class TestPolicyAndValueFunction:
    def value(self, **changes: int) -> Any:
        model = bigram(**({"vocab_size": V, "context_length": 9} | changes))
        return models.scalar_model(model, models.linear_head(V, stddev=1.0))

    def test_must_have_the_same_vocabulary(self) -> None:
        with pytest.raises(ValueError, match=r"policy has a vocabulary of 7 .* one of 8: "):
            models.separate_trunks(bigram(V), self.value(vocab_size=8))

    @pytest.mark.parametrize(("own", "longest"), [(9, 9), (20, 9), (4, 4)])
    def test_have_the_shorter_context(self, own: int, longest: int) -> None:
        both = models.separate_trunks(bigram(V, context_length=own), self.value())
        assert both.policy.context_length == longest

    def test_the_policys_own_where_the_value_function_knows_no_limit(self) -> None:
        value = self.value()._replace(vocab_size=None, context_length=None)
        assert models.separate_trunks(bigram(V), value).policy.context_length == 64


class TestACheckedFunction:
    """It is what `jax.jit` gave, in all but the looking."""

    TRACES: list[int] = []  # noqa: RUF012

    @staticmethod
    @jax.jit
    def total(state: Params, prompts: Any) -> Any:
        TestACheckedFunction.TRACES.append(1)
        return state + prompts.sum(), None

    @property
    def step(self) -> checks.Checked:
        return checks.Checked(self.total, "prompts", vocab_size=V)

    def test_returns_what_the_function_returns_and_traces_it_once(self) -> None:
        self.TRACES.clear()
        for _ in range(3):
            assert self.step(1, PROMPTS)[0] == 1 + PROMPTS.sum()
        assert len(self.TRACES) == 1

    def test_can_be_lowered_and_compiled(self) -> None:
        compiled = self.step.lower(1, PROMPTS).compile()
        assert compiled(1, PROMPTS)[0] == 1 + PROMPTS.sum()
        assert isinstance(self.step, jax.stages.Wrapped)

    def test_can_be_scanned_and_vmapped(self) -> None:
        step = self.step
        end, _ = jax.lax.scan(step, jnp.int32(0), jnp.stack([PROMPTS, PROMPTS]))
        assert end == 2 * PROMPTS.sum()
        both, _ = jax.vmap(step, in_axes=(0, None))(jnp.arange(2), PROMPTS)
        np.testing.assert_array_equal(both, PROMPTS.sum() + np.arange(2))

    def test_refuses_what_another_program_closes_over(self) -> None:
        with refuses("prompts", V):
            jax.jit(lambda state: self.step(state, spoiled(PROMPTS, V)))(0)

    def test_complains_of_missing_arguments_like_the_function(self) -> None:
        with pytest.raises(TypeError, match="missing a required argument"):
            self.step(1)
