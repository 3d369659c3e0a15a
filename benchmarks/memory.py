"""What PPO keeps on each device, for models of 1, 8 and 70 billion parameters.

    python benchmarks/memory.py --model 8b --fsdp 16 --batch 64 --prompt 512 --response 512

prints a Markdown table in GB (10⁹ bytes). Parameters, moments and gradients are counted array by
array, from the shapes of the state and `sharding.shardings` on a mesh of as many virtual devices;
nothing of it is allocated. The rest follows the formulas beside it. Policy, value, reference and
reward model are Llama's architecture, compute is bfloat16, the optimiser AdamW; reference and
reward are kept in bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro

from rlhfjax import models, sharding
from rlhfjax.algorithms import ppo

VOCAB, KV_HEADS = 128_256, 8
SHAPES = {  # of the public models: layers, width, heads, inner width of the MLP, tied head
    "1b": (16, 2048, 32, 8192, True),
    "8b": (32, 4096, 32, 14_336, False),
    "70b": (80, 8192, 64, 28_672, False),
}


@dataclass(frozen=True)
class Args:
    """What PPO keeps on each device."""

    model: Literal["1b", "8b", "70b"] = "8b"
    """Shape of all four models: those of Llama 3."""
    data: int = 1
    """Copies of the parameters, each with rows of its own."""
    fsdp: int = 16
    """Devices that share parameters and optimiser state, each with rows of its own."""
    tensor: int = 1
    """Devices that share each matrix and work on the same rows."""
    batch: int = 64
    """Prompts in an iteration."""
    prompt: int = 512
    """Tokens of a prompt."""
    response: int = 512
    """Tokens of a response."""
    micro_rows: int = 1
    """Rows of a micro-batch on each device."""


def size(tree: Any, mesh: jax.sharding.Mesh, dtype: Any = None) -> int:
    """Bytes of the arrays on one device, or those that they would have as another dtype."""
    places = sharding.shardings(tree, mesh)

    def of_array(x: jax.ShapeDtypeStruct, place: jax.sharding.NamedSharding) -> int:
        itemsize = 8 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        count = math.prod(place.shard_shape(x.shape))
        return count * (jnp.dtype(dtype).itemsize if dtype else itemsize)

    return sum(jax.tree.leaves(jax.tree.map(of_array, tree, places)))


def main(args: Args) -> dict[str, tuple[str, int]]:
    """What is kept, its formula and its bytes on one device."""
    devices = args.data * args.fsdp * args.tensor
    rows, left = divmod(args.batch, args.data * args.fsdp)
    if left:
        raise SystemExit(f"--batch {args.batch} does not divide over data × fsdp devices")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    num_layers, width, num_heads, mlp_width, tied_head = SHAPES[args.model]
    length = args.prompt + args.response
    model = models.decoder(
        models.DecoderConfig(
            vocab_size=VOCAB,
            context_length=length,
            width=width,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=KV_HEADS,
            mlp_width=mlp_width,
            rotary_base=500_000.0,
            rms_norm=True,
            gated_mlp=True,
            bias=False,
            tied_head=tied_head,
            dtype=jnp.bfloat16,
            remat=True,
        )
    )
    scalar = models.scalar_model(model, models.linear_head(width, stddev=0.0))
    actor_critic = models.separate_trunks(model, scalar)
    state = jax.eval_shape(
        lambda key: ppo.init(actor_critic.init(key), optax.adamw(1e-6), key, kl_coef=0.1),
        jax.random.key(0),
    )
    mesh = sharding.mesh(data=args.data, fsdp=args.fsdp, tensor=args.tensor)
    policy_only = sharding.mesh(data=args.data * args.fsdp, tensor=args.tensor)
    part = math.gcd(KV_HEADS, args.tensor)

    logits = args.response * VOCAB * 4 // args.tensor
    return {
        "parameters and moments": ("(4 + 8) · 2N / (f·t)", size(state, mesh)),
        "reference and reward": ("2 · 2N / (f·t)", size(state.params, mesh, jnp.bfloat16)),
        "decoding: the policy, gathered": (
            "2 · N / t",
            size(state.params["policy"], policy_only, jnp.bfloat16),
        ),
        "decoding: its embedding, in float32": ("4 · V · D / t", 4 * VOCAB * width // args.tensor),
        "decoding: keys and values": (
            "2 · 2 · rows · S · L · K·d / t",
            4 * rows * length * num_layers * KV_HEADS * (width // num_heads) // part,
        ),
        "update: gradients, and those of a part": (
            "(4 + 4) · 2N / (f·t)",
            2 * size(state.params, mesh),
        ),
        "update: whole embeddings, their gradients": (
            "4 · 4 · V · D / t",
            16 * VOCAB * width // args.tensor,
        ),
        "update: logits and their gradient": ("8 · m · T · V / t", 2 * args.micro_rows * logits),
        "update: inputs of blocks": (
            "2 · 2 · m · S · L · D",
            4 * args.micro_rows * length * num_layers * width,
        ),
        "update: inside of a block": (
            "m · (6 · H·S² + 6 · S·M) / t",
            args.micro_rows * length * (6 * num_heads * length + 6 * mlp_width) // args.tensor,
        ),
    }


def table(parts: dict[str, tuple[str, int]]) -> str:
    """The parts in Markdown, and the most of them that there are at one time."""
    lines = ["| what | formula | GB |", "|---|---|---|"]
    lines += [
        f"| {name} | {formula} | {bytes_ / 1e9:.2f} |" for name, (formula, bytes_) in parts.items()
    ]
    phases: dict[str, int] = {}
    for name, (_, bytes_) in parts.items():
        phase = name.partition(":")[0] if ":" in name else "always"
        phases[phase] = phases.get(phase, 0) + bytes_
    always = phases.pop("always")
    lines += [
        f"| **{phase}** | | **{(always + bytes_) / 1e9:.1f}** |" for phase, bytes_ in phases.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(main(tyro.cli(Args))))
