"""Sampling responses: what a response is, whose randomness it uses, and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_same, bigram, chosen, left_padded, log_softmax, recurrent, scattered

from rlhfjax import models, rollout, sampling
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import LanguageModel, Params, Rollout

V, P, T, PAD, END = 11, 6, 8, 0, 2
PROMPTS, PROMPT_MASK = left_padded(np.random.default_rng(0), [6, 4, 1, 3, 6], P, 3, V)
KEY = jax.random.key(7)
DECODER = models.decoder(models.DecoderConfig(V, P + T, width=16, num_layers=1, num_heads=2))
COMPILED = jax.jit(
    rollout.generate,
    static_argnums=0,
    static_argnames=("num_tokens", "pad_token", "end_token", "sampler", "value_of"),
)
MODELS = {"decoder": DECODER, "not Flax": recurrent(V, 8)}


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Any = PROMPTS,
    mask: Any = PROMPT_MASK,
    key: jax.Array = KEY,
    **settings: Any,
) -> Rollout:
    settings = {"num_tokens": T, "pad_token": PAD, "end_token": END} | settings
    return COMPILED(model, params, jnp.asarray(prompts), jnp.asarray(mask), key, **settings)


@pytest.fixture(scope="module", params=MODELS)
def policy(request: pytest.FixtureRequest) -> tuple[LanguageModel, Params]:
    """Models that end some of the responses early."""
    model = MODELS[request.param]
    params = scattered(model, seed=1)
    samples = generate(model, params)
    assert samples.response_mask.any(1).all() and 0 < (~samples.response_mask).sum() < 25
    return model, params


def scripted(successor: dict[int, int]) -> Params:
    """A table that all but surely sends each token to its successor."""
    table = np.zeros((V, V), np.float32)
    for token, after in successor.items():
        table[token, after] = 50.0
    return {"table": table}


class TestEndToken:
    PARAMS = scripted({5: 6, 6: 7, 7: END, 9: END, 3: 3})
    PROMPTS = np.array([[PAD, 5], [PAD, 9], [4, 3]])
    MASK = PROMPTS != PAD

    def sample(self, **settings: Any) -> Rollout:
        return generate(bigram(V), self.PARAMS, self.PROMPTS, self.MASK, num_tokens=5, **settings)

    def test_a_response_ends_with_it_and_padding_follows(self) -> None:
        samples = self.sample()
        np.testing.assert_array_equal(
            samples.responses, [[6, 7, END, PAD, PAD], [END, PAD, PAD, PAD, PAD], [3] * 5]
        )
        mask = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]], bool)
        np.testing.assert_array_equal(samples.response_mask, mask)
        np.testing.assert_array_equal(samples.attention_mask, np.hstack([self.MASK, mask]))
        np.testing.assert_array_equal(samples.prompts, self.PROMPTS)
        np.testing.assert_array_equal(samples.tokens[:, :2], self.PROMPTS)

    def test_log_probs_behind_it_are_0(self) -> None:
        samples = self.sample(temperature=20.0, sampler=sampling.greedy)
        # 50 / 20 against ten zeros.
        sure = 2.5 - np.log(np.exp(2.5) + 10)
        np.testing.assert_allclose(
            samples.log_probs, np.where(samples.response_mask, sure, 0.0), rtol=1e-5
        )

    def test_it_may_be_the_padding_too(self) -> None:
        samples = self.sample(pad_token=END)
        np.testing.assert_array_equal(samples.responses[:2], [[6, 7, 2, 2, 2], [2, 2, 2, 2, 2]])
        np.testing.assert_array_equal(samples.response_mask.sum(1), [3, 1, 5])

    def test_responses_of_nothing_but_it(self) -> None:
        samples = generate(bigram(V), scripted(dict.fromkeys(range(V), END)))
        np.testing.assert_array_equal(samples.responses, [[END] + [PAD] * (T - 1)] * 5)
        np.testing.assert_array_equal(samples.response_mask.sum(1), 1)
        assert np.isfinite(samples.log_probs).all()

    def test_any_of_several_ends_a_response(self) -> None:
        samples = self.sample(end_token=(END, 7))
        np.testing.assert_array_equal(
            samples.responses, [[6, 7, PAD, PAD, PAD], [END, PAD, PAD, PAD, PAD], [3] * 5]
        )
        np.testing.assert_array_equal(samples.response_mask.sum(1), [2, 1, 5])

    def test_of_none_every_response_has_t_tokens(self) -> None:
        assert self.sample(end_token=()).response_mask.all()

    def test_without_one_every_response_has_t_tokens(self) -> None:
        samples = self.sample(end_token=None)
        assert samples.response_mask.all()
        np.testing.assert_array_equal(samples.responses[0, :3], [6, 7, END])


@pytest.mark.parametrize(("stops", "end"), [(3, END), (1, END), (None, END), (2, (7, END))])
def test_decoding_stops_when_every_row_has_ended(
    stops: int | None, end: int | tuple[int, ...]
) -> None:
    model, calls = bigram(V), []

    def counting_decode(params: Params, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        jax.debug.callback(lambda: calls.append(1))
        return model.decode(params, cache, tokens)

    params = scripted({5: END if stops == 1 else 6 if stops else 5, 6: 7, 7: END})
    counted = model._replace(decode=counting_decode)
    samples = generate(counted, params, [[5], [5]], [[True], [True]], end_token=end)
    jax.effects_barrier()
    assert samples.response_mask.sum(1).tolist() == [stops or T] * 2
    assert len(calls) == (stops or T) - 1


class TestLogProbs:
    @pytest.mark.parametrize("temperature", [0.6, 1.0])
    def test_they_are_those_of_a_pass_over_the_whole_sequence(
        self, policy: tuple[LanguageModel, Params], temperature: float
    ) -> None:
        samples = generate(*policy, temperature=temperature)
        again, _ = jax.jit(response_log_probs, static_argnums=(0, 4))(
            *policy, samples.tokens, samples.attention_mask, T, temperature=temperature
        )
        expected = np.where(samples.response_mask, again, 0.0)
        np.testing.assert_allclose(samples.log_probs, expected, rtol=1e-4, atol=1e-5)

    def test_they_are_taken_before_the_samplers_filter(self) -> None:
        table = np.random.default_rng(1).normal(0, 2, (V, V)).astype(np.float32)
        samples = generate(
            bigram(V),
            {"table": table},
            temperature=0.7,
            sampler=lambda logits, u: sampling.categorical(sampling.top_k(logits, k=2), u),
        )
        before = np.asarray(samples.tokens)[:, P - 1 : -1]
        ranks = (-table).argsort(-1).argsort(-1)
        mask = np.asarray(samples.response_mask)
        assert (chosen(ranks[before], samples.responses)[mask] < 2).all()
        expected = chosen(log_softmax(table[before], temperature=0.7), samples.responses)
        np.testing.assert_allclose(
            samples.log_probs, np.where(mask, expected, 0.0), rtol=1e-4, atol=1e-5
        )


class TestRandomness:
    def test_tokens_occur_as_often_as_the_model_says(self) -> None:
        table = np.random.default_rng(2).normal(0, 1, (V, V)).astype(np.float32)
        many = 20_000
        prompts = np.full((many, 1), 4, np.int32)
        samples = generate(
            bigram(V), {"table": table}, prompts, prompts > 0, num_tokens=1, temperature=0.8
        )
        p = np.exp(log_softmax(table[4], temperature=0.8))
        counts = np.bincount(np.asarray(samples.responses)[:, 0], minlength=V)
        assert (np.abs(counts / many - p) < 4.5 * np.sqrt(p * (1 - p) / many)).all()

    def test_tokens_of_a_row_are_independent(self) -> None:
        fair = np.full((V, V), -np.inf, np.float32)
        fair[:, [4, 5]] = 0.0
        many = 4_000
        prompts = np.full((many, 1), 4, np.int32)
        samples = generate(bigram(V), {"table": fair}, prompts, prompts > 0, num_tokens=3)
        _, counts = np.unique(np.asarray(samples.responses), axis=0, return_counts=True)
        assert len(counts) == 8
        assert (np.abs(counts / many - 1 / 8) < 4.5 * np.sqrt(7 / 64 / many)).all()

    def test_the_same_key_gives_the_same_sample_and_another_key_another(
        self, policy: tuple[LanguageModel, Params]
    ) -> None:
        samples = generate(*policy)
        assert_same(generate(*policy), samples)
        other = generate(*policy, key=jax.random.key(8))
        assert (other.responses != samples.responses).any(1).sum() >= 4

    def test_a_row_does_not_depend_on_the_rest_of_the_batch(
        self, policy: tuple[LanguageModel, Params]
    ) -> None:
        samples = generate(*policy)
        others, other_mask = left_padded(np.random.default_rng(5), [2, 3, 5, 6, 1], P, 3, V)
        for row in range(5):
            prompts, mask = others.copy(), other_mask.copy()
            prompts[row], mask[row] = PROMPTS[row], PROMPT_MASK[row]
            among_others = generate(*policy, prompts, mask)
            np.testing.assert_array_equal(among_others.responses[row], samples.responses[row])
            np.testing.assert_allclose(
                among_others.log_probs[row], samples.log_probs[row], rtol=1e-5, atol=1e-6
            )

    @pytest.mark.parametrize("size", [1, 3])
    def test_nor_on_its_size(self, policy: tuple[LanguageModel, Params], size: int) -> None:
        samples = generate(*policy)
        fewer = generate(*policy, PROMPTS[:size], PROMPT_MASK[:size])
        np.testing.assert_array_equal(fewer.responses, samples.responses[:size])

    def test_equal_prompts_get_different_responses(
        self, policy: tuple[LanguageModel, Params]
    ) -> None:
        samples = generate(*policy, PROMPTS[[0] * 5], PROMPT_MASK[[0] * 5])
        assert len(np.unique(samples.responses, axis=0)) > 2

    def test_the_amount_of_left_padding_does_not_matter(
        self, policy: tuple[LanguageModel, Params]
    ) -> None:
        short, short_mask = PROMPTS[1:4, 2:], PROMPT_MASK[1:4, 2:]
        padded = np.pad(short, ((0, 0), (2, 0)), constant_values=9)
        samples = generate(*policy, short, short_mask)
        again = generate(*policy, padded, np.pad(short_mask, ((0, 0), (2, 0))))
        np.testing.assert_array_equal(again.responses, samples.responses)
        np.testing.assert_allclose(again.log_probs, samples.log_probs, rtol=1e-4, atol=1e-5)


class TestTransformations:
    def test_the_temperature_is_traced(self) -> None:
        model = recurrent(V, 8)
        params = model.init(jax.random.key(1))

        def of_temperature(temperature: jax.Array) -> Rollout:
            return rollout.generate(
                model, params, PROMPTS, PROMPT_MASK, KEY,
                num_tokens=T, pad_token=PAD, end_token=END, temperature=temperature,
            )  # fmt: skip

        both = jax.jit(jax.vmap(of_temperature))(jnp.array([1e-4, 1.0]))
        cold, warm = (jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1))
        greedy = generate(model, params, sampler=sampling.greedy)
        np.testing.assert_array_equal(cold.tokens, greedy.tokens)
        np.testing.assert_array_equal(warm.tokens, generate(model, params).tokens)

    def test_vmapped_over_keys_it_gives_the_samples_of_each_key(
        self, policy: tuple[LanguageModel, Params]
    ) -> None:
        keys = jax.random.split(KEY, 3)

        @jax.jit
        @jax.vmap
        def of_key(key: jax.Array) -> Rollout:
            return rollout.generate(
                *policy, PROMPTS, PROMPT_MASK, key, num_tokens=T, pad_token=PAD, end_token=END
            )

        every = of_key(keys)
        for index, key in enumerate(keys):
            alone = generate(*policy, key=key)
            np.testing.assert_array_equal(every.tokens[index], alone.tokens)
            np.testing.assert_array_equal(every.response_mask[index], alone.response_mask)
            np.testing.assert_allclose(
                every.log_probs[index], alone.log_probs, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("name", MODELS)
def test_values_read_while_decoding_are_those_of_a_whole_pass(name: str) -> None:
    model = MODELS[name]
    pair = models.shared_trunk(model, models.linear_head(16 if name == "decoder" else 8, stddev=1))
    params = jax.jit(pair.init)(jax.random.key(1))
    value_of = pair.value_of
    assert value_of is not None
    samples = generate(model, params["policy"], value_of=lambda hidden: value_of(params, hidden))
    _, values = jax.jit(pair.outputs)(params, samples.tokens, samples.attention_mask)
    mask = np.asarray(samples.response_mask)
    assert samples.values is not None
    np.testing.assert_allclose(
        np.asarray(samples.values)[mask], values[:, P - 1 : -1][mask], rtol=1e-4, atol=1e-5
    )
    assert values[:, P - 1 : -1][mask].std() > 1e-2


class TestRefusals:
    @pytest.mark.parametrize("num_tokens", [0, T + 1])
    def test_no_room_for_a_response(self, num_tokens: int) -> None:
        with pytest.raises(ValueError) as error:
            rollout.generate(
                DECODER, {}, PROMPTS, PROMPT_MASK, KEY, num_tokens=num_tokens, pad_token=PAD
            )
        for part in (f"prompts of {P}", f"responses of {num_tokens}", f"context of {P + T}"):
            assert part in str(error.value)

    @pytest.mark.parametrize(
        ("prompts", "mask"),
        [
            (PROMPTS.astype(np.float32), PROMPT_MASK),
            (PROMPTS, PROMPT_MASK.astype(np.int32)),
            (PROMPTS[0], PROMPT_MASK[0]),
            (PROMPTS, PROMPT_MASK[:, 1:]),
        ],
        ids=["float tokens", "int mask", "one axis", "unequal shapes"],
    )
    def test_arrays_of_another_kind(self, prompts: np.ndarray, mask: np.ndarray) -> None:
        with pytest.raises(AssertionError):
            generate(bigram(V), {"table": jnp.zeros((V, V))}, prompts, mask)


def temporary_bytes(model: LanguageModel, batch: int, prompt: int, num_tokens: int) -> int:
    def run(params: Params, prompts: jax.Array, key: jax.Array) -> Rollout:
        return rollout.generate(
            model, params, prompts, prompts >= 0, key, num_tokens=num_tokens, pad_token=PAD
        )

    compiled = jax.jit(run).lower(
        jax.eval_shape(model.init, KEY), jax.ShapeDtypeStruct((batch, prompt), jnp.int32), KEY
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes


def test_the_loop_updates_its_cache_in_place() -> None:
    batch, prompt, length, width, layers = 8, 8, 1024, 64, 3
    model = models.decoder(models.DecoderConfig(V, length, width, layers, num_heads=4))
    cache = 2 * layers * batch * length * width * 4
    in_place = temporary_bytes(model, batch, prompt, length - prompt)
    assert in_place <= 1.3 * cache

    def decode_with_a_copy(params: Params, cache: Any, tokens: jax.Array) -> tuple[jax.Array, Any]:
        hidden, after = model.decode(params, cache, tokens)
        return hidden, jax.tree.map(
            lambda new, old: jnp.where(tokens[0] < 0, old, new), after, cache
        )

    copying = model._replace(decode=decode_with_a_copy)
    assert temporary_bytes(copying, batch, prompt, length - prompt) > 1.3 * cache
