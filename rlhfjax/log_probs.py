"""Log-probabilities of tokens, the entropy they were drawn with, and the one response slice."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax.types import LanguageModel, Params

Saved = tuple[Array, Array, Array, Array]


def token_log_probs(logits: Array, tokens: Array, *, temperature: float | Array = 1.0) -> Array:
    """log softmax(logits / temperature)[token].

    Args:
      logits: [..., V]; -inf marks tokens outside the vocabulary.
      tokens: [...] int.
      temperature: the logits are divided by it.

    Returns:
      [...] float32.

    Raises:
      AssertionError: `tokens` is not integer or does not match `logits` without its last axis.
    """
    return token_log_probs_and_entropy(logits, tokens, temperature=temperature)[0]


def entropy(logits: Array, *, temperature: float | Array = 1.0) -> Array:
    """H = -Σ_a p(a) log p(a) of p = softmax(logits / temperature), in nats.

    Args:
      logits: [..., V]; a token with -inf contributes 0.
      temperature: the logits are divided by it.

    Returns:
      [...] float32.
    """
    anything = jnp.zeros(logits.shape[:-1], jnp.int32)
    return token_log_probs_and_entropy(logits, anything, temperature=temperature)[1]


def token_log_probs_and_entropy(
    logits: Array, tokens: Array, *, temperature: float | Array = 1.0
) -> tuple[Array, Array]:
    """`token_log_probs` and `entropy` in one pass over the vocabulary, backwards too.

    Args:
      logits: [..., V]; -inf marks tokens outside the vocabulary.
      tokens: [...] int.
      temperature: the logits are divided by it.

    Returns:
      log-probabilities [...] and entropies [...], float32.

    Raises:
      AssertionError: `tokens` is not integer or does not match `logits` without its last axis.
    """
    chex.assert_shape(tokens, logits.shape[:-1])
    chex.assert_type(tokens, int)
    return _log_probs_and_entropy(logits.astype(jnp.float32) / temperature, tokens)


@jax.custom_vjp
def _log_probs_and_entropy(logits: Array, tokens: Array) -> tuple[Array, Array]:
    return _forward(logits, tokens)[0]


def _forward(logits: Array, tokens: Array) -> tuple[tuple[Array, Array], Saved]:
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    # Shifted by the maximum throughout: log Z - E[logits] would cancel at large logits.
    shifted = logits - top
    weights = jnp.exp(shifted)
    total = weights.sum(-1)
    log_total = jnp.log(total)
    chosen = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] - top[..., 0]
    expected = jnp.where(weights > 0, weights * shifted, 0.0).sum(-1) / total
    log_probs, entropies = chosen - log_total, log_total - expected
    return (log_probs, entropies), (logits, tokens, top[..., 0] + log_total, entropies)


def _backward(saved: Saved, cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    logits, tokens, log_z, entropies = saved
    d_log_probs, d_entropies = (c[..., None] for c in cotangents)
    log_p = logits - log_z[..., None]
    p = jnp.exp(log_p)
    chosen = jnp.arange(logits.shape[-1]) == tokens[..., None]
    of_entropy = jnp.where(p > 0, p * (log_p + entropies[..., None]), 0.0)
    return jnp.where(chosen, d_log_probs, 0.0) - d_log_probs * p - d_entropies * of_entropy, None


_log_probs_and_entropy.defvjp(_forward, _backward)


def response_inputs(tokens: Array, attention_mask: Array, num_tokens: int) -> dict[str, Any]:
    """The one response slice: what to feed a model so that it gives one state a response token.

    The state that emits the first response token is the last of the prompt's, and the last
    response token emits nothing: positions P - 1 … S - 2.

    Args:
      tokens: [B, S] prompts and responses.
      attention_mask: [B, S] bool.
      num_tokens: T.

    Returns:
      keyword arguments `tokens` [B, S - 1], `attention_mask` [B, S - 1] and `first` for
      `LanguageModel.hidden` or `ScalarModel.values`, which then return [B, T, …].
    """
    chex.assert_equal_shape([tokens, attention_mask])
    first = tokens.shape[1] - num_tokens - 1
    return {"tokens": tokens[:, :-1], "attention_mask": attention_mask[:, :-1], "first": first}


def response_log_probs(
    model: LanguageModel,
    params: Params,
    tokens: Array,
    attention_mask: Array,
    num_tokens: int,
    *,
    temperature: float | Array = 1.0,
) -> tuple[Array, Array]:
    """Log-probabilities and entropies of the last T tokens of each sequence under a model.

    Args:
      model: any language model.
      params: its parameters.
      tokens: [B, S] prompts and responses.
      attention_mask: [B, S] bool.
      num_tokens: T, static.
      temperature: the temperature of sampling.

    Returns:
      log-probabilities [B, T] and entropies [B, T], float32; arbitrary, but finite, at padding.
    """
    hidden = model.hidden(params, **response_inputs(tokens, attention_mask, num_tokens))
    responses = tokens[:, -num_tokens:]
    return token_log_probs_and_entropy(
        model.logits(params, hidden), responses, temperature=temperature
    )
