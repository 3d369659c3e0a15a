"""What the training commands share: data, model and run; what of the model is trained, and how."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhfjax import pretrained, sharding
from rlhfjax.cli import arguments, memory, processes
from rlhfjax.cli.reports import reports
from rlhfjax.cli.run import Run, Trained
from rlhfjax.data import formats, mixture
from rlhfjax.data.chat import ChatTemplate
from rlhfjax.data.records import BadRecords, held_out, read, renamed
from rlhfjax.data.tokenized import Report
from rlhfjax.models import lora
from rlhfjax.pretrained import Pretrained, Tokenizer, peft
from rlhfjax.types import LanguageModel, Params

# What may be another when a run is resumed: where things are, and how the work is shared.
MAY_CHANGE = (
    "config", "data", "dataset_name", "distributed", "fsdp", "gradient_checkpointing",
    "model_name_or_path", "output_dir", "report_to", "resume", "save_steps", "save_total_limit",
    "tensor",
)  # fmt: skip
NUM_BUCKETS = 4
LEARNED, HELD_OUT = 0, 1


class Session(NamedTuple):
    """A command at work.

    Attributes:
      args: what was asked.
      run: its directory.
      examples: of each source of data.
      bad: records that were left out.
    """

    args: Any
    run: Run
    examples: list[list[Any]]
    bad: BadRecords

    @property
    def batch_size(self) -> int:
        """Rows of an update, on all devices."""
        rows = math.prod(self.run.mesh.shape[axis] for axis in ("data", "fsdp"))
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * rows

    def tokenized(self, function: Callable[..., tuple[list[Any], Report]], **more: Any) -> Mixture:
        """The examples as token ids; what became of them is told.

        Args:
          function: `tokenized.responses` or `tokenized.supervised`, all but the examples given.
          **more: passed on.
        """
        found = [function(examples, bad=self.bad, **more) for examples in self.examples]
        if self.run.is_first:
            for _, report in found:
                print(report, file=sys.stderr)
        weights = self.args.dataset_weights or None
        return Mixture([items for items, _ in found], weights, self.args.seed)

    def num_steps(self, per_epoch: int) -> int:
        """Of all the training."""
        args = self.args
        return args.max_steps if args.max_steps > 0 else args.num_train_epochs * per_epoch

    def train(self, stage: str, start: Callable[..., Any], *inputs: Any, **more: Any) -> Trained:
        """`Run.train`, from the first checkpoint on."""
        return self.run.train(stage, start, *inputs, save_every=self.args.save_steps, **more)


class Mixture(NamedTuple):
    """Items of several sources, by weights.

    Attributes:
      sources: the items of each.
      weights: of each; None for their sizes.
      seed: decides the order.
    """

    sources: list[list[Any]]
    weights: Sequence[float] | None
    seed: int

    @property
    def items(self) -> list[Any]:
        """All of them."""
        return [item for source in self.sources for item in source]

    def stream(self, start: int) -> Iterator[Any]:
        """Endless, from a position on."""
        return mixture.stream(self.sources, seed=self.seed, weights=self.weights, start=start)

    def epoch(self, number: int) -> list[Any]:
        """As many as there are."""
        size = len(self.items)
        return list(islice(self.stream(number * size), size))


@contextmanager
def opened(args: Any, wanted: Sequence[formats.Format]) -> Iterator[Session]:
    """Reads the data and opens the run, on its mesh.

    Args:
      args: what was asked.
      wanted: formats that the command can use.

    Yields:
      the session.
    """
    processes.join(cluster=args.distributed)
    bad = BadRecords(args.max_bad_records)
    if args.dataset_weights and len(args.dataset_weights) != len(args.dataset_name):
        raise ValueError(
            f"--dataset_weights has {len(args.dataset_weights)} numbers for "
            f"{len(args.dataset_name)} data sets: give one for each"
        )
    found = examples(args, args.dataset_name, wanted, bad=bad)
    text = repr([[replace(example, place=None) for example in of] for of in found])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    mesh = sharding.mesh(data=args.data, fsdp=args.fsdp, tensor=args.tensor)
    with (
        jax.set_mesh(mesh),
        reports(args.report_to, args.output_dir) as told,
        Run(
            args.output_dir, asdict(args), may_change=MAY_CHANGE, mesh=mesh, resume=args.resume,
            keep=args.save_total_limit, fingerprint=fingerprint, reports=told,
        ) as run,
    ):  # fmt: skip
        yield Session(args, run, found, bad)


def examples(
    args: Any,
    paths: Sequence[Path],
    wanted: Sequence[formats.Format],
    *,
    side: int = LEARNED,
    bad: BadRecords | None = None,
) -> list[list[Any]]:
    """The examples of each file or folder, columns renamed, of one side of `--eval_fraction`."""
    names = dict(name.split("=") for name in args.rename if name.count("=") == 1)
    if len(names) < len(args.rename):
        raise ValueError(f"--rename {' '.join(args.rename)}: write each as old=new")
    found = []
    for path in paths:
        records = held_out(read(path, bad=bad), args.eval_fraction)[side]
        if not records:
            raise ValueError(f"{path}: --eval_fraction {args.eval_fraction} leaves no record")
        found.append(formats.examples(renamed(records, names), wanted, bad=bad))
    return found


def load(args: arguments.Model, mesh: Any, *, remat: bool = False) -> Pretrained[LanguageModel]:
    """The model of a command: float32 parameters, computing in what was asked for."""
    return pretrained.load(
        args.model_name_or_path, mesh=mesh, dtype=args.dtype, param_dtype=jnp.float32, remat=remat
    )


def tokenizer_of(source: Pretrained[Any]) -> Tokenizer:
    """The tokenizer of a directory, which must have one that fits the model."""
    found, vocab_size = source.tokenizer, source.architecture.config.vocab_size
    if found is None:
        raise ValueError("the model directory has no tokenizer.json: put one there")
    if found.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer has {found.vocab_size} tokens and the model room for {vocab_size}: "
            "take the tokenizer that belongs to the model"
        )
    return found


def template_of(source: Pretrained[Any], path: Path | None = None) -> ChatTemplate | None:
    """The chat template of a file, or the model's own."""
    text = source.chat_template if path is None else path.read_text(encoding="utf-8")
    return None if text is None else ChatTemplate(text, tokenizer_of(source).special_tokens)


class Policy(NamedTuple):
    """What of a language model is trained: all of it, or an adapter beside it.

    Attributes:
      params: before training.
      ref_params: those of the reference, over the same model.
      compiled: `(make, donate) -> function(state, …)`: what `make(model)` compiles, for a model
        over `params`.
      save: writes trained parameters into a directory.
    """

    params: Params
    ref_params: Params
    compiled: Callable[..., Callable[..., Any]]
    save: Callable[[Path, Params], None]


def policy(args: Any, source: Pretrained[LanguageModel], key: jax.Array) -> Policy:
    """What `--use_peft` says."""
    if not args.use_peft:
        return Policy(
            source.params,
            source.params,
            lambda make, *, donate=True: memory.explained(make(source.model)),
            lambda out, params: pretrained.save(out, source, params, overwrite=True),
        )
    scale = args.lora_alpha / args.lora_r
    combine = partial(lora.beside, scale=scale)
    adapters = lora.init(key, source.params, rank=args.lora_r, pattern=args.lora_target_modules)

    def compiled(
        make: Callable[[LanguageModel], Callable[..., Any]], *, donate: bool = True
    ) -> Callable[..., Any]:
        def over_adapters(base: Params, *given: Any) -> Any:
            return make(lora.on(source.model, base, combine=combine))(*given)

        program = jax.jit(over_adapters, donate_argnums=(1,) if donate else ())
        return memory.explained(partial(program, source.params))

    def save(out: Path, adapters: Params) -> None:
        base = str(args.model_name_or_path)
        peft.save(out, adapters, source.architecture, scale=scale, base=base, overwrite=True)

    return Policy(adapters, lora.nothing(adapters), compiled, save)


def optimizer(args: arguments.Training, num_updates: int) -> optax.GradientTransformation:
    """AdamW under the schedule that was asked for; weights decay in matrices alone."""
    rising = round(args.warmup_ratio * num_updates)
    falling = max(num_updates - rising, 1)
    after = {
        "linear": optax.linear_schedule(args.learning_rate, 0.0, falling),
        "cosine": optax.cosine_decay_schedule(args.learning_rate, falling),
        "constant": optax.constant_schedule(args.learning_rate),
    }[args.lr_scheduler_type]
    before = optax.linear_schedule(0.0, args.learning_rate, rising)
    adamw = optax.adamw(
        optax.join_schedules([before, after], [rising]) if rising else after,
        weight_decay=args.weight_decay,
        mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    )
    if args.max_grad_norm <= 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), adamw)


def finish(session: Session, trained: Trained, **more: Any) -> None:
    """Says what came out, in `summary.json` and on the screen."""
    last = trained.rows[-1] if trained.rows else {}
    summary = {"metrics": last, "recompilations": trained.recompilations, **more}
    session.run.write("summary.json", summary)
    if session.run.is_first:
        print(f"{session.args.output_dir}: {json.dumps(last)}", file=sys.stderr)
