"""Asking a reward function: every score a finite number, every failure named or left out."""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhfjax.rewards import arguments
from rlhfjax.rewards.arguments import TRAINER_STATE, Function, name_of
from rlhfjax.rewards.errors import Failure, RewardError

LARGEST = float(np.finfo(np.float32).max)
MOST_SHOWN = 5
MOST_SILENT = 3
SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxother = 100


def call(
    function: Function, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
) -> np.ndarray:
    """Scores of a batch by `function(prompts=…, completions=…, **columns)`.

    The function is given the arguments that it names, and all of them if it has `**kwargs`.

    Args:
      function: gives one number a completion, or None where it has no opinion.
      prompts: B texts, or lists of messages.
      completions: B of the same kind.
      **columns: further columns, B entries each, and TRL's `trainer_state` if there is one.

    Returns:
      [B] float32, with NaN where the function returned None: `learn` of every algorithm leaves
      those samples out.

    Raises:
      RewardError: a `ValueError`: the function needs a column that is not given, raised, did not
        answer in the time of its `Worker`, returned another number of scores than completions, or
        one that is no finite number. Where the batch failed as a whole the prompts are asked one by
        one until one fails, and the message names it.

    References:
      TRL's `reward_funcs`.
    """
    given = {"prompts": prompts, "completions": completions, **columns}
    scores, failures, problem = _ask(function, given, most_failures=1)
    if failures or problem:
        cause = problem and problem.__cause__
        raise RewardError(_message(function, failures, problem), failures) from cause
    return scores


def call_or_mask(
    function: Function, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
) -> np.ndarray:
    """`call`, but samples that fail are left out like those without an opinion, with a warning.

    Where the batch failed as a whole, the scores are those of the prompts asked one by one; a
    function that compares the samples of a batch cannot be asked so. After three that do not
    answer in time, one after the other, the rest is not asked.

    Args:
      function: as in `call`.
      prompts: as in `call`.
      completions: as in `call`.
      **columns: as in `call`.

    Returns:
      [B] float32, with NaN where the function failed or returned None.

    Raises:
      RewardError: the function needs a column that is not given.
    """
    given = {"prompts": prompts, "completions": completions, **columns}
    scores, failures, problem = _ask(function, given, most_failures=len(completions))
    if failures or problem:
        message = f"{_message(function, failures, problem)}; samples without a score are left out"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return scores


class _BatchError(Exception):
    """A batch without answers; its cause is what the function raised, if it did."""


def _ask(
    function: Function, given: dict[str, Sequence[Any]], *, most_failures: int
) -> tuple[np.ndarray, list[Failure], _BatchError | None]:
    """Scores, samples that failed, and what was wrong with the batch as a whole, if anything was.

    If so, samples are asked for one by one, until so many have failed.
    """
    prompts, number = given["prompts"], len(given["completions"])
    scores = np.full(number, np.nan, np.float32)
    failures: list[Failure] = []

    def fail(index: int, reason: object) -> None:
        failures.append(Failure(index, prompts[index], str(reason)))

    def take(index: int, answer: Any) -> None:
        if answer is None:
            return
        score = _number(answer)
        if abs(score) <= LARGEST:
            scores[index] = score
        else:
            fail(index, f"returned {SHORT.repr(answer)}")

    try:
        for index, answer in enumerate(_answers(function, given)):
            take(index, answer)
        return scores, failures, None
    except _BatchError as error:
        problem = error
    silent = 0
    for index in range(number):
        if len(failures) == most_failures:
            break
        if silent == MOST_SILENT:
            fail(index, f"was not asked after {silent} without an answer")
            continue
        alone = {
            name: column if name == TRAINER_STATE else column[index : index + 1]
            for name, column in given.items()
        }
        try:
            take(index, _answers(function, alone)[0])
            silent = 0
        except _BatchError as error:
            fail(index, error)
            silent = silent + 1 if isinstance(error.__cause__, TimeoutError) else 0
    return scores, failures, problem


def _answers(function: Function, given: dict[str, Sequence[Any]]) -> list[Any]:
    try:
        answers = arguments.answer(function, given)
    except RewardError:
        raise
    except Exception as error:
        raise _BatchError(f"raised {error!r}") from error
    if not isinstance(answers, list):
        raise _BatchError(f"returned {SHORT.repr(answers)}, which is no list")
    number = len(given["completions"])
    if len(answers) != number:
        raise _BatchError(f"returned {len(answers)} scores for {number} completions")
    return answers


def _number(answer: Any) -> float:
    """NaN where it is none; a text is none even if it looks like one."""
    try:
        return math.nan if isinstance(answer, str | bytes) else float(answer)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _message(function: Function, failures: list[Failure], problem: _BatchError | None) -> str:
    """What went wrong, in the order in which it was found out."""
    found = [
        f"{failure.reason} for sample {failure.sample} (prompt {SHORT.repr(failure.prompt)})"
        for failure in failures[:MOST_SHOWN]
    ]
    if len(failures) > MOST_SHOWN:
        found.append(f"so for {len(failures)} samples in all")
    if problem is not None:
        alone = ", ".join(found) or "gave every sample a score"
        found = [f"{problem}; asked for one sample at a time it {alone}"]
    return (
        f"reward function {name_of(function)!r} {', '.join(found)}: return one finite number for "
        "each completion, or None to leave it out"
    )
