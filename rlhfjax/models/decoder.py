"""One decoder-only transformer with switches, handed out as a `LanguageModel` of pure functions.

GPT-2 is the default (learned positions, LayerNorm, GELU, tied head); Llama-like models are
`rotary_base=10_000.0, rms_norm=True, gated_mlp=True, bias=False`; for those that others have
published `pretrained` finds the switches. Linen stays inside this file and `blocks`: parameters are
one dictionary per layer, never stacked, because slicing a stack costs whole-stack writes in the
backward pass and copies in the decode loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.models.blocks import Block, KeyValue, norm, project, rematerialised
from rlhfjax.models.config import DecoderConfig
from rlhfjax.types import LanguageModel, Params

Cache = dict[str, Any]


class _Decoder(nn.Module):
    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(c.vocab_size, c.width, dtype=c.dtype, embedding_init=init)
        if None in c.rotaries:
            self.position_embedding = nn.Embed(
                c.context_length, c.width, dtype=c.dtype, embedding_init=init
            )
        self.layers = [Block(c, rotary) for rotary in c.rotaries]
        self.norm = norm(c)
        if not c.tied_head:
            self.head = self.param("head", init, (c.width, c.vocab_size))

    def _embed(self, tokens: Array, positions: Array) -> Array:
        def look_up(embed: nn.Embed, ids: Array) -> Array:
            return jnp.take(sharding.table(embed.embedding).astype(self.config.dtype), ids, axis=0)

        x = look_up(self.embedding, tokens)
        if self.config.scaled_embedding:
            x = x * jnp.asarray(math.sqrt(self.config.width), x.dtype)
        if None not in self.config.rotaries:
            return x
        return x + look_up(self.position_embedding, positions)

    def _in_sight(self, mask: Array, positions: Array, key_positions: Array) -> list[Array]:
        """For each layer [B, T, S], the keys of the mask that are within its window."""
        if self.config.windows is None:
            return [mask] * self.config.num_layers
        distance = positions[:, :, None] - key_positions[:, None, :]
        near: dict[int | None, Array] = {None: mask}
        near |= {w: mask & (distance < w) for w in self.config.windows if w is not None}
        return [near[window] for window in self.config.windows]

    def _stack(
        self,
        tokens: Array,
        attention_mask: Array,
        *,
        first: int = 0,
        segment_ids: Array | None = None,
    ) -> tuple[Array, list[KeyValue]]:
        c = self.config
        if tokens.shape[1] > c.context_length:
            raise ValueError(
                f"sequences of {tokens.shape[1]} tokens are longer than the context of "
                f"{c.context_length}: shorten them or raise context_length"
            )
        causal = jnp.tri(tokens.shape[1], dtype=bool)
        mask = causal & attention_mask[:, None, :]
        if segment_ids is None:
            positions = masked.positions(attention_mask)
        else:
            mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
            positions = mask.sum(-1, dtype=jnp.int32) - attention_mask
        x = sharding.split_rows(self._embed(tokens, positions))
        masks = self._in_sight(mask, positions, positions)
        cache = []
        for number, (layer, seen) in enumerate(zip(self.layers, masks, strict=True)):
            start = first if number == len(self.layers) - 1 else 0
            if c.remat and not self.is_initializing():
                block, params = layer.clone(parent=None, name=None), layer.variables["params"]
                x, key_value = rematerialised(block, start, params, x, seen, positions)
            else:
                x, key_value = layer(x, seen, positions, first=start)
            x = sharding.split_rows(x)
            cache.append(key_value)
        return self.norm(x), cache

    def hidden(
        self,
        tokens: Array,
        attention_mask: Array,
        *,
        first: int = 0,
        segment_ids: Array | None = None,
    ) -> Array:
        return self._stack(tokens, attention_mask, first=first, segment_ids=segment_ids)[0]

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
        return self.extend(cache, tokens[:, None], jnp.ones((len(tokens), 1), bool))

    def extend(self, cache: Cache, tokens: Array, real: Array) -> tuple[Array, Cache]:
        index, length = cache["index"], tokens.shape[1]
        mask = jax.lax.dynamic_update_slice_in_dim(cache["mask"], real, index, axis=1)
        positions = cache["position"][:, None] + masked.positions(real)
        seen = mask[:, None]
        if length > 1:
            seen = seen & (jnp.arange(mask.shape[1]) <= index + jnp.arange(length)[:, None])
        x = self._embed(tokens, positions)
        masks = self._in_sight(seen, positions, masked.positions(mask))
        layers = []
        for number, (layer, near) in enumerate(zip(self.layers, masks, strict=True)):
            first = length - 1 if number == len(self.layers) - 1 else 0
            key_value = cache["layers"][number]
            x, key_value = layer(x, near, positions, first=first, cache=key_value, index=index)
            layers.append(key_value)
        return self.norm(x)[:, 0], {
            "layers": layers,
            "mask": mask,
            "position": cache["position"] + real.sum(1, dtype=jnp.int32),
            "index": index + length,
        }

    def logits(self, hidden: Array) -> Array:
        kernel = self.embedding.embedding.T if self.config.tied_head else self.head
        kernel = kernel.astype(self.config.dtype)
        if self.config.tied_head and hidden.ndim == 2:
            # For few rows XLA's CPU matmul is faster on the table as it lies, which it only sees
            # behind a barrier.
            logits = jax.lax.optimization_barrier(kernel.T @ hidden.T).T
        else:
            logits = project(hidden.reshape(-1, hidden.shape[-1]), kernel)
        if (cap := self.config.logit_cap) is not None:
            logits = cap * jnp.tanh(logits / cap)
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
        extend=bind(module.extend),
    )
