"""Several reward functions as one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np

from rlhfjax.rewards import calls
from rlhfjax.rewards.arguments import Function, name_of, require
from rlhfjax.rewards.worker import Worker


def weighted_sum(scores: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Σᵢ wᵢ·rᵢ over the functions that gave a sample a score.

    Args:
      scores: [F, B], NaN where a function gave none.
      weights: F numbers.

    Returns:
      [B] float32, NaN where no function gave one.

    References:
      TRL's `reward_weights` and its `nansum`, which is 0 where there is no score.
    """
    known = ~np.isnan(scores)
    total = np.asarray(weights) @ np.where(known, scores, 0.0)
    return np.where(known.any(0), total, np.nan).astype(np.float32)


def metrics(names: Sequence[str], scores: np.ndarray) -> dict[str, float]:
    """TRL's `rewards/{name}/mean` and `rewards/{name}/std` over the samples with a score.

    Args:
      names: of F functions.
      scores: [F, B], NaN where a function gave none.

    Returns:
      Means, NaN where there is no score, and standard deviations with Bessel's correction, 0 where
      there are fewer than two.
    """
    found = {}
    for name, row in zip(names, scores, strict=True):
        known = row[~np.isnan(row)].astype(np.float64)
        found[f"rewards/{name}/mean"] = float(known.mean()) if len(known) else math.nan
        found[f"rewards/{name}/std"] = float(known.std(ddof=1)) if len(known) > 1 else 0.0
    return found


class Combined:
    """Σ wᵢ·rᵢ of several reward functions, over those that gave a sample a score.

        with Combined(["number", "rewards.py:polite"], weights=[1.0, 0.2]) as reward:
            scores, metrics = reward(prompts, completions, answer=answers)

    Those in processes of their own are asked at the same time, while the others run in this one.

    Args:
      functions: in TRL's signature, a `Worker` among them or not; or names as `load` reads them,
        each of which gets a `Worker`.
      weights: one a function; None for 1 each.
      time_limit: seconds that a named function may take.
      call: asks a function: `call`, or `call_or_mask` to leave out the samples that fail.

    Attributes:
      names: of the functions, for the metrics; the second of a name is `name_2`.

    Raises:
      ValueError: no function, or another number of weights.
      RewardError: a name that `load` refuses.
    """

    def __init__(
        self,
        functions: Sequence[Function | str],
        *,
        weights: Sequence[float] | None = None,
        time_limit: float = 60.0,
        call: Callable[..., np.ndarray] = calls.call,
    ) -> None:
        self.weights = [1.0] * len(functions) if weights is None else list(weights)
        if not functions or len(self.weights) != len(functions):
            raise ValueError(
                f"{len(functions)} reward functions and {len(self.weights)} weights: give at least "
                "one function, and one weight for each"
            )
        self._call, self._own = call, ExitStack()

        def start(function: Function | str) -> Function:
            if not isinstance(function, str):
                return function
            return self._own.enter_context(Worker(function, time_limit=time_limit))

        try:
            # Each process takes a while to start.
            with ThreadPoolExecutor(len(functions)) as pool:
                self.functions = list(pool.map(start, functions))
        except BaseException:
            self.close()
            raise
        self.names = _told_apart(name_of(function) for function in self.functions)

    def require(self, *names: str) -> None:
        """Refuses functions that need more than these arguments, before anything is sampled.

        Args:
          *names: of all arguments that `__call__` will be given.

        Raises:
          RewardError: with the name of the function and of what it lacks.
        """
        for function in self.functions:
            require(function, names)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> tuple[np.ndarray, dict[str, float]]:
        """Scores and metrics of a batch.

        Args:
          prompts: as in `call`.
          completions: as in `call`.
          **columns: as in `call`.

        Returns:
          scores: [B] float32, NaN where no function gave one.
          metrics: those of `metrics`.

        Raises:
          RewardError: as `call` does.
        """
        ask = partial(self._call, prompts=prompts, completions=completions, **columns)
        with ThreadPoolExecutor(len(self.functions)) as pool:
            asked = [pool.submit(ask, f) if isinstance(f, Worker) else None for f in self.functions]
            # What runs in this process keeps its thread: some libraries insist on the main one.
            here = iter([ask(f) for f in self.functions if not isinstance(f, Worker)])
            scores = np.stack([next(here) if one is None else one.result() for one in asked])
        return weighted_sum(scores, self.weights), metrics(self.names, scores)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes that were started for names."""
        self._own.close()


def _told_apart(names: Iterable[str]) -> list[str]:
    seen: Counter[str] = Counter()
    told = []
    for name in names:
        seen[name] += 1
        told.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return told
