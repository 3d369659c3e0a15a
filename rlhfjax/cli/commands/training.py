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
    "config", "data", "dataset_name", "distributed", "export_dtype", "fsdp",
    "gradient_accumulation_steps", "gradient_checkpointing", "log_completions_steps", "output_dir",
    "per_device_train_batch_size", "report_to", "resume", "save_steps", "save_total_limit",
    "stop_at_kl", "stop_at_reward", "stop_patience", "stop_when_falls", "stop_window", "tensor",
)  # fmt: skip
NUM_BUCKETS = 3


class Session(NamedTuple):
    """A command at work.

    Attributes:
      args: what was asked.
      run: its directory.
      examples: of each source of data, to learn from.
      held_out: of each source, those of `--eval_fraction`.
      batch_size: rows of an update, on all devices.
      bad: records that were left out.
    """

    args: Any
    run: Run
    examples: list[list[Any]]
    held_out: list[list[Any]]
    batch_size: int
    bad: BadRecords

    def tokenized(
        self,
        function: Callable[..., tuple[list[Any], Report]],
        *,
        template: ChatTemplate | None,
        **more: Any,
    ) -> Mixture:
        """The examples as token ids; what became of them is told.

        Args:
          function: `tokenized.responses` or `tokenized.supervised`, all but the examples given.
          template: of the model.
          **more: passed on.
        """
        if not all(self.examples):
            share = self.args.eval_fraction
            raise ValueError(f"--eval_fraction {share} leaves no record to learn from")
        needs_template(self.examples[0], template)
        more |= {"bad": self.bad, "template": template}
        found = [function(examples, **more) for examples in self.examples]
        if self.run.is_first:
            for _, report in found:
                print(report, file=sys.stderr)
        weights = self.args.dataset_weights or None
        return Mixture([items for items, _ in found], weights, self.args.seed)

    def num_steps(self, per_epoch: int) -> int:
        """Of all the training; the last part of a pass is rounded up to a step, as in TRL."""
        args = self.args
        if args.max_steps > 0:
            return args.max_steps
        return math.ceil(args.num_train_epochs * per_epoch)

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
    bad = BadRecords(
        args.max_bad_records, advice="correct or remove them, or allow more by --max_bad_records"
    )
    learned, aside = examples(args, args.dataset_name, wanted, bad=bad)
    mesh = sharding.mesh(data=args.data, fsdp=args.fsdp, tensor=args.tensor)
    rows = math.prod(mesh.shape[axis] for axis in ("data", "fsdp"))
    batch_size = rows * args.per_device_train_batch_size * args.gradient_accumulation_steps
    text = repr([[replace(example, place=None) for example in of] for of in learned])
    fingerprint = f"{batch_size} rows an update of {hashlib.sha256(text.encode()).hexdigest()}"
    with (
        jax.set_mesh(mesh),
        Run(
            args.output_dir, asdict(args), may_change=MAY_CHANGE, mesh=mesh, resume=args.resume,
            keep=args.save_total_limit, fingerprint=fingerprint,
        ) as run,
        reports(args.report_to if run.is_first else (), args.output_dir) as told,
    ):  # fmt: skip
        run.reports += told
        yield Session(args, run, learned, aside, batch_size, bad)


def examples(
    args: Any,
    paths: Sequence[Path],
    wanted: Sequence[formats.Format],
    *,
    bad: BadRecords | None = None,
) -> tuple[list[list[Any]], list[list[Any]]]:
    """The examples of each file or folder, columns renamed, on both sides of `--eval_fraction`."""
    names = dict(name.split("=") for name in args.rename if name.count("=") == 1)
    if len(names) < len(args.rename):
        raise ValueError(f"--rename {' '.join(args.rename)}: write each as old=new")
    sides: tuple[list[list[Any]], list[list[Any]]] = ([], [])
    for path in paths:
        records = renamed(read(path, bad=bad), names)
        for side, part in zip(sides, held_out(records, args.eval_fraction), strict=True):
            side.append(formats.examples(part, wanted, bad=bad) if part else [])
    return sides


def load(
    args: arguments.Model, mesh: Any, *, remat: bool = False, param_dtype: Any = None
) -> Pretrained[LanguageModel]:
    """The language model of a command."""
    source = pretrained.load(
        args.model_name_or_path, mesh=mesh, dtype=args.dtype, param_dtype=param_dtype, remat=remat
    )
    return with_template(source, args.chat_template_path)


def with_template(source: Pretrained[Any], path: Path | None) -> Pretrained[Any]:
    """The model with the chat template of a file, which then goes along when it is exported."""
    if path is None:
        return source
    text = path.read_text(encoding="utf-8")
    files = dict(source.files) | {"chat_template.jinja": text.encode()}
    return source._replace(chat_template=text, files=files)


def tokenizer_of(source: Pretrained[Any]) -> Tokenizer:
    """The tokenizer of a directory, which must have one."""
    if source.tokenizer is None:
        raise ValueError("the model's directory has no tokenizer.json: put one there")
    return source.tokenizer


def of_scores(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer of a reward model, which reads the score at the last token that does not pad.

    Where the end token pads, as in GPT-2, transformers would overlook one that ends a text; such
    texts go without it.
    """
    if tokenizer.pad_token not in tokenizer.end_tokens:
        return tokenizer
    return replace(tokenizer, end_tokens=())


def needs_template(examples: Sequence[Any], template: ChatTemplate | None) -> None:
    """Refuses dialogues for a model that does not say how it writes them."""
    content = getattr(examples[0], "prompt", getattr(examples[0], "text", ""))
    if template is None and not isinstance(content, str):
        raise ValueError(
            "the data are dialogues and the model has no chat template: give --chat_template_path"
        )


def template_of(source: Pretrained[Any]) -> ChatTemplate | None:
    """The chat template of a model, if it has one."""
    text = source.chat_template
    return None if text is None else ChatTemplate(text, tokenizer_of(source).special_tokens)


def multiple(max_length: int) -> int:
    """What prompts are taken to be rounded up to, so that few shapes hold all of a length."""
    return max(8, max_length // 8)


class Policy(NamedTuple):
    """What of a language model is trained: all of it, or an adapter beside it.

    Attributes:
      params: before training.
      ref_params: those of the reference, over the same model.
      compiled: `(make, donate) -> function(state, …)`: what `make(model)` compiles, for a model
        over `params`.
      save: `(directory, params, head=None)`: writes what was trained; with a head for scores on it,
        as a reward model.
    """

    params: Params
    ref_params: Params
    compiled: Callable[..., Callable[..., Any]]
    save: Callable[..., None]


def policy(args: Any, source: Pretrained[LanguageModel], key: jax.Array) -> Policy:
    """What `--use_peft` says."""
    return _adapter(args, source, key) if args.use_peft else _whole(args, source)


def _whole(args: Any, source: Pretrained[LanguageModel]) -> Policy:
    def compiled(make: Callable[..., Any], *, donate: bool = True) -> Callable[..., Any]:
        return memory.explained(make(source.model), memory.OF_COMMANDS)

    def save(out: Path, params: Params, head: Params | None = None) -> None:
        how = {"dtype": args.export_dtype, "overwrite": True}
        if head is None:
            pretrained.save(out, source, params, **how)
        else:
            pretrained.save_scalar(out, source, {"backbone": params, "head": head}, **how)

    return Policy(source.params, source.params, compiled, save)


def _adapter(args: Any, source: Pretrained[LanguageModel], key: jax.Array) -> Policy:
    path, before = args.model_name_or_path, []
    if peft.is_adapter(path):
        # It is merged here, and the new one belongs to its base only together with it.
        before, path = [peft.load(path, source.architecture)], peft.base_of(path)
    scale = args.lora_alpha / args.lora_r
    combine = partial(lora.beside, scale=scale)
    pattern = peft.pattern_of(source.architecture, args.lora_target_modules)
    adapters = lora.init(key, source.params, rank=args.lora_r, pattern=pattern)

    def compiled(
        make: Callable[[LanguageModel], Callable[..., Any]], *, donate: bool = True
    ) -> Callable[..., Any]:
        def over_adapters(base: Params, *given: Any) -> Any:
            return make(lora.on(source.model, base, combine=combine))(*given)

        program = jax.jit(over_adapters, donate_argnums=(1,) if donate else ())
        return partial(memory.explained(program, memory.OF_COMMANDS), source.params)

    def save(out: Path, adapters: Params, head: Params | None = None) -> None:
        trained = peft.Loaded(adapters, scale)
        if before:
            trained = peft.added(*before, trained)
        peft.save(
            out, trained.adapters, source.architecture, scale=trained.scale, head=head,
            base=str(path.absolute()), files=source.files, overwrite=True,
        )  # fmt: skip

    return Policy(adapters, lora.nothing(adapters), compiled, save)


def optimizer(args: arguments.Training, num_updates: int) -> optax.GradientTransformation:
    """AdamW under the schedule that was asked for; weights decay in matrices alone."""
    rising = args.warmup_steps or round(args.warmup_ratio * num_updates)
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
    if trained.stopped:
        summary["stopped"] = trained.stopped
    session.run.write("summary.json", summary)
    if session.run.is_first:
        print(f"{session.args.output_dir}: {json.dumps(last)}", file=sys.stderr)
