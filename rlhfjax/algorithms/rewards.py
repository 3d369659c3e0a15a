"""Rewards that are Python functions of text, in TRL's signature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def call(
    function: Callable[..., Sequence[float | None]],
    prompts: Sequence[str],
    completions: Sequence[str],
    **columns: Sequence[Any],
) -> np.ndarray:
    """Scores of a batch by `function(prompts=…, completions=…, **columns)`.

    Args:
      function: gives one number a completion, or None where it has no opinion.
      prompts: B texts.
      completions: B texts.
      **columns: further columns of the data, B entries each.

    Returns:
      [B] float32, with NaN where the function returned None: `learn` of
      every algorithm leaves those samples out.

    Raises:
      ValueError: another number of scores than completions, or a score that is not finite; the
        message names the sample.

    References:
      TRL's `reward_funcs`.
    """
    name = getattr(function, "__name__", type(function).__name__)
    answers = list(function(prompts=prompts, completions=completions, **columns))
    if len(answers) != len(completions):
        raise ValueError(
            f"reward function {name!r} returned {len(answers)} scores for {len(completions)} "
            "completions: return one number, or None, for each"
        )
    scores = np.full(len(answers), np.nan, np.float32)
    for index, answer in enumerate(answers):
        if answer is None:
            continue
        scores[index] = answer
        if not math.isfinite(scores[index]):
            raise ValueError(
                f"reward function {name!r} returned {answer} for sample {index} "
                f"(prompt {prompts[index]!r}): return a finite number, or None to leave it out"
            )
    return scores
