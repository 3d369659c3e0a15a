"""One decoder-only transformer with switches, handed out as a `LanguageModel` of pure functions.

GPT-2 is the default (learned positions, LayerNorm, GELU, tied head); Llama-like models are
`rotary_base=10_000.0, rms_norm=True, gated_mlp=True, bias=False`.  Linen stays inside this file:
parameters are one dictionary per layer, never stacked, because slicing a stack costs whole-stack
writes in the backward pass and copies in the decode loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from rlhfjax import masked, sharding
from rlhfjax.models.attention import attend, rotate
from rlhfjax.types import LanguageModel, Params

KeyValue = tuple[Array, Array]
Cache = dict[str, Any]


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
      remat: the backward pass keeps each block's input only and computes the rest of the block
        again: less memory for one more forward pass. Decoding is the same.
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
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        kv_heads = self.num_kv_heads or self.num_heads
        if self.width % self.num_heads or self.num_heads % kv_heads:
            raise ValueError(
                f"width {self.width} must divide into num_heads {self.num_heads}, "
                f"and num_heads into num_kv_heads {kv_heads}"
            )
        if self.rotary_base is not None and self.head_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs of numbers, but width {self.width} in "
                f"{self.num_heads} heads makes heads of {self.head_dim}: choose an even size"
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
    return nn.LayerNorm(
        epsilon=1e-5, dtype=config.dtype, use_bias=config.bias, use_fast_variance=False
    )


def _dense(config: DecoderConfig, features: int, scale: float = 1.0) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=config.bias,
        dtype=config.dtype,
        kernel_init=nn.initializers.normal(0.02 * scale),
        dot_general=lambda x, kernel, *_, **__: _project(x, kernel),
    )


@jax.custom_vjp
def _project(x: Array, kernel: Array) -> Array:
    return x @ kernel


def _project_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ kernel, (x, kernel)


def _project_backward(saved: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, kernel = saved

    def transposed_first(x: Array, d_out: Array) -> Array:
        # XLA's CPU matmul wants its operands untransposed; the copy costs less than the detour.
        return jax.lax.optimization_barrier(x.T + 0) @ d_out

    d_kernel = jax.lax.platform_dependent(
        x, d_out, cpu=transposed_first, default=lambda x, d_out: x.T @ d_out
    )
    return d_out @ kernel.T, d_kernel


_project.defvjp(_project_forward, _project_backward)


class _Block(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        residual_scale = 1 / math.sqrt(2 * c.num_layers)
        self.attention_norm = _norm(c)
        self.qkv = _dense(c, (c.num_heads + 2 * c.kv_heads) * c.head_dim)
        self.output = _dense(c, c.width, residual_scale)
        self.mlp_norm = _norm(c)
        inner = c.mlp_width or 4 * c.width
        if c.gated_mlp:
            self.gate = _dense(c, inner)
        self.up = _dense(c, inner)
        self.down = _dense(c, c.width, residual_scale)

    def __call__(
        self,
        x: Array,
        mask: Array,
        positions: Array,
        *,
        first: int = 0,
        cache: KeyValue | None = None,
        index: Array | int = 0,
    ) -> tuple[Array, KeyValue]:
        """Returns the block's output from position `first` on, and its keys and values."""
        c = self.config
        batch, length, width = x.shape
        # Projections of one [B·T, D] matrix are faster than of [B, T, D].
        projected = self.qkv(self.attention_norm(x).reshape(-1, width))
        heads = projected.reshape(batch, length, -1, c.head_dim)
        parts = jnp.split(heads, (c.num_heads, c.num_heads + c.kv_heads), axis=2)
        q, k, v = (part.swapaxes(1, 2) for part in parts)
        q = q[:, :, first:]
        if c.rotary_base is not None:
            q = rotate(q, positions[:, first:], c.rotary_base)
            k = rotate(k, positions, c.rotary_base)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, index, axis=2)
        x = x[:, first:]
        mixed = attend(q, k, v, mask[:, first:]).swapaxes(1, 2).reshape(-1, width)
        x = x.reshape(-1, width) + self.output(mixed)
        normed = self.mlp_norm(x)
        inner = (
            nn.silu(self.gate(normed)) * self.up(normed)
            if c.gated_mlp
            else nn.gelu(self.up(normed))
        )
        x = x + self.down(inner)
        return x.reshape(batch, -1, width), (k, v)


def _apply_block(
    config: DecoderConfig, first: int, params: Params, x: Array, mask: Array, positions: Array
) -> tuple[Array, KeyValue]:
    apply: Callable[..., Any] = _Block(config, parent=None).apply
    return apply({"params": params}, x, mask, positions, first=first)


# A block that keeps no more than its arguments for the backward pass.
_rematerialised = jax.custom_vjp(_apply_block, nondiff_argnums=(0, 1))


def _rematerialised_forward(
    config: DecoderConfig, first: int, *args: Any
) -> tuple[tuple[Array, KeyValue], tuple[Any, ...]]:
    return _apply_block(config, first, *args), args


def _rematerialised_backward(
    config: DecoderConfig, first: int, saved: tuple[Any, ...], d_out: tuple[Array, KeyValue]
) -> tuple[Params, Array, None, None]:
    params, x, mask, positions = saved

    def wait_on_cpu(x: Array, d_x: Array) -> Array:
        # XLA's CPU compiler drops barriers before it orders operations, but it cannot know that a
        # number either equals itself or does not.
        d_x = jnp.pad(d_x, ((0, 0), (first, 0), (0, 0)))
        return jnp.where((d_x == d_x) | (d_x != d_x), x, 0)

    # Nothing of the block is computed again before the gradient of its output is there.
    x = jax.lax.platform_dependent(
        x, d_out[0], cpu=wait_on_cpu, default=lambda *both: jax.lax.optimization_barrier(both)[0]
    )
    _, pull_back = jax.vjp(
        lambda params, x: _apply_block(config, first, params, x, mask, positions), params, x
    )
    return *pull_back(d_out), None, None


_rematerialised.defvjp(_rematerialised_forward, _rematerialised_backward)


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
            self.head = self.param("head", init, (c.width, c.vocab_size))

    def _embed(self, tokens: Array, positions: Array) -> Array:
        def look_up(embed: nn.Embed, ids: Array) -> Array:
            return jnp.take(sharding.table(embed.embedding).astype(self.config.dtype), ids, axis=0)

        x = look_up(self.embedding, tokens)
        if self.config.rotary_base is not None:
            return x
        return x + look_up(self.position_embedding, positions)

    def _stack(
        self, tokens: Array, attention_mask: Array, *, first: int = 0
    ) -> tuple[Array, list[KeyValue]]:
        c = self.config
        if tokens.shape[1] > c.context_length:
            raise ValueError(
                f"sequences of {tokens.shape[1]} tokens are longer than the context of "
                f"{c.context_length}: shorten them or raise context_length"
            )
        positions = masked.positions(attention_mask)
        x = sharding.split_rows(self._embed(tokens, positions))
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        mask = causal & attention_mask[:, None, :]
        cache = []
        for number, layer in enumerate(self.layers):
            start = first if number == len(self.layers) - 1 else 0
            if c.remat and not self.is_initializing():
                params = layer.variables["params"]
                x, key_value = _rematerialised(c, start, params, x, mask, positions)
            else:
                x, key_value = layer(x, mask, positions, first=start)
            x = sharding.split_rows(x)
            cache.append(key_value)
        return self.norm(x), cache

    def hidden(self, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        return self._stack(tokens, attention_mask, first=first)[0]

    def prefill(self, tokens: Array, attention_mask: Array, *, length: int) -> tuple[Array, Cache]:
        prompt = tokens.shape[1]
        x, cache = self._stack(tokens, attention_mask, first=prompt - 1)
        room = ((0, 0), (0, 0), (0, length - prompt), (0, 0))
        return x[:, 0], {
            "layers": jax.tree.map(lambda a: jnp.pad(a, room), cache),
            "mask": jnp.pad(attention_mask, ((0, 0), (0, length - prompt))),
            "position": attention_mask.sum(1, dtype=jnp.int32),
            "index": jnp.int32(prompt),
        }

    def decode(self, cache: Cache, tokens: Array) -> tuple[Array, Cache]:
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

    def logits(self, hidden: Array) -> Array:
        kernel = self.embedding.embedding.T if self.config.tied_head else self.head
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = _project(flat, kernel.astype(self.config.dtype))
        return logits.reshape(*hidden.shape[:-1], -1)

    def everything(self, tokens: Array, attention_mask: Array) -> Array:
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

    def bind(method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, *args, **kw: module.apply(
            {"params": params}, *args, method=method, **kw
        )

    return LanguageModel(
        init=init,
        hidden=bind(module.hidden),
        prefill=bind(module.prefill),
        decode=bind(module.decode),
        logits=bind(module.logits),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
    )
