"""Shape and switches of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from rlhfjax.models.attention import Rotary


@dataclass(frozen=True)
class DecoderConfig:
    """Shape and switches of a decoder; everything here is static.

    Attributes:
      vocab_size: V, number of token ids.
      context_length: longest sequence, prompt and response together.
      width: D, size of the hidden states.
      num_layers: number of blocks.
      num_heads: query heads; `width` must be divisible by it unless `head_width` is given.
      num_kv_heads: key and value heads (grouped-query attention); None means `num_heads`.
      head_width: size of a head; None means width / num_heads.
      mlp_width: inner size of the MLP; None means 4·width.
      rotary_base: base of the rotary embedding of all layers; None means learned positions.
      rotary: for each layer its `Rotary`, where `rotary_base` does not say enough.
      windows: for each layer how many tokens one can see, itself included; None sees all. None
        for all layers.
      query_divisor: what q·k is divided by; None means the root of a head's size.
      attention_cap: c of c·tanh(x/c) on q·k; None leaves it.
      logit_cap: c of c·tanh(x/c) on the logits; None leaves them.
      scaled_embedding: the embeddings of tokens are multiplied by √D.
      parallel: attention and MLP read the same state, x + attention(x) + MLP(x).
      rms_norm: RMSNorm in place of LayerNorm.
      norm_eps: under the root of a norm; None means 1e-6 for RMSNorm, 1e-5 for LayerNorm.
      norm_from_one: an RMSNorm multiplies by 1 + its parameter.
      qk_norm: an RMSNorm of each head's query and key.
      post_norms: norms also of what attention and MLP add to the state.
      gated_mlp: SiLU-gated MLP in place of GELU.
      activation: of the MLP, in place of SiLU or GELU.
      bias: biases in projections (and in LayerNorm).
      qkv_bias: biases of queries, keys and values; None means `bias`.
      output_bias: bias of the projection behind attention; None means `bias`.
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
    head_width: int | None = None
    mlp_width: int | None = None
    rotary_base: float | None = None
    rotary: tuple[Rotary, ...] | None = None
    windows: tuple[int | None, ...] | None = None
    query_divisor: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    scaled_embedding: bool = False
    parallel: bool = False
    rms_norm: bool = False
    norm_eps: float | None = None
    norm_from_one: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    gated_mlp: bool = False
    activation: Callable[[Array], Array] | None = None
    bias: bool = True
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    tied_head: bool = True
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        kv_heads = self.num_kv_heads or self.num_heads
        undivided = self.head_width is None and self.width % self.num_heads
        if undivided or self.num_heads % kv_heads:
            raise ValueError(
                f"width {self.width} must divide into num_heads {self.num_heads}, "
                f"and num_heads into num_kv_heads {kv_heads}"
            )
        if self.rotary_base is not None and self.rotary is not None:
            raise ValueError(
                "rotary_base is for layers that are alike, rotary for others: give one"
            )
        for name, of_layers in (("rotary", self.rotary), ("windows", self.windows)):
            if of_layers is not None and len(of_layers) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(of_layers)} entries for {self.num_layers} layers"
                )
        for rotary in self.rotaries:
            if rotary is not None and (rotary.size or self.head_dim) % 2:
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
        return self.head_width or self.width // self.num_heads

    @property
    def rotaries(self) -> tuple[Rotary | None, ...]:
        """For each layer how its positions turn; None where positions are learned."""
        if self.rotary is not None:
            return self.rotary
        alike = None if self.rotary_base is None else Rotary(self.rotary_base)
        return (alike,) * self.num_layers
