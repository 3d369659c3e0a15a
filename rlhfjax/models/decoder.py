"""One decoder-only transformer with switches, handed out as a `LanguageModel` of pure functions.

GPT-2 is the default (learned positions, LayerNorm, GELU, tied head); Llama-like models are
`rotary_base=10_000.0, rms_norm=True, gated_mlp=True, bias=False`.  Linen stays inside this file:
parameters are one dictionary per layer, never stacked, because slicing a stack costs whole-stack
writes in the backward pass and copies in the decode loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.types import LanguageModel, Params


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of a decoder; everything here is static.

    Attributes:
        vocab_size: V, number of token ids.
        context_length: longest sequence, prompt and response together.
        width: D, size of the hidden states.
        num_layers: number of blocks.
        num_heads: query heads; `width` must be divisible by it.
        num_kv_heads: key and value heads (grouped-query attention); None means `num_heads`.
        mlp_width: inner size of the MLP; None means 4·width.
        rotary_base: base of the rotary embedding; None means learned positions.
        rms_norm: RMSNorm in place of LayerNorm.
        gated_mlp: SiLU-gated MLP in place of GELU.
        bias: biases in projections (and in LayerNorm).
        tied_head: the LM head is the transposed embedding.
        dtype: compute dtype; parameters are float32.
    """

    vocab_size: int
    context_length: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int | None = None
    mlp_width: int | None = None
    rotary_base: float | None = None
    rms_norm: bool = False
    gated_mlp: bool = False
    bias: bool = True
    tied_head: bool = True
    dtype: jnp.dtype = jnp.float32  # type: ignore[assignment]

    def __post_init__(self) -> None:
        kv_heads = self.num_kv_heads or self.num_heads
        if self.width % self.num_heads or self.num_heads % kv_heads:
            raise ValueError(
                f"width {self.width} must divide into num_heads {self.num_heads}, "
                f"and num_heads into num_kv_heads {kv_heads}"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.num_heads


def _norm(config: DecoderConfig) -> nn.Module:
    if config.rms_norm:
        return nn.RMSNorm(epsilon=1e-6, dtype=config.dtype)
    return nn.LayerNorm(epsilon=1e-5, dtype=config.dtype, use_bias=config.bias, use_fast_variance=False)


def _dense(config: DecoderConfig, features: int, scale: float = 1.0) -> nn.Dense:
    init = nn.initializers.normal(0.02 * scale)
    return nn.Dense(features, use_bias=config.bias, dtype=config.dtype, kernel_init=init)


def _rotate(x: Array, positions: Array, base: float) -> Array:
    """Rotary embedding (Su et al. 2021) of `x` [B, H, T, d] at `positions` [B, T]."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, None, :, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """softmax(q·kᵀ/√d + mask)·v in `[B, H, T, d]`, the fastest layout on CPU.

    Args:
        query: [B, H, T, d].
        key: [B, K, S, d], K dividing H.
        value: [B, K, S, d].
        mask: [B, T, S] bool, True where the query may look.

    Returns:
        [B, H, T, d]
    """
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, heads // kv_heads * length, dim)
    weights = jnp.einsum("bkqd,bksd->bkqs", grouped, key, preferred_element_type=jnp.float32)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads, length, -1) / math.sqrt(dim)
    # A row that may look nowhere (a query at padding) becomes uniform, never NaN.
    weights = jnp.where(mask[:, None, None], weights, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(weights).astype(value.dtype)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * length, -1)
    return jnp.einsum("bkqs,bksd->bkqd", weights, value).reshape(batch, heads, length, dim)


class _Block(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        residual_scale = 1 / math.sqrt(2 * c.num_layers)
        self.attention_norm = _norm(c)
        self.query = _dense(c, c.num_heads * c.head_dim)
        self.key = _dense(c, c.kv_heads * c.head_dim)
        self.value = _dense(c, c.kv_heads * c.head_dim)
        self.output = _dense(c, c.width, residual_scale)
        self.mlp_norm = _norm(c)
        inner = c.mlp_width or 4 * c.width
        if c.gated_mlp:
            self.gate = _dense(c, inner)
        self.up = _dense(c, inner)
        self.down = _dense(c, c.width, residual_scale)

    def _heads(self, dense: nn.Dense, x: Array) -> Array:
        """Projects `x` [B, T, D] as one [B·T, D] matrix, which is faster, to [B, H, T, d]."""
        batch, length, width = x.shape
        flat = dense(x.reshape(-1, width))
        return flat.reshape(batch, length, -1, self.config.head_dim).swapaxes(1, 2)

    def __call__(self, x, mask, positions, *, first=0, cache=None, index=None):
        """Returns the block's output from position `first` on, and its keys and values."""
        c = self.config
        normed = self.attention_norm(x)
        q = self._heads(self.query, normed[:, first:])
        k, v = self._heads(self.key, normed), self._heads(self.value, normed)
        if c.rotary_base is not None:
            q = _rotate(q, positions[:, first:], c.rotary_base)
            k = _rotate(k, positions, c.rotary_base)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, index, axis=2)
        x = x[:, first:]
        mixed = attend(q, k, v, mask[:, first:]).swapaxes(1, 2).reshape(-1, c.width)
        x = x.reshape(-1, c.width) + self.output(mixed)
        normed = self.mlp_norm(x)
        inner = nn.silu(self.gate(normed)) * self.up(normed) if c.gated_mlp else nn.gelu(self.up(normed))
        x = x + self.down(inner)
        return x.reshape(mask.shape[0], -1, c.width), (k, v)


class _Decoder(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, embedding_init=init)
        if c.rotary_base is None:
            self.position_embedding = nn.Embed(
                c.context_length, c.width, dtype=c.dtype, embedding_init=init
            )
        self.layers = [_Block(c) for _ in range(c.num_layers)]
        self.norm = _norm(c)
        if not c.tied_head:
            self.head = nn.Dense(c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=init)

    def _embed(self, tokens: Array, positions: Array) -> Array:
        x = self.embedding(tokens)
        return x if self.config.rotary_base is not None else x + self.position_embedding(positions)

    def _stack(self, tokens, attention_mask, *, first=0):
        positions = masked.positions(attention_mask)
        x = self._embed(tokens, positions)
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        mask = causal & attention_mask[:, None, :]
        cache = []
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            x, key_value = layer(x, mask, positions, first=first if last else 0)
            cache.append(key_value)
        return self.norm(x), cache

    def hidden(self, tokens, attention_mask, *, first=0):
        return self._stack(tokens, attention_mask, first=first)[0]

    def prefill(self, tokens, attention_mask, *, length):
        prompt = tokens.shape[1]
        x, cache = self._stack(tokens, attention_mask, first=prompt - 1)
        room = ((0, 0), (0, 0), (0, length - prompt), (0, 0))
        return x[:, 0], {
            "layers": jax.tree.map(lambda a: jnp.pad(a, room), cache),
            "mask": jnp.pad(attention_mask, ((0, 0), (0, length - prompt))),
            "position": attention_mask.sum(1, dtype=jnp.int32),
            "index": jnp.int32(prompt),
        }

    def decode(self, cache, tokens):
        index, positions = cache["index"], cache["position"][:, None]
        mask = jax.lax.dynamic_update_slice_in_dim(
            cache["mask"], jnp.ones_like(cache["mask"][:, :1]), index, axis=1
        )
        x = self._embed(tokens[:, None], positions)
        layers = []
        for layer, key_value in zip(self.layers, cache["layers"], strict=True):
            x, key_value = layer(x, mask[:, None], positions, cache=key_value, index=index)
            layers.append(key_value)
        return self.norm(x)[:, 0], {
            "layers": layers,
            "mask": mask,
            "position": cache["position"] + 1,
            "index": index + 1,
        }

    def logits(self, hidden):
        return self.embedding.attend(hidden) if self.config.tied_head else self.head(hidden)

    def everything(self, tokens, attention_mask):
        return self.logits(self.hidden(tokens, attention_mask))


def decoder(config: DecoderConfig) -> LanguageModel:
    """A decoder-only transformer as functions.

    Args:
        config: shape and switches.

    Returns:
        a `LanguageModel`; its parameters are a nested dictionary of float32 arrays.
    """
    module = _Decoder(config)

    def init(key: Array) -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        everything = partial(module.init, method=module.everything)
        return everything(key, tokens, tokens == 0)["params"]

    def bind(method):
        return lambda params, *args, **kw: module.apply({"params": params}, *args, method=method, **kw)

    return LanguageModel(
        init=init,
        hidden=bind(module.hidden),
        prefill=bind(module.prefill),
        decode=bind(module.decode),
        logits=bind(module.logits),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )
