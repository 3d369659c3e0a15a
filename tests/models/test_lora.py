"""Adapters: merged, beside, alone in the state of an algorithm, and many on one base."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, left_padded, recurrent, scattered

from rlhfjax.algorithms import dpo, grpo
from rlhfjax.models import DecoderConfig, decoder, lora
from rlhfjax.types import LanguageModel, Params, PreferenceBatch, Rollout

V, P, T = 11, 4, 3
S = P + T
MODEL = decoder(DecoderConfig(V, S, width=8, num_layers=2, num_heads=2))
BASE = scattered(MODEL, seed=0)
TOKENS, MASK = left_padded(np.random.default_rng(0), [S, S - 2], S, 0, V)
SCALE = 0.5
PATTERN = r"/(qkv|down)$"


def adapters_of(seed: int, params: Params = BASE, pattern: str = PATTERN) -> lora.Adapters:
    """None of which is nothing."""
    rng = np.random.default_rng(seed)
    shapes = lora.init(jax.random.key(0), params, rank=2, pattern=pattern)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.5, x.shape)), shapes)


def logits(model: LanguageModel, params: Params) -> jax.Array:
    return model.logits(params, model.hidden(params, TOKENS, MASK))


class TestInit:
    ADAPTERS = lora.init(jax.random.key(0), BASE, rank=2, pattern=PATTERN)

    def test_the_pattern_chooses_among_the_matrices(self) -> None:
        assert set(self.ADAPTERS) == {f"layers_{i}/{m}" for i in (0, 1) for m in ("qkv", "down")}
        assert jax.tree.map(jnp.shape, self.ADAPTERS["layers_1/down"]) == {
            "a": (32, 2),
            "b": (2, 8),
        }
        everything = lora.init(jax.random.key(0), BASE, rank=2, pattern="")
        assert {"embedding/embedding", "layers_0/up"} < set(everything)
        assert not any("norm" in name for name in everything)

    def test_they_change_nothing_and_no_two_are_alike(self) -> None:
        assert_same(lora.merge(BASE, self.ADAPTERS, scale=SCALE), BASE)
        first, second = (self.ADAPTERS[f"layers_{i}/qkv"]["a"] for i in (0, 1))
        assert np.abs(first - second).min() > 0
        assert np.abs(first).max() <= 8**-0.5 and np.abs(first).max() > 0.7 * 8**-0.5

    def test_a_pattern_that_is_found_nowhere_is_refused_with_what_there_is(self) -> None:
        with pytest.raises(ValueError, match=r"'q_proj' is found in none of .*layers_0/qkv, "):
            lora.init(jax.random.key(0), BASE, rank=2, pattern="q_proj")


class TestMerge:
    def test_it_adds_the_product_to_its_matrix_and_leaves_the_rest(self) -> None:
        adapters = adapters_of(1, pattern="layers_1/down")
        merged = lora.merge(BASE, adapters, scale=SCALE)
        ab = adapters["layers_1/down"]
        expected = BASE["layers_1"]["down"]["kernel"] + SCALE * np.einsum(
            "ir,ro->io", ab["a"], ab["b"]
        )
        np.testing.assert_allclose(merged["layers_1"]["down"]["kernel"], expected, atol=1e-6)
        merged["layers_1"]["down"]["kernel"] = BASE["layers_1"]["down"]["kernel"]
        assert_same(merged, BASE)

    def test_any_model_will_do(self) -> None:
        model = recurrent(V, 6)
        base = model.init(jax.random.key(0))
        merged = lora.merge(base, adapters_of(1, base, "^(mixing|head)$"), scale=1.0)
        moved = {name for name in base if np.any(base[name] != merged[name])}
        assert moved == {"mixing", "head"}

    def test_half_precision_stays_so(self) -> None:
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
        merged = lora.merge(half, adapters_of(1), scale=SCALE)
        assert {x.dtype for x in jax.tree.leaves(merged)} == {np.dtype(jnp.bfloat16)}

    @pytest.mark.parametrize("combine", [lora.merge, lora.beside])
    def test_an_adapter_of_nothing_is_refused(self, combine: Any) -> None:
        adapters = {"layers_7/qkv": adapters_of(1)["layers_0/qkv"]}
        with pytest.raises(ValueError, match="no matrix 'layers_7/qkv'"):
            combine(BASE, adapters, scale=1.0)

    def test_what_has_no_kernel_takes_no_adapter_beside_it(self) -> None:
        with pytest.raises(ValueError, match="no matrix 'embedding/embedding'"):
            lora.beside(BASE, adapters_of(1, pattern="^embedding"), scale=1.0)


@pytest.mark.parametrize("remat", [False, True])
def test_beside_and_merged_are_the_same_in_value_and_gradient(remat: bool) -> None:
    model = decoder(DecoderConfig(V, S, width=8, num_layers=2, num_heads=2, remat=remat))
    weights = np.random.default_rng(2).normal(size=(2, S, V)).astype(np.float32)

    def total(adapters: lora.Adapters, combine: Any) -> jax.Array:
        return (weights * logits(model, combine(BASE, adapters, scale=SCALE))).sum()

    @jax.jit
    def both(adapters: lora.Adapters) -> Any:
        return [jax.value_and_grad(total)(adapters, c) for c in (lora.merge, lora.beside)]

    merged, beside = both(adapters_of(1))
    assert_close(merged, beside, atol=2e-4)
    assert abs(merged[0] - total(lora.nothing(adapters_of(1)), lora.merge)) > 0.1


def test_beside_never_builds_a_matrix_as_large_as_the_base() -> None:
    adapters = adapters_of(1, pattern="layers_1/up")

    def shapes(combine: Any) -> list[tuple[int, ...]]:
        traced = jax.make_jaxpr(lambda x: combine(BASE, x, scale=SCALE))(adapters)
        return [v.aval.shape for equation in traced.eqns for v in equation.outvars]

    assert (8, 32) in shapes(lora.merge)
    assert (8, 32) not in shapes(lora.beside)


def test_many_adapters_on_one_base_are_one_program() -> None:
    several = [adapters_of(seed) for seed in (1, 2, 3)]

    @jax.jit
    def run(base: Params, stacked: lora.Adapters) -> jax.Array:
        def one(adapters: lora.Adapters) -> jax.Array:
            adapted = lora.on(MODEL, base, combine=partial(lora.beside, scale=SCALE))
            return logits(adapted, adapters)

        return jax.vmap(one)(stacked)

    together = run(BASE, jax.tree.map(lambda *x: jnp.stack(x), *several))
    for mine, adapters in zip(together, several, strict=True):
        alone = logits(MODEL, lora.merge(BASE, adapters, scale=SCALE))
        np.testing.assert_allclose(mine, alone, rtol=1e-4, atol=1e-4)


def test_its_own_init_refuses() -> None:
    with pytest.raises(TypeError, match=r"lora\.init"):
        lora.on(MODEL, BASE, combine=lora.merge).init(jax.random.key(0))


class TestTraining:
    ADAPTERS = lora.init(jax.random.key(1), BASE, rank=2, pattern=PATTERN)
    REFERENCE = lora.nothing(ADAPTERS)
    OPTIMIZER = optax.adam(0.1)

    @pytest.mark.parametrize("combine", [lora.merge, lora.beside])
    def test_dpo_moves_adapters_alone_away_from_a_reference_that_is_the_base(
        self, combine: Any
    ) -> None:
        tokens = np.random.default_rng(3).integers(0, V, (3, 4, S)).astype(np.int32)
        ones = np.ones((4, S), bool)
        batch = PreferenceBatch(
            tokens[0, :, :P], ones[:, :P], tokens[1, :, P:], ones[:, P:], tokens[2, :, P:],
            ones[:, P:],
        )  # fmt: skip

        @partial(jax.jit, donate_argnums=0)
        def step(state: Any, base: Params) -> Any:
            adapted = lora.on(MODEL, base, combine=partial(combine, scale=SCALE))
            return dpo.make_step(adapted, self.OPTIMIZER)(
                state, batch, self.REFERENCE, dpo.Hyperparameters()
            )

        state = dpo.init(jax.tree.map(jnp.copy, self.ADAPTERS), self.OPTIMIZER)
        margins = []
        for _ in range(5):
            state, metrics = step(state, BASE)
            margins.append(float(metrics["rewards/margins"]))
        assert margins[0] == 0.0
        assert margins[-1] > 0.01
        assert jax.tree.structure(state.params) == jax.tree.structure(self.ADAPTERS)
        assert max(x.size for x in jax.tree.leaves(state)) < BASE["layers_0"]["up"]["kernel"].size
        assert not BASE["layers_0"]["up"]["kernel"].is_deleted()

    def test_grpo_raises_its_reward_with_nothing_but_adapters_in_its_state(self) -> None:
        prompts, everywhere = TOKENS[:, :P].repeat(4, 0), np.ones((8, P), bool)
        config = grpo.Config(num_tokens=T, pad_token=0, group_size=8)

        def score(_: Any, samples: Rollout) -> jax.Array:
            return (samples.responses == 7).mean(1)

        @partial(jax.jit, donate_argnums=0)
        def step(state: Any, base: Params) -> Any:
            adapted = lora.on(MODEL, base, combine=partial(lora.beside, scale=SCALE))
            update = grpo.make_step(adapted, score, self.OPTIMIZER, config)
            return update(state, prompts, everywhere, self.REFERENCE, (), grpo.Hyperparameters())

        start = jax.tree.map(jnp.copy, self.ADAPTERS)
        state = grpo.init(start, self.OPTIMIZER, jax.random.key(2))
        scores = []
        for _ in range(12):
            state, metrics = step(state, BASE)
            scores.append(float(metrics["objective/scores"]))
        assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.2
