"""Language models in a few lines of jnp, none of them Flax, and numbers to compare them with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax.types import LanguageModel, Params


def bigram(vocab_size: int, *, context_length: int = 64) -> LanguageModel:
    """The logits after a token are its row of a table, so all that follows can be computed."""

    def init(key: Array) -> Params:
        return {"table": jax.random.normal(key, (vocab_size, vocab_size))}

    def hidden(params: Params, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        return params["table"][tokens[:, first:]]

    def prefill(
        params: Params, prompts: Array, mask: Array, *, length: int
    ) -> tuple[Array, tuple[()]]:
        return params["table"][prompts[:, -1]], ()

    def decode(params: Params, cache: tuple[()], tokens: Array) -> tuple[Array, tuple[()]]:
        return params["table"][tokens], ()

    def logits(params: Params, hidden: Array) -> Array:
        return hidden

    def extend(
        params: Params, cache: tuple[()], tokens: Array, mask: Array
    ) -> tuple[Array, tuple[()]]:
        return params["table"][tokens[:, -1]], ()

    return LanguageModel(init, hidden, prefill, decode, logits, vocab_size, context_length, extend)


def recurrent(vocab_size: int, width: int, *, context_length: int = 64) -> LanguageModel:
    """h ← tanh(E[token] + h·W) at real tokens; the cache is h."""

    def init(key: Array) -> Params:
        keys = jax.random.split(key, 3)
        return {
            "embedding": jax.random.normal(keys[0], (vocab_size, width)),
            "mixing": jax.random.normal(keys[1], (width, width)) / width**0.5,
            "head": jax.random.normal(keys[2], (width, vocab_size)) / width**0.5,
        }

    def advance(params: Params, state: Array, token: Array, real: Array) -> Array:
        new = jnp.tanh(params["embedding"][token] + state @ params["mixing"])
        return jnp.where(real[:, None], new, state)

    def run(params: Params, start: Array, tokens: Array, mask: Array) -> tuple[Array, Array]:
        def step(state: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            state = advance(params, state, *at)
            return state, state

        return jax.lax.scan(step, start, (tokens.T, mask.T))

    def hidden(params: Params, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        _, states = run(params, jnp.zeros((len(tokens), width)), tokens, attention_mask)
        return states.swapaxes(0, 1)[:, first:]

    def prefill(params: Params, prompts: Array, mask: Array, *, length: int) -> tuple[Array, Array]:
        state = hidden(params, prompts, mask)[:, -1]
        return state, state

    def decode(params: Params, cache: Array, tokens: Array) -> tuple[Array, Array]:
        state = advance(params, cache, tokens, jnp.ones(tokens.shape, bool))
        return state, state

    def logits(params: Params, hidden: Array) -> Array:
        return hidden @ params["head"]

    def extend(params: Params, cache: Array, tokens: Array, mask: Array) -> tuple[Array, Array]:
        state, _ = run(params, cache, tokens, mask)
        return state, state

    return LanguageModel(init, hidden, prefill, decode, logits, vocab_size, context_length, extend)


def scattered(model: LanguageModel, seed: int) -> Params:
    """Parameters all over the place, so that no bias is 0, no scale 1 and no logit small."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.float32(rng.normal("scale" in str(path), 0.3, leaf.shape)),
        jax.eval_shape(model.init, jax.random.key(0)),
    )


def log_softmax(logits: Any, *, temperature: float = 1.0) -> np.ndarray:
    """In float64 NumPy."""
    scaled = np.asarray(logits, np.float64) / temperature
    shifted = scaled - scaled.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def chosen(values: np.ndarray, tokens: Any) -> np.ndarray:
    """The entry [..., token] of each row."""
    return np.take_along_axis(values, np.asarray(tokens)[..., None], -1)[..., 0]


def left_padded(rng: np.random.Generator, lengths: list[int], width: int, low: int, high: int):
    """Random tokens from [low, high), of which the last `lengths[i]` of row i are real."""
    tokens = rng.integers(low, high, (len(lengths), width)).astype(np.int32)
    mask = np.arange(width) >= width - np.array(lengths)[:, None]
    return tokens, mask


def numbers(tree: Any) -> Any:
    """The tree with typed keys as their bits, so that NumPy can compare it."""
    return jax.tree.map(
        lambda x: (
            np.asarray(jax.random.key_data(x))
            if jnp.issubdtype(jnp.asarray(x).dtype, jax.dtypes.prng_key)
            else np.asarray(x)
        ),
        tree,
    )


def assert_same(left: Any, right: Any) -> None:
    """Two trees are equal to the last bit."""
    jax.tree.map(np.testing.assert_array_equal, numbers(left), numbers(right))


def assert_close(left: Any, right: Any, *, atol: float) -> None:
    """Two trees are equal but for rounding."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=atol, atol=atol),
        numbers(left),
        numbers(right),
    )
