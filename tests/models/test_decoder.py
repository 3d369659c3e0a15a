"""The decoder against a float64 NumPy pass, and decoding with a cache against the whole pass."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_close, left_padded, scattered

from rlhfjax import rollout, sampling
from rlhfjax.models import DecoderConfig, Rotary, Stretched, decoder
from rlhfjax.models.attention import attend
from rlhfjax.types import LanguageModel, Params, Rollout

RNG = np.random.default_rng(0)
V, P, S = 17, 7, 12
CONFIGS = {
    "GPT-2": DecoderConfig(V, 16, width=16, num_layers=2, num_heads=2),
    "Llama": DecoderConfig(
        V, 16, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24,
        rotary_base=10_000.0, rms_norm=True, gated_mlp=True, bias=False, tied_head=False,
    ),
    "mixed": DecoderConfig(
        V, 16, width=16, num_layers=1, num_heads=4, num_kv_heads=1, rotary_base=100.0,
        gated_mlp=True,
    ),
}  # fmt: skip
# All switches that public models have, in one that nobody has: a window is shorter than the prompt,
# and the caps are of the size of what they cap.
EVERYTHING = DecoderConfig(
    V, 16, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_width=6, mlp_width=24,
    rotary=(Rotary(100.0, size=4), Rotary(1000.0, rescale=Stretched(3.0))), windows=(None, 3),
    query_divisor=1.5, attention_cap=2.0, logit_cap=3.0, scaled_embedding=True, parallel=True,
    rms_norm=True, norm_eps=0.1, norm_from_one=True, qk_norm=True, post_norms=True,
    gated_mlp=True, activation=jax.nn.relu, bias=False, qkv_bias=True, output_bias=True,
)  # fmt: skip
TOKENS, MASK = left_padded(RNG, [S, S - 3, S - 5], S, 0, V)


class Tiny(NamedTuple):
    config: DecoderConfig
    model: LanguageModel
    params: Params

    def hidden(self, tokens: np.ndarray, mask: np.ndarray, first: int = 0) -> np.ndarray:
        hidden = jax.jit(self.model.hidden, static_argnames="first")
        return np.asarray(hidden(self.params, tokens, mask, first=first))

    def logits(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return np.asarray(jax.jit(self.model.logits)(self.params, self.hidden(tokens, mask)))


def build(config: DecoderConfig) -> Tiny:
    model = decoder(config)
    return Tiny(config, model, scattered(model, seed=0))


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return build(request.param)


def each_and_everything(test: Callable[..., None]) -> Callable[..., None]:
    configs = [*CONFIGS.values(), EVERYTHING]
    return pytest.mark.parametrize("tiny", configs, ids=[*CONFIGS, "everything"], indirect=True)(
        test
    )


def in_numpy(config: DecoderConfig, params: Params, tokens: np.ndarray, shift: int) -> np.ndarray:
    """Logits of one sequence without padding, its first token at position `shift`."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    positions = shift + np.arange(len(tokens))

    def dense(name: dict, x: np.ndarray) -> np.ndarray:
        return x @ name["kernel"] + name.get("bias", 0.0)

    def rms_norm(name: dict, x: np.ndarray) -> np.ndarray:
        scaled = x / np.sqrt((x**2).mean(-1, keepdims=True) + (config.norm_eps or 1e-6))
        return scaled * (name["scale"] + config.norm_from_one)

    def norm(name: dict, x: np.ndarray) -> np.ndarray:
        if config.rms_norm:
            return rms_norm(name, x)
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * name["scale"]
        return scaled + name.get("bias", 0.0)

    def rotate(vector: np.ndarray, position: int, rotary: Rotary | None) -> np.ndarray:
        if rotary is None:
            return vector
        half = (rotary.size or len(vector)) // 2
        stretch = rotary.rescale.factor if isinstance(rotary.rescale, Stretched) else 1.0
        turned = vector.copy()
        for i in range(half):
            angle = position * rotary.base ** (-i / half) / stretch
            turn = complex(vector[i], vector[half + i]) * np.exp(1j * angle)
            turned[i], turned[half + i] = turn.real, turn.imag
        return turned

    def cap(x: np.ndarray, at: float | None) -> np.ndarray:
        return x if at is None else at * np.tanh(x / at)

    def attention(layer: dict, x: np.ndarray, number: int) -> np.ndarray:
        size, group = config.head_dim, config.num_heads // config.kv_heads
        inner = [config.num_heads * size, (config.num_heads + config.kv_heads) * size]
        q, k, v = np.split(dense(layer["qkv"], x), inner, axis=-1)
        mixed = np.zeros_like(q)
        window = (config.windows or (None,) * config.num_layers)[number] or len(x)
        divisor = config.query_divisor or np.sqrt(size)

        def prepared(name: str, head: np.ndarray, t: int) -> np.ndarray:
            head = rms_norm(layer[name], head) if config.qk_norm else head
            return rotate(head, positions[t], config.rotaries[number])

        for head in range(config.num_heads):
            mine = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            for t in range(len(x)):
                query = prepared("query_norm", q[t, mine], t)
                seen = range(max(0, t + 1 - window), t + 1)
                scores = np.array([query @ prepared("key_norm", k[s, shared], s) for s in seen])
                scores = cap(scores / divisor, config.attention_cap)
                weights = np.exp(scores - scores.max())
                mixed[t, mine] = weights / weights.sum() @ v[seen, shared]
        return dense(layer["output"], mixed)

    def mlp(layer: dict, x: np.ndarray) -> np.ndarray:
        up = dense(layer["up"], x)
        if config.gated_mlp:
            gate = dense(layer["gate"], x)
            relu = config.activation is jax.nn.relu
            active = np.maximum(gate, 0) if relu else gate / (1 + np.exp(-gate))
            return dense(layer["down"], active * up)
        gelu = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        return dense(layer["down"], gelu)

    x = params["embedding"]["embedding"][tokens]
    if config.scaled_embedding:
        x = x * np.sqrt(config.width)
    if config.rotaries[0] is None:
        x = x + params["position_embedding"]["embedding"][positions]
    for number in range(config.num_layers):
        layer = params[f"layers_{number}"]
        added = attention(layer, norm(layer["attention_norm"], x), number)
        if config.post_norms:
            added = norm(layer["attention_post_norm"], added)
        read = x if config.parallel else x + added
        inner = mlp(layer, norm(layer["mlp_norm"], read))
        if config.post_norms:
            inner = norm(layer["mlp_post_norm"], inner)
        x = x + added + inner
    x = norm(params["norm"], x)
    logits = x @ (params["embedding"]["embedding"].T if config.tied_head else params["head"])
    return cap(logits, config.logit_cap)


class TestWholePass:
    @each_and_everything
    def test_logits_at_real_tokens_are_those_of_numpy(self, tiny: Tiny) -> None:
        logits = tiny.logits(TOKENS, MASK)
        assert logits.std() > 0.5
        for row, (tokens, real) in enumerate(zip(TOKENS, MASK, strict=True)):
            expected = in_numpy(tiny.config, tiny.params, tokens[real], shift=0)
            np.testing.assert_allclose(logits[row, real], expected, rtol=1e-4, atol=1e-4)

    @each_and_everything
    def test_the_gradient_is_the_slope_of_numpys_logits_in_any_direction(self, tiny: Tiny) -> None:
        weights = RNG.normal(size=(*TOKENS.shape, V)) * MASK[..., None]
        direction = jax.tree.map(lambda x: RNG.normal(size=x.shape), tiny.params)

        def total(params: Params) -> jax.Array:
            logits = tiny.model.logits(params, tiny.model.hidden(params, TOKENS, MASK))
            return jnp.sum(weights * logits)

        def along(distance: float) -> float:
            params = jax.tree.map(
                lambda x, d: np.asarray(x, np.float64) + distance * d, tiny.params, direction
            )
            return sum(
                (weights[row, real] * in_numpy(tiny.config, params, tokens[real], shift=0)).sum()
                for row, (tokens, real) in enumerate(zip(TOKENS, MASK, strict=True))
            )

        grads = jax.jit(jax.grad(total))(tiny.params)
        slopes = jax.tree.map(lambda g, d: (np.asarray(g) * d).sum(), grads, direction)
        expected = (along(1e-5) - along(-1e-5)) / 2e-5
        assert sum(jax.tree.leaves(slopes)) == pytest.approx(expected, rel=1e-4)

    def test_gradients_vmapped_over_parameters_are_those_of_each(self, tiny: Tiny) -> None:
        def total(params: Params) -> jax.Array:
            hidden = tiny.model.hidden(params, TOKENS, MASK)
            return jnp.square(tiny.model.logits(params, hidden)).mean()

        pair = [tiny.params, scattered(tiny.model, seed=1)]
        both = jax.jit(jax.vmap(jax.grad(total)))(jax.tree.map(lambda *x: jnp.stack(x), *pair))
        alone = jax.jit(jax.grad(total))
        for index, params in enumerate(pair):
            mine = jax.tree.map(lambda x, i=index: x[i], both)
            assert_close(mine, alone(params), atol=1e-4)

    @pytest.mark.parametrize(
        "tiny", [CONFIGS["Llama"], CONFIGS["mixed"]], ids=["Llama", "mixed"], indirect=True
    )
    def test_rotary_positions_matter_by_their_differences_only(self, tiny: Tiny) -> None:
        far = in_numpy(tiny.config, tiny.params, TOKENS[0], shift=1000)
        np.testing.assert_allclose(tiny.logits(TOKENS, MASK)[0], far, rtol=1e-4, atol=1e-4)

    def test_the_order_of_tokens_matters(self, tiny: Tiny) -> None:
        swapped = TOKENS.copy()
        swapped[0, [2, 7]] = TOKENS[0, [7, 2]]
        assert TOKENS[0, 2] != TOKENS[0, 7]
        last = tiny.hidden(TOKENS, MASK)[0, -1], tiny.hidden(swapped, MASK)[0, -1]
        assert np.abs(last[0] - last[1]).max() > 1e-3

    def test_the_amount_of_left_padding_does_not_matter(self, tiny: Tiny) -> None:
        prompt, pads = TOKENS[0, :5], (0, 3, 7)
        tokens = RNG.integers(0, V, (3, S)).astype(np.int32)
        mask = np.zeros((3, S), bool)
        for row, pad in enumerate(pads):
            tokens[row, pad : pad + 5], mask[row, pad : pad + 5] = prompt, True
        states = tiny.hidden(tokens, mask)
        for row, pad in enumerate(pads):
            np.testing.assert_allclose(states[row, pad : pad + 5], states[0, :5], atol=1e-5)

    def test_a_later_token_changes_nothing_before_it(self, tiny: Tiny) -> None:
        changed = TOKENS.copy()
        changed[:, 8] = (TOKENS[:, 8] + 1) % V
        before, after = tiny.hidden(TOKENS, MASK), tiny.hidden(changed, MASK)
        past = MASK & (np.arange(S) < 8)
        np.testing.assert_array_equal(before[past], after[past])
        assert (np.abs(before - after)[:, 8:].max(-1) > 1e-4).all()

    def test_tokens_at_padding_are_ignored_to_the_last_bit(self, tiny: Tiny) -> None:
        mask = MASK.copy()
        mask[1, -2:] = False
        polluted = np.where(mask, TOKENS, RNG.integers(0, V, TOKENS.shape)).astype(np.int32)
        assert (polluted != TOKENS).any()
        clean, given = tiny.hidden(TOKENS, mask), tiny.hidden(polluted, mask)
        np.testing.assert_array_equal(clean[mask], given[mask])

    @pytest.mark.parametrize("first", [1, P, S - 1])
    def test_states_from_a_position_on_are_the_tail_of_all(self, tiny: Tiny, first: int) -> None:
        tail = tiny.hidden(TOKENS, MASK, first)
        assert tail.shape == (3, S - first, 16)
        np.testing.assert_allclose(tail, tiny.hidden(TOKENS, MASK)[:, first:], atol=1e-6)

    def test_a_row_of_nothing_but_padding_is_finite_and_so_is_its_gradient(
        self, tiny: Tiny
    ) -> None:
        nothing = np.zeros_like(MASK)
        total, grads = jax.jit(
            jax.value_and_grad(
                lambda p: tiny.model.logits(p, tiny.model.hidden(p, TOKENS, nothing)).sum()
            )
        )(tiny.params)
        assert np.isfinite(total)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


class TestSegments:
    """Three texts in a row, the second behind a pad, and padding at the end."""

    TEXTS = ((0, 5), (6, 9), (9, 11))

    @pytest.mark.parametrize(
        "tiny",
        [CONFIGS["GPT-2"], replace(EVERYTHING, remat=True)],
        ids=["GPT-2", "everything, again"],
        indirect=True,
    )
    def test_packed_texts_are_what_they_are_alone(self, tiny: Tiny) -> None:
        model = tiny.model
        segment_ids = np.zeros((1, S), np.int32)
        alone, mask = np.zeros((3, S), np.int32), np.zeros((3, S), bool)
        for row, (start, end) in enumerate(self.TEXTS):
            segment_ids[0, start:end] = row + 1
            alone[row, : end - start], mask[row, : end - start] = TOKENS[0, start:end], True

        @jax.jit
        def both(params: Params) -> tuple[jax.Array, jax.Array]:
            packed = model.hidden(
                params, TOKENS[:1], segment_ids > 0, segment_ids=jnp.asarray(segment_ids)
            )
            return packed[0], model.hidden(params, alone, mask)

        packed, apart = both(tiny.params)
        for row, (start, end) in enumerate(self.TEXTS):
            np.testing.assert_allclose(packed[start:end], apart[row, : end - start], atol=1e-5)


class TestCache:
    PROMPTS, PROMPT_MASK = TOKENS[:, :P], MASK[:, :P]

    @each_and_everything
    def test_decoding_with_a_cache_equals_the_whole_pass(self, tiny: Tiny) -> None:
        states, model, params = tiny.hidden(TOKENS, MASK), tiny.model, tiny.params
        hidden, cache = jax.jit(model.prefill, static_argnames="length")(
            params, self.PROMPTS, self.PROMPT_MASK, length=S
        )
        decode, logits = jax.jit(model.decode), jax.jit(model.logits)
        for t in range(P, S + 1):
            np.testing.assert_allclose(
                logits(params, hidden), logits(params, states[:, t - 1]), atol=1e-4
            )
            if t < S:
                hidden, cache = decode(params, cache, TOKENS[:, t])

    def test_greedy_tokens_are_those_of_whole_passes(self, tiny: Tiny) -> None:
        @jax.jit
        def respond(params: Params) -> Rollout:
            return rollout.generate(
                tiny.model, params, self.PROMPTS, self.PROMPT_MASK, jax.random.key(0),
                num_tokens=S - P, pad_token=0, sampler=sampling.greedy,
            )  # fmt: skip

        samples = respond(tiny.params)
        tokens, mask = np.zeros_like(TOKENS), MASK | (np.arange(S) >= P)
        tokens[:, :P] = self.PROMPTS
        for t in range(P, S):
            tokens[:, t] = tiny.logits(tokens, mask)[:, t - 1].argmax(-1)
        np.testing.assert_array_equal(samples.tokens, tokens)
        assert len(np.unique(tokens[:, P:])) > 3

    def test_tokens_at_the_prompts_padding_are_ignored_to_the_last_bit(self, tiny: Tiny) -> None:
        polluted = np.where(self.PROMPT_MASK, self.PROMPTS, 5).astype(np.int32)
        assert (polluted != self.PROMPTS).any()

        @jax.jit
        def two_steps(prompts: jax.Array) -> tuple[jax.Array, jax.Array]:
            hidden, cache = tiny.model.prefill(tiny.params, prompts, self.PROMPT_MASK, length=P + 1)
            return hidden, tiny.model.decode(tiny.params, cache, TOKENS[:, P])[0]

        for clean, given in zip(two_steps(self.PROMPTS), two_steps(polluted), strict=True):
            np.testing.assert_array_equal(clean, given)


class TestRemat:
    @pytest.mark.parametrize(
        "tiny",
        [CONFIGS["GPT-2"], CONFIGS["Llama"], EVERYTHING],
        ids=["GPT-2", "Llama", "everything"],
        indirect=True,
    )
    def test_values_and_gradients_are_the_same(self, tiny: Tiny) -> None:
        weights = RNG.normal(size=(3, S - P, V)).astype(np.float32)

        def value_and_grad(config: DecoderConfig) -> Any:
            model = decoder(config)

            def total(params: Params) -> jax.Array:
                return (
                    weights * model.logits(params, model.hidden(params, TOKENS, MASK, first=P))
                ).sum()

            return jax.jit(jax.value_and_grad(total))(tiny.params)

        plain, again = (value_and_grad(replace(tiny.config, remat=r)) for r in (False, True))
        assert_close(again, plain, atol=1e-4)

    def test_it_keeps_one_state_a_block(self) -> None:
        tokens, mask = np.zeros((8, 32), np.int32), np.ones((8, 32), bool)
        memory = {}
        for remat in (False, True):
            model = decoder(DecoderConfig(V, 32, width=16, num_layers=4, num_heads=2, remat=remat))
            gradient = jax.jit(jax.grad(lambda p, m=model: m.hidden(p, tokens, mask).sum()))
            program = gradient.lower(jax.eval_shape(model.init, jax.random.key(0))).compile()
            memory[remat] = program.memory_analysis().temp_size_in_bytes
        assert memory[True] < 0.6 * memory[False]

    def test_parameters_and_decoding_are_the_same_program(self, tiny: Tiny) -> None:
        def programs(model: LanguageModel) -> tuple[str, ...]:
            prefill = partial(model.prefill, length=S)
            _, cache = jax.eval_shape(prefill, tiny.params, TOKENS[:, :P], MASK[:, :P])
            return (
                jax.jit(model.init).lower(jax.random.key(0)).as_text(),
                jax.jit(prefill).lower(tiny.params, TOKENS[:, :P], MASK[:, :P]).as_text(),
                jax.jit(model.decode).lower(tiny.params, cache, TOKENS[:, P]).as_text(),
            )

        assert programs(decoder(replace(tiny.config, remat=True))) == programs(tiny.model)


class TestAttend:
    B, H, K, T, D = 2, 6, 2, 3, 4
    QUERY = RNG.normal(size=(B, H, T, D)).astype(np.float32)
    KEY, VALUE = RNG.normal(size=(2, B, K, 5, D)).astype(np.float32)
    LOOK = RNG.random((B, T, 5)) < 0.6
    LOOK[..., 0], LOOK[..., 4] = True, False

    def test_grouped_heads_by_loop(self) -> None:
        expected = np.zeros((self.B, self.H, self.T, self.D))
        for b, h, t in np.ndindex(self.B, self.H, self.T):
            look, mine = self.LOOK[b, t], h // (self.H // self.K)
            scores = self.KEY[b, mine, look] @ self.QUERY[b, h, t] / np.sqrt(self.D)
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[b, h, t] = weights @ self.VALUE[b, mine, look]
        mixed = attend(self.QUERY, self.KEY, self.VALUE, self.LOOK)
        np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)

    def test_the_gradient_of_capped_scores_is_that_of_the_plain_formula(self) -> None:
        weights = RNG.normal(size=self.QUERY.shape).astype(np.float32)

        def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            key, value = (jnp.repeat(x, self.H // self.K, axis=1) for x in (key, value))
            scores = 0.7 * jnp.tanh(query @ key.swapaxes(2, 3) / 3.0 / 0.7)
            return jax.nn.softmax(jnp.where(self.LOOK[:, None], scores, -1e9)) @ value

        def gradients(function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
            grad = jax.grad(lambda *qkv: jnp.sum(weights * function(*qkv)), (0, 1, 2))
            return jax.jit(grad)(self.QUERY, self.KEY, self.VALUE)

        mine = gradients(lambda *qkv: attend(*qkv, self.LOOK, divisor=3.0, cap=0.7))
        for grad, expected in zip(mine, gradients(plain), strict=True):
            np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)

    def test_grouped_heads_are_repeated_heads(self) -> None:
        repeated = (np.repeat(x, self.H // self.K, axis=1) for x in (self.KEY, self.VALUE))
        np.testing.assert_allclose(
            attend(self.QUERY, self.KEY, self.VALUE, self.LOOK),
            attend(self.QUERY, *repeated, self.LOOK),
            rtol=1e-5,
            atol=1e-6,
        )

    def test_the_gradient_is_that_of_the_plain_formula(self) -> None:
        weights = RNG.normal(size=self.QUERY.shape).astype(np.float32)

        def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            key, value = (jnp.repeat(x, self.H // self.K, axis=1) for x in (key, value))
            scores = query @ key.swapaxes(2, 3) / self.D**0.5
            return jax.nn.softmax(jnp.where(self.LOOK[:, None], scores, -1e9)) @ value

        def gradients(function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
            grad = jax.grad(lambda *qkv: jnp.sum(weights * function(*qkv)), (0, 1, 2))
            return jax.jit(grad)(self.QUERY, self.KEY, self.VALUE)

        mine, theirs = gradients(lambda *qkv: attend(*qkv, self.LOOK)), gradients(plain)
        for grad, expected in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-5)

    def test_what_may_not_be_seen_is_ignored_to_the_last_bit(self) -> None:
        nobody = ~self.LOOK.any(1)[:, None, :, None]
        assert nobody.any()
        polluted = (np.where(nobody, np.float32(1e3), x) for x in (self.KEY, self.VALUE))
        np.testing.assert_array_equal(
            attend(self.QUERY, *polluted, self.LOOK),
            attend(self.QUERY, self.KEY, self.VALUE, self.LOOK),
        )

    def test_a_query_that_may_look_nowhere_is_finite(self) -> None:
        mixed = attend(self.QUERY, self.KEY, self.VALUE, np.zeros_like(self.LOOK))
        assert np.isfinite(mixed).all()


def num_parameters(config: DecoderConfig) -> int:
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_the_number_of_parameters_by_hand() -> None:
    # Embedding 17·16, positions 16·16, a layer 12·16² + 13·16, last norm 2·16.
    assert num_parameters(CONFIGS["GPT-2"]) == 272 + 256 + 2 * (3072 + 208) + 32
    # Embedding and head 17·16 each, a layer: query and output 16·16, key and value 16·8, three
    # matrices 16·24 and two norms 16; last norm 16.
    layer = 2 * 256 + 2 * 128 + 3 * 384 + 2 * 16
    assert num_parameters(CONFIGS["Llama"]) == 2 * 272 + 2 * layer + 16


def test_half_precision_computes_near_float32_with_float32_parameters() -> None:
    full, half = (
        build(DecoderConfig(V, 16, width=16, num_layers=1, num_heads=2, dtype=dtype))
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    shapes = jax.eval_shape(half.model.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype(np.float32)}
    hidden = half.hidden(TOKENS, MASK)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        hidden[MASK].astype(np.float32), full.hidden(TOKENS, MASK)[MASK], atol=0.15
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "message"),
    [(3, None, "width 16 .* num_heads 3"), (4, 3, "num_kv_heads 3")],
)
def test_heads_that_do_not_divide_are_refused(
    heads: int, kv_heads: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(V, 16, width=16, num_heads=heads, num_kv_heads=kv_heads)


def test_rotary_positions_refuse_heads_of_odd_size() -> None:
    with pytest.raises(ValueError, match="heads of 3: choose an even size"):
        DecoderConfig(V, 16, width=12, num_heads=4, rotary_base=10_000.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"windows": (3,)}, "windows has 1 entries for 2 layers"),
        ({"rotary": (Rotary(10.0),)}, "rotary has 1 entries for 2 layers"),
        ({"rotary": (Rotary(10.0),) * 2, "rotary_base": 10.0}, "give one"),
        ({"rotary": (Rotary(10.0, size=3),) * 2}, "choose an even size"),
    ],
)
def test_layers_that_are_not_described_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(V, 16, width=16, num_layers=2, num_heads=4, **options)


def test_sequences_longer_than_the_context_are_refused() -> None:
    model = decoder(DecoderConfig(V, context_length=S - 1, width=8, num_heads=2))
    with pytest.raises(ValueError, match=f"sequences of {S} tokens .* context of {S - 1}"):
        jax.eval_shape(model.hidden, jax.eval_shape(model.init, jax.random.key(0)), TOKENS, MASK)
