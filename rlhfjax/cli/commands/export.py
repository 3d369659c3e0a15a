"""`rlhfjax export`."""

from __future__ import annotations

from typing import Any

from rlhfjax import pretrained, sharding
from rlhfjax.cli.arguments import Export
from rlhfjax.cli.commands import training


def run(args: Export) -> None:
    """Writes a language model or a reward model, with its adapter merged."""
    mesh = sharding.mesh(data=args.data, fsdp=args.fsdp, tensor=args.tensor)
    what, adapter = args.model_name_or_path, args.adapter
    scores = pretrained.gives_scores(what, adapter=adapter)
    load: Any = pretrained.load_scalar if scores else pretrained.load
    save: Any = pretrained.save_scalar if scores else pretrained.save
    source = training.with_template(load(what, adapter=adapter, mesh=mesh), args.chat_template_path)
    if scores:
        source = source._replace(tokenizer=training.of_scores(training.tokenizer_of(source)))
    save(args.output_dir, source, source.params, dtype=args.dtype)
