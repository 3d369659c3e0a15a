"""`rlhfjax export`."""

from __future__ import annotations

from rlhfjax import pretrained, sharding
from rlhfjax.cli.arguments import Export
from rlhfjax.cli.commands import training
from rlhfjax.models import lora
from rlhfjax.pretrained import peft


def run(args: Export) -> None:
    """Writes a model with its adapter merged."""
    mesh = sharding.mesh(data=args.data, fsdp=args.fsdp, tensor=args.tensor)
    source = training.load(args, mesh, param_dtype="float32")
    params = source.params
    if args.adapter is not None:
        adapters, scale = peft.load(args.adapter, source.architecture)
        params = lora.merge(params, adapters, scale=scale)
    pretrained.save(args.output_dir, source, params, dtype=args.dtype)
