"""`rlhfjax sft`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from rlhfjax import sharding
from rlhfjax.algorithms import sft
from rlhfjax.cli.arguments import SFT
from rlhfjax.cli.commands import training
from rlhfjax.data import formats, packing, tokenized
from rlhfjax.data.batches import bucket_lengths
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.example_batches import supervised_batches


def run(args: SFT) -> None:
    """Fine-tunes a language model."""
    with training.opened(args, formats.SUPERVISED) as session:
        mesh = session.run.mesh
        source = training.load(args, mesh, remat=args.gradient_checkpointing, param_dtype="float32")
        tokenizer = training.tokenizer_of(source)
        policy = training.policy(args, source, jax.random.key(args.seed))
        max_length = min(args.max_length, source.model.context_length)
        data = session.tokenized(
            tokenized.supervised,
            tokenizer=tokenizer,
            learn=partial(learned, args),
            template=training.template_of(source),
            max_length=max_length,
        )
        layout: dict[str, Any] = {
            "batch_size": session.batch_size,
            "pad_token": tokenizer.pad_token,
            "seed": args.seed,
            "part": sharding.part_of_process(mesh),
        }
        sizes = [len(text.tokens) for text in data.items]
        lengths = bucket_lengths(sizes, num_buckets=training.NUM_BUCKETS)

        def epoch(number: int, start: int) -> Iterator[Any]:
            texts, where = data.epoch(number), layout | {"epoch": number, "start": start}
            if args.packing:
                return packing.packed_batches(texts, length=max_length, **where)
            return supervised_batches(texts, lengths=lengths, **where)

        num_steps = session.num_steps(sum(1 for _ in epoch(0, 0)))
        optimizer = training.optimizer(args, num_steps)
        update = policy.compiled(
            partial(
                sft.make_step,
                optimizer=optimizer,
                num_micro_batches=args.gradient_accumulation_steps,
            )
        )
        trained = session.train(
            "sft",
            lambda params: sft.init(params, optimizer),
            policy.params,
            step=lambda state, batch: update(state, *sharding.rows_of_process(batch, mesh)),
            batches=partial(batches_from, epoch=epoch),
            num_steps=num_steps,
            show={"loss": "loss"},
        )
        policy.save(args.output_dir / "export", trained.state.params)
        training.finish(session, trained)


def learned(args: SFT, example: Any, *given: Any) -> Any:
    """Which tokens of an example are learned."""
    if args.assistant_only_loss:
        return tokenized.assistant_tokens(example, *given)
    if args.completion_only_loss and isinstance(example, formats.Completion):
        return tokenized.completion_tokens(example, *given)
    return tokenized.every_token(example, *given)
