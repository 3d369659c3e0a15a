"""`rlhfjax dpo`, `orpo`, `simpo`, `kto`: learning from preferences directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from rlhfjax import sharding
from rlhfjax.algorithms import dpo, kto, orpo, simpo
from rlhfjax.cli import arguments
from rlhfjax.cli.commands import training
from rlhfjax.data import formats, tokenized
from rlhfjax.data.cursor import batches_from
from rlhfjax.data.example_batches import ResponseBatch, pairs_of, response_batches, shapes
from rlhfjax.data.tokenized import Tokenized


class Method(NamedTuple):
    """One of the methods.

    Attributes:
      algorithm: its module.
      hyper: its numbers.
      formats: of the data that it learns from.
      reader: from the items to what its step takes of a batch of them.
      has_reference: whether it asks what another policy thinks.
      smallest_batch: rows of an update without which it means nothing.
    """

    algorithm: Any
    hyper: Any
    formats: Sequence[formats.Format]
    reader: Callable[[Sequence[Tokenized]], Callable[[ResponseBatch], Any]]
    has_reference: bool
    smallest_batch: int = 1


def run(args: Any) -> None:
    """Trains a policy."""
    method = METHODS[type(args)](args)
    algorithm = method.algorithm
    with training.opened(args, method.formats) as session:
        if session.batch_size < method.smallest_batch:
            raise ValueError(
                f"an update has {session.batch_size} row, and this method compares "
                f"{method.smallest_batch}: raise --per_device_train_batch_size"
            )
        mesh = session.run.mesh
        source = training.load(args, mesh, remat=args.gradient_checkpointing, param_dtype="float32")
        tokenizer = training.tokenizer_of(source)
        policy = training.policy(args, source, jax.random.key(args.seed))
        max_length = min(args.max_length, source.model.context_length)
        data = session.tokenized(
            tokenized.responses,
            tokenizer=tokenizer,
            template=training.template_of(source),
            max_prompt_length=args.max_prompt_length,
            max_length=max_length,
            multiple=training.multiple(max_length),
        )
        read = method.reader(data.items)
        room = shapes(data.items, num_buckets=training.NUM_BUCKETS, max_length=max_length)

        def epoch(number: int, start: int) -> Iterator[Any]:
            batches = response_batches(
                data.epoch(number), batch_size=session.batch_size, shapes=room,
                pad_token=tokenizer.pad_token, seed=args.seed, epoch=number, start=start,
                part=sharding.part_of_process(mesh),
            )  # fmt: skip
            return map(read, batches)

        num_steps = session.num_steps(sum(1 for _ in epoch(0, 0)))
        optimizer = training.optimizer(args, num_steps)
        update = policy.compiled(
            partial(
                algorithm.make_step,
                optimizer=optimizer,
                num_micro_batches=args.gradient_accumulation_steps,
            )
        )
        reference = policy.ref_params if method.has_reference else None

        def step(state: Any, batch: Any) -> Any:
            rows = sharding.rows_of_process(batch, mesh)
            return update(state, rows, reference, method.hyper)

        trained = session.train(
            algorithm.__name__.rpartition(".")[2],
            lambda params: algorithm.init(params, optimizer),
            policy.params,
            step=step,
            batches=partial(batches_from, epoch=epoch),
            num_steps=num_steps,
            show={"loss": "loss", "margin": "rewards/margins"},
        )
        policy.save(args.output_dir / "export", trained.state.params)
        training.finish(session, trained)


def _pairs(algorithm: Any, hyper: Any, *, has_reference: bool) -> Method:
    return Method(algorithm, hyper, formats.PREFERENCES, pairs_of, has_reference)


def _dpo(args: arguments.DPO) -> Method:
    hyper = dpo.Hyperparameters(beta=args.beta, label_smoothing=args.label_smoothing)
    return _pairs(dpo, hyper, has_reference=True)


def _orpo(args: arguments.ORPO) -> Method:
    return _pairs(orpo, orpo.Hyperparameters(beta=args.beta), has_reference=False)


def _simpo(args: arguments.SimPO) -> Method:
    hyper = simpo.Hyperparameters(beta=args.beta, margin=args.simpo_gamma)
    return _pairs(simpo, hyper, has_reference=False)


def _kto(args: arguments.KTO) -> Method:
    hyper = kto.Hyperparameters(
        beta=args.beta,
        desirable_weight=args.desirable_weight,
        undesirable_weight=args.undesirable_weight,
    )
    # The completion of a row to the prompt of another one says what z is.
    return Method(
        kto, hyper, (formats.UNPAIRED,),
        lambda _: lambda batch: batch.labelled(batch.labels[:, None]),
        has_reference=True, smallest_batch=2,
    )  # fmt: skip


METHODS: dict[type, Callable[[Any], Method]] = {
    arguments.DPO: _dpo,
    arguments.ORPO: _orpo,
    arguments.SimPO: _simpo,
    arguments.KTO: _kto,
}
