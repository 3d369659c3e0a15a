"""Digits, one after the other, that should add up to a target.

The policy is a network over an observation: how many digits there are, their sum, the target. Told
as a `LanguageModel` (the prompt is the target, a token is a digit, the cache is the observation) it
is trained by the algorithms as they are: nothing in them is about text.
"""

from __future__ import annotations

from typing import Protocol

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax.tasks import tabular
from rlhfjax.types import LanguageModel, Params, ScalarModel

NUM_DIGITS = 10


class Network(Protocol):
    """A function of observations; a Flax module is one."""

    def init(self, key: Array, observations: Array, /) -> Params:
        """Parameters for observations of this shape."""

    def apply(self, params: Params, observations: Array, /) -> Array:
        """[..., D] to [..., N]."""


def reward(digits: Array, target: Array) -> Array:
    """1 / (1 + |Σ digits - target|).

    Args:
      digits: [..., T] int.
      target: [...] int.

    Returns:
      [...] float32, 1 where the sum is the target.

    Raises:
      AssertionError: shapes or dtypes are off.
    """
    chex.assert_type([digits, target], int)
    chex.assert_shape(target, digits.shape[:-1])
    return 1.0 / (1.0 + jnp.abs(digits.sum(-1) - target).astype(jnp.float32))


def enumerate_task(*, target: int = 15, length: int = 3) -> tabular.Task:
    """All 10^T responses with their rewards, so that `tabular` tells any policy's exact reward.

    Args:
      target: the sum.
      length: T.

    Returns:
      a `tabular.Task` with one prompt, the target.
    """
    every = jnp.indices((NUM_DIGITS,) * length, dtype=jnp.int32).reshape(length, -1).T
    rewards = reward(every, jnp.full(len(every), target))
    return tabular.Task(jnp.full((1, 1), target, jnp.int32), every, rewards[None])


def observe(position: Array, total: Array, target: Array, *, length: int) -> Array:
    """What a network sees before it gives a digit.

    Args:
      position: [...] int, how many digits there are.
      total: [...] int, their sum.
      target: [...] int, what it should become.
      length: T, how many digits there will be.

    Returns:
      [..., T + 2] float32: the position as one of T, then sum and target in units of the largest
      sum.
    """
    largest = length * (NUM_DIGITS - 1)
    sums = jnp.stack([total, target], axis=-1) / largest
    return jnp.concatenate([jax.nn.one_hot(position, length), sums], axis=-1)


def policy(network: Network, *, length: int = 3) -> LanguageModel:
    """A network over observations as a language model of ten tokens.

    Args:
      network: from observations [..., T + 2] to logits [..., 10].
      length: T.

    Returns:
      a `LanguageModel` for prompts of one token, the target; its hidden states are logits. Of its
      vocabulary, all sums up to the largest, it has logits for the digits only.
    """

    def init(key: Array) -> Params:
        return network.init(key, jnp.zeros(length + 2))

    def hidden(params: Params, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        return network.apply(params, _observations(tokens, length)[:, first:])

    def read(params: Params, cache: tuple[Array, Array, Array]) -> Array:
        return network.apply(params, observe(*cache, length=length))

    def prefill(
        params: Params, prompts: Array, mask: Array, *, length: int
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        target = prompts[:, 0]
        cache = jnp.zeros_like(target), jnp.zeros_like(target), target
        return read(params, cache), cache

    def decode(
        params: Params, cache: tuple[Array, Array, Array], tokens: Array
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        position, total, target = cache
        cache = position + 1, total + tokens, target
        return read(params, cache), cache

    def logits(params: Params, hidden: Array) -> Array:
        return hidden

    return LanguageModel(
        init, hidden, prefill, decode, logits, _vocab_size(length), context_length=length + 1
    )


def value(network: Network, *, length: int = 3) -> ScalarModel:
    """A network over observations as a value function.

    Args:
      network: from observations [..., T + 2] to [..., 1].
      length: T.

    Returns:
      a `ScalarModel` over the tokens of `policy`.
    """

    def init(key: Array) -> Params:
        return network.init(key, jnp.zeros(length + 2))

    def values(params: Params, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        return network.apply(params, _observations(tokens, length)[:, first:])[..., 0]

    return ScalarModel(init, values, _vocab_size(length), context_length=length + 1)


def _vocab_size(length: int) -> int:
    """Of all that may be a token: a prompt is a target, and that goes up to the largest sum."""
    return max(NUM_DIGITS, length * (NUM_DIGITS - 1) + 1)


def _observations(tokens: Array, length: int) -> Array:
    """[B, S, T + 2], the observation after each token of [B, S]."""
    target, digits = tokens[:, :1], tokens.at[:, 0].set(0)
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    total = jnp.cumsum(digits, axis=1)
    return observe(position, total, jnp.broadcast_to(target, tokens.shape), length=length)
