"""The layers of the decoder: norms, projections, blocks, and blocks that are computed again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from rlhfjax.models.attention import Rotary, attend, rotate
from rlhfjax.models.config import DecoderConfig
from rlhfjax.types import Params

KeyValue = tuple[Array, Array]


class _NormFromOne(nn.Module):
    """x / rms(x) · (1 + scale)."""

    epsilon: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:])
        normed = nn.RMSNorm(self.epsilon, dtype=jnp.float32, use_scale=False)(x)
        return (normed * (1 + scale)).astype(self.dtype)


def _rms_norm(config: DecoderConfig) -> nn.Module:
    norm = _NormFromOne if config.norm_from_one else nn.RMSNorm
    return norm(epsilon=config.norm_eps or 1e-6, dtype=config.dtype)


def norm(config: DecoderConfig) -> nn.Module:
    """The norm that the configuration asks for."""
    if config.rms_norm:
        return _rms_norm(config)
    return nn.LayerNorm(
        epsilon=config.norm_eps or 1e-5,
        dtype=config.dtype,
        use_bias=config.bias,
        use_fast_variance=False,
    )


class _Dense(nn.Dense):
    """x·kernel + bias, and (x·lora_a)·lora_b where the parameters hold these, see `models.lora`."""

    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        if not self.has_variable("params", "lora_a"):
            return y
        for name in ("lora_a", "lora_b"):
            x = project(x, self.get_variable("params", name).astype(self.dtype))
        return y + x


def _dense(
    config: DecoderConfig, features: int, scale: float = 1.0, bias: bool | None = None
) -> nn.Dense:
    return _Dense(
        features,
        use_bias=config.bias if bias is None else bias,
        dtype=config.dtype,
        kernel_init=nn.initializers.normal(0.02 * scale),
        dot_general=lambda x, kernel, *_, **__: project(x, kernel),
    )


@jax.custom_vjp
def project(x: Array, kernel: Array) -> Array:
    """x·kernel, whose backward pass suits the machine."""
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


project.defvjp(_project_forward, _project_backward)


class Block(nn.Module):
    """Attention and MLP, each added to the state that it reads, or both to the same one."""

    config: DecoderConfig
    rotary: Rotary | None

    def setup(self) -> None:
        """Makes the layers."""
        c = self.config
        residual_scale = 1 / math.sqrt(2 * c.num_layers)
        self.attention_norm = norm(c)
        self.qkv = _dense(c, (c.num_heads + 2 * c.kv_heads) * c.head_dim, bias=c.qkv_bias)
        if c.qk_norm:
            self.query_norm, self.key_norm = _rms_norm(c), _rms_norm(c)
        self.output = _dense(c, c.width, residual_scale, c.output_bias)
        self.mlp_norm = norm(c)
        inner = c.mlp_width or 4 * c.width
        if c.gated_mlp:
            self.gate = _dense(c, inner)
        self.up = _dense(c, inner)
        self.down = _dense(c, c.width, residual_scale)
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(c), norm(c)

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
        if c.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rotary is not None:
            q = rotate(q, positions[:, first:], self.rotary)
            k = rotate(k, positions, self.rotary)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, index, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, index, axis=2)
        x = x[:, first:]
        mixed = attend(q, k, v, mask[:, first:], divisor=c.query_divisor, cap=c.attention_cap)
        mixed = mixed.swapaxes(1, 2).reshape(-1, c.num_heads * c.head_dim)
        x = x.reshape(-1, width)
        if c.parallel:
            x = x + self._attended(mixed) + self._mlp(x)
        else:
            x = x + self._attended(mixed)
            x = x + self._mlp(x)
        return x.reshape(batch, -1, width), (k, v)

    def _attended(self, mixed: Array) -> Array:
        out = self.output(mixed)
        return self.attention_post_norm(out) if self.config.post_norms else out

    def _mlp(self, x: Array) -> Array:
        c = self.config
        activation = c.activation or (nn.silu if c.gated_mlp else nn.gelu)
        normed = self.mlp_norm(x)
        if c.gated_mlp:
            inner = activation(self.gate(normed)) * self.up(normed)
        else:
            inner = activation(self.up(normed))
        out = self.down(inner)
        return self.mlp_post_norm(out) if c.post_norms else out


def _apply(
    block: Block, first: int, params: Params, x: Array, mask: Array, positions: Array
) -> tuple[Array, KeyValue]:
    apply: Callable[..., Any] = block.apply
    return apply({"params": params}, x, mask, positions, first=first)


# `rematerialised(block, first, params, x, mask, positions)`: a block, without a parent, that keeps
# no more than its arguments for the backward pass.
rematerialised = jax.custom_vjp(_apply, nondiff_argnums=(0, 1))


def _rematerialised_forward(
    block: Block, first: int, *args: Any
) -> tuple[tuple[Array, KeyValue], tuple[Any, ...]]:
    return _apply(block, first, *args), args


def _rematerialised_backward(
    block: Block, first: int, saved: tuple[Any, ...], d_out: tuple[Array, KeyValue]
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
        lambda params, x: _apply(block, first, params, x, mask, positions), params, x
    )
    return *pull_back(d_out), None, None


rematerialised.defvjp(_rematerialised_forward, _rematerialised_backward)
