"""Attention in `[B, H, T, d]`, with rotary positions and grouped queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

Saved = tuple[Array, Array, Array, Array]


@dataclass(frozen=True)
class Rotary:
    """How the positions of a layer turn its queries and keys.

    Attributes:
      base: of the wavelengths.
      size: how many leading numbers of a head turn, an even number; None for all.
      rescale: `(frequencies) -> frequencies`, `Stretched` or `Llama3`; None leaves them.
    """

    base: float
    size: int | None = None
    rescale: Callable[[Array], Array] | None = None


@dataclass(frozen=True)
class Stretched:
    """f / factor: positions as if the text were that much shorter.

    References:
      Chen et al. 2023, Extending Context Window of Large Language Models via Positional
      Interpolation.
    """

    factor: float

    def __call__(self, frequency: Array) -> Array:
        """The new frequencies."""
        return frequency / self.factor


@dataclass(frozen=True)
class Llama3:
    """f·(s + (1 - s) / factor), where s goes from 0 to 1 as a turn gets short beside the text.

    s = (n - low) / (high - low) within [0, 1], and n = f·length / 2π turns in the original length.

    References:
      Grattafiori et al. 2024, The Llama 3 Herd of Models; the formula is that of its release 3.1.
    """

    factor: float
    low: float
    high: float
    length: int

    def __call__(self, frequency: Array) -> Array:
        """The new frequencies."""
        turns = frequency * self.length / (2 * math.pi)
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return frequency * (kept + (1 - kept) / self.factor)


def rotate(x: Array, positions: Array, rotary: Rotary) -> Array:
    """Rotary position embedding: turns the pair (xᵢ, xᵢ₊n/2) by the angle p·base^(-2i/n).

    Args:
      x: [B, H, T, d] queries or keys, of whose d numbers the first n turn.
      positions: [B, T] int, p.
      rotary: base, n, and what becomes of the frequencies base^(-2i/n).

    Returns:
      [B, H, T, d]

    References:
      Su et al. 2021, RoFormer; the pairing of halves as in Llama's public checkpoints.
    """
    half = (rotary.size or x.shape[-1]) // 2
    frequency = rotary.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rotary.rescale is not None:
        frequency = rotary.rescale(frequency)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = (part.astype(jnp.float32) for part in (x[..., :half], x[..., half : 2 * half]))
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
    rest = x[..., 2 * half :]
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array,
    *,
    divisor: float | None = None,
    cap: float | None = None,
) -> Array:
    """softmax(q·kᵀ/√d)·v over the keys that the mask allows.

    In `[B, H, T, d]`, the fastest layout on CPU, and with a backward pass of its own: it keeps
    the weights and nothing else of their size, which takes half the time of the derived one.

    Args:
      query: [B, H, T, d].
      key: [B, K, S, d], K dividing H (grouped-query attention).
      value: [B, K, S, d].
      mask: [B, T, S] bool, True where the query may look. A query that may look nowhere, one at
        padding, looks everywhere: never NaN.
      divisor: in place of √d.
      cap: c of c·tanh(x/c), through which the scores go before the softmax; None: they do not.

    Returns:
      [B, H, T, d]

    References:
      Gemma Team 2024, Gemma 2, for the cap.
    """
    batch, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    divided = query / (math.sqrt(dim) if divisor is None else divisor)
    grouped = divided.reshape(batch, -1, groups * length, dim)
    blocked = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    blocked = jnp.tile(blocked, (1, groups, 1))[:, None]
    return _attend(cap, grouped, key, value, blocked).reshape(query.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(cap: float | None, query: Array, key: Array, value: Array, blocked: Array) -> Array:
    return _attend_forward(cap, query, key, value, blocked)[0]


def _attend_forward(
    cap: float | None, query: Array, key: Array, value: Array, blocked: Array
) -> tuple[Array, Saved]:
    scores = _scores(query, key)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    weights = jax.nn.softmax(scores + blocked).astype(value.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value), (query, key, value, weights)


def _attend_backward(
    cap: float | None, saved: Saved, d_mixed: Array
) -> tuple[Array, Array, Array, None]:
    query, key, value, weights = saved
    d_value = jnp.einsum("bhqk,bhqd->bhkd", weights, d_mixed)
    d_weights = jnp.einsum("bhqd,bhkd->bhqk", d_mixed, value)
    d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdims=True))
    if cap is not None:
        slope = 1 - jnp.square(jnp.tanh(_scores(query, key) / cap))
        d_scores = (d_scores * slope).astype(d_scores.dtype)
    d_query = jnp.einsum("bhqk,bhkd->bhqd", d_scores, key)
    d_key = jnp.einsum("bhqk,bhqd->bhkd", d_scores, query)
    return d_query, d_key, d_value, None


def _scores(query: Array, key: Array) -> Array:
    return jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32)


_attend.defvjp(_attend_forward, _attend_backward)
