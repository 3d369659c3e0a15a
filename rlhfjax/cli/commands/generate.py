"""`rlhfjax generate`, and what `evaluate` decodes with."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np

from rlhfjax import rollout, sampling, sharding
from rlhfjax.cli.arguments import Generate, Sampling
from rlhfjax.cli.commands import training
from rlhfjax.data import formats, tokenized
from rlhfjax.data.batches import left_pad
from rlhfjax.data.records import Place
from rlhfjax.data.tokenized import Tokenized
from rlhfjax.pretrained import Pretrained
from rlhfjax.types import LanguageModel, Rollout

SHORTEST = 16


def run(args: Generate) -> None:
    """Writes completions."""
    examples = [
        formats.Prompt(prompt=prompt, place=Place("--prompts", number))
        for number, prompt in enumerate(args.prompts, start=1)
    ]
    if args.dataset_name is not None:
        examples += training.examples(args, [args.dataset_name], formats.PROMPTS)[0][0]
    if not examples:
        raise ValueError("no prompts: give --prompts or --dataset_name")
    mesh = sharding.mesh(data=args.data, fsdp=args.fsdp, tensor=args.tensor)
    with jax.set_mesh(mesh):
        source = training.load(args, mesh)
        items = prompts_of(args, source, examples)
        complete = completer(args, source, mesh)
        with open_output(args.output) as out:
            for batch, samples in complete(source.params, items):
                for item, text in zip(batch, texts_of(source, samples), strict=False):
                    line = {"prompt": item.example.prompt, "completion": text}
                    print(json.dumps(line, ensure_ascii=False), file=out, flush=True)


def open_output(path: Path | None) -> AbstractContextManager[TextIO]:
    """The file, or standard output."""
    return nullcontext(sys.stdout) if path is None else path.open("w", encoding="utf-8")


def prompts_of(
    args: Sampling, source: Pretrained[LanguageModel], examples: Sequence[formats.Prompt]
) -> list[Tokenized]:
    """Prompts as tokens, no longer than leaves room for a completion."""
    room = source.model.context_length - args.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in a context of "
            f"{source.model.context_length} tokens: ask for fewer"
        )
    template = training.template_of(source)
    training.needs_template(examples, template)
    items, report = tokenized.responses(
        examples, training.tokenizer_of(source), template=template, max_prompt_length=room
    )
    print(report, file=sys.stderr)
    highest = max(token for item in items for token in item.prompt)
    if highest >= source.model.vocab_size:
        raise ValueError(
            f"the tokenizer says token {highest}, the model has {source.model.vocab_size}: they do "
            "not belong together"
        )
    return items


def completer(
    args: Sampling, source: Pretrained[LanguageModel], mesh: Any
) -> Callable[..., Iterator[tuple[list[Tokenized], Rollout]]]:
    """`(params, items, seed=0) -> (batch, samples), …`, in few shapes and so few programs."""
    tokenizer = training.tokenizer_of(source)
    greedy = args.temperature == 0
    generate = jax.jit(
        lambda *given: sharding.whole(
            rollout.generate(
                source.model, *given,
                num_tokens=args.max_new_tokens,
                pad_token=tokenizer.pad_token,
                end_token=tokenizer.end_tokens,
                temperature=1.0 if greedy else args.temperature,
                sampler=sampling.greedy if greedy else sampling.categorical,
            )
        )
    )  # fmt: skip

    def complete(
        params: Any, items: Sequence[Tokenized], *, seed: int = 0
    ) -> Iterator[tuple[list[Tokenized], Rollout]]:
        key = jax.random.key(args.seed + seed)
        for start in range(0, len(items), args.batch_size):
            batch = list(items[start : start + args.batch_size])
            rows = [item.prompt for item in batch]
            length = SHORTEST
            while length < max(map(len, rows)):
                length *= 2
            length = min(length, source.model.context_length - args.max_new_tokens)
            # Rows that are left over repeat the last one.
            rows += rows[-1:] * (args.batch_size - len(rows))
            prompts = sharding.rows(
                left_pad(rows, length=length, pad_token=tokenizer.pad_token), mesh
            )
            yield batch, generate(params, *prompts, jax.random.fold_in(key, start))

    return complete


def texts_of(source: Pretrained[LanguageModel], samples: Rollout) -> list[str]:
    """The completions of a rollout."""
    return training.tokenizer_of(source).decode(tokens_of(samples))


def tokens_of(samples: Rollout) -> list[list[int]]:
    """The completions of a rollout as token ids."""
    rows = zip(np.asarray(samples.responses), np.asarray(samples.response_mask), strict=True)
    return [row[real].tolist() for row, real in rows]
