"""What reward functions are given: TRL's arguments, to each the ones that it names.

Beside `prompts`, `completions` and the columns of the data these are `completion_ids`, a list of
tokens a sample, and `trainer_state`. TRL's `log_extra` and `log_metric` are not among them.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from inspect import Parameter, Signature
from typing import Any, NamedTuple

from rlhfjax.rewards.errors import RewardError

Function = Callable[..., Sequence[float | None]]
TRAINER_STATE = "trainer_state"


class TrainerState(NamedTuple):
    """How far training has come, for functions that name `trainer_state`.

    Attributes:
      global_step: steps done.
      max_steps: steps of the whole run.
      epoch: passes over the data, such as 0.5; None where nobody counts them.
    """

    global_step: int
    max_steps: int
    epoch: float | None = None


def name_of(function: Callable[..., Any]) -> str:
    """What a function is called in messages and metrics.

    Args:
      function: any callable.

    Returns:
      its name, or that of its class.
    """
    return getattr(function, "__name__", type(function).__name__)


def bare_signature(function: Callable[..., Any]) -> Signature:
    """The names of a signature, without annotations and values that only its process knows.

    Args:
      function: any callable.

    Returns:
      a signature where every default is None.
    """
    parameters = inspect.signature(function).parameters.values()
    return Signature(
        [
            Parameter(p.name, p.kind, default=p.empty if p.default is p.empty else None)
            for p in parameters
        ]
    )


def require(function: Callable[..., Any], names: Collection[str]) -> None:
    """Refuses a function that needs more than these arguments.

    Args:
      function: any callable.
      names: of the arguments that it will be given.

    Raises:
      RewardError: with the names of those that are missing.
    """
    missing = [
        repr(p.name)
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name not in names
    ]
    if missing:
        raise RewardError(
            f"reward function {name_of(function)!r} needs {', '.join(missing)}, which is not among "
            f"what it is given: {', '.join(names)}"
        )


def answer(function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """What a function answers to those of the arguments that it names; all, if it has `**kwargs`.

    Args:
      function: in TRL's signature, `async` or not.
      given: every argument by its name.

    Returns:
      a list, where it can be one.

    Raises:
      RewardError: it needs an argument that is not given.
    """
    require(function, given)
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        given = {p.name: given[p.name] for p in parameters if p.name in given}
    answered = function(**given)
    if inspect.iscoroutine(answered):
        answered = asyncio.run(answered)
    listed = isinstance(answered, Iterable) and not isinstance(answered, Mapping | Set)
    return list(answered) if listed else answered
