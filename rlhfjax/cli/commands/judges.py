"""What scores completions: functions by name, and directories of reward models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhfjax import pretrained, rewards, sharding
from rlhfjax.algorithms import reward_model
from rlhfjax.cli import arguments
from rlhfjax.cli.commands import training
from rlhfjax.data import formats, hub, tokenized
from rlhfjax.types import ScalarModel

CALLS = {"raise": rewards.call, "mask": rewards.call_or_mask}
ROWS_AT_ONCE = 32


@contextmanager
def opened(args: arguments.Online, source: Any, mesh: Any) -> Iterator[rewards.Combined]:
    """The rewards that `--reward_funcs` names, as one.

    Args:
      args: what was asked.
      source: the policy's directory.
      mesh: the devices.

    Yields:
      `(prompts, completions, **columns) -> (scores, metrics)`.
    """
    with named(
        args.reward_funcs, source, mesh, weights=args.reward_weights or None,
        time_limit=args.reward_time_limit, call=CALLS[args.reward_failures],
    ) as judge:  # fmt: skip
        yield judge


@contextmanager
def named(names: Sequence[str], source: Any, mesh: Any, **more: Any) -> Iterator[rewards.Combined]:
    """`rewards.Combined` of functions and of reward models' directories."""
    functions = [_of_directory(Path(x), source, mesh) if Path(x).is_dir() else x for x in names]
    with rewards.Combined(functions, **more) as judge:
        yield judge


def must_exist(names: Sequence[str]) -> None:
    """Refuses files and directories that are not there, before anything else is loaded."""
    for name in names:
        place = name.partition(".py")[0] + ".py" if ".py" in name else name
        if (
            ("/" in place or place.endswith(".py"))
            and "(" not in place
            and not Path(place).exists()
        ):
            raise ValueError(f"{name}: no such directory or file{hub.advice(name, 'model')}")


def ask(
    judge: rewards.Combined, examples: Sequence[formats.Prompt], texts: Sequence[str], **more: Any
) -> tuple[np.ndarray, dict[str, float]]:
    """Scores of completions, one to each prompt.

    Args:
      judge: the rewards.
      examples: the prompts, with further columns for the functions.
      texts: their completions.
      **more: further arguments of the functions.

    Returns:
      [B] scores, NaN where there is none, and metrics.
    """
    prompts = [example.prompt for example in examples]
    names = sorted({name for example in examples for name in example.columns})
    columns = {name: [example.columns.get(name) for example in examples] for name in names}
    return judge(prompts, rewards.completions_to(prompts, texts), **columns, **more)


def _of_directory(directory: Path, policy: Any, mesh: Any) -> rewards.Function:
    if not pretrained.gives_scores(directory):
        raise ValueError(
            f"{directory} holds a language model, without a head for scores: give the directory of "
            "a reward model, as `rlhfjax reward` exports it"
        )
    source = pretrained.load_scalar(directory, mesh=mesh)
    if source.chat_template is None:
        source = source._replace(chat_template=policy.chat_template)
    tokenizer = training.of_scores(training.tokenizer_of(source))
    template = training.template_of(source)
    score = jax.jit(partial(_scores, source.model))

    def score_tokens(tokens: Any, mask: Any) -> Any:
        return score(source.params, *sharding.rows((tokens, mask), mesh))

    context = source.architecture.config.context_length
    tokens_of = partial(
        tokenized.responses, tokenizer=tokenizer, template=template, may_lack_prompt=True,
        max_prompt_length=context - 1, max_length=context,
    )  # fmt: skip

    def encode(prompt: formats.Content, completion: formats.Content) -> list[int]:
        if completion == "" and not tokenizer.end_tokens:  # the prompt is all that there is
            (item,), _ = tokens_of([formats.Prompt(prompt=prompt)])
            return item.prompt
        (item,), _ = tokens_of([formats.Completion(prompt=prompt, completion=completion)])
        return [*item.prompt, *item.responses[0]]

    return rewards.of_texts(
        score_tokens,
        encode,
        length=context,
        batch_size=ROWS_AT_ONCE,
        pad_token=tokenizer.pad_token,
        name=directory.name,
    )


def _scores(model: ScalarModel, params: Any, tokens: Any, mask: Any) -> Any:
    return sharding.whole(reward_model.score(model, params, tokens, mask))
