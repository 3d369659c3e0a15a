"""When a run ends before its time: the rules of `stopping` on the lines of its log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhfjax import stopping
from rlhfjax.cli.arguments import Online

SCORE, KL = "objective/scores", "objective/kl"


class Rule(NamedTuple):
    """A reason to stop.

    Attributes:
      why: what is said of it.
      metrics: whose histories are looked at.
      first: `(*histories [K]) -> [] int`, the first point at which it holds; K while there is none.
    """

    why: str
    metrics: tuple[str, ...]
    first: Callable[..., jax.Array]


def asked(args: Online) -> list[Rule]:
    """The rules that the flags name."""
    window, rules = args.stop_window, []
    for flag, level, metric in (
        ("--stop_at_reward", args.stop_at_reward, SCORE),
        ("--stop_at_kl", args.stop_at_kl, KL),
    ):
        if level is not None:
            first = partial(stopping.reached, level=level, window=window)
            why = f"{flag} {level:g}: the mean of {window} steps has reached it"
            rules.append(Rule(why, (metric,), first))
    if (patience := args.stop_patience) is not None:
        first = partial(stopping.plateau, patience=patience)
        rules.append(Rule(f"--stop_patience {patience}: no new best score", (SCORE,), first))
    if (name := args.stop_when_falls) is not None:
        watched = KL, SCORE, f"rewards/{name}/mean"
        why = f"--stop_when_falls {name}: it falls while the score rises"
        rules.append(Rule(why, watched, partial(_turn, window=window)))
    return rules


def first_reason(rules: Sequence[Rule], num_steps: int) -> Callable[[list[dict[str, Any]]], str]:
    """From the lines of a log to why the run ends there, or "".

    Args:
      rules: those that count.
      num_steps: of the whole run: histories have this length from the beginning on, so that each
        rule is compiled once.
    """
    compiled = [jax.jit(rule.first) for rule in rules]

    def reason(rows: list[dict[str, Any]]) -> str:
        for rule, first in zip(rules, compiled, strict=True):
            histories = np.full((len(rule.metrics), num_steps), np.nan, np.float32)
            for history, name in zip(histories, rule.metrics, strict=True):
                history[: len(rows)] = np.array([row.get(name) for row in rows], float)
            if int(first(*histories)) < num_steps:
                return rule.why
        return ""

    return reason


def _turn(kl: jax.Array, score: jax.Array, watched: jax.Array, *, window: int) -> jax.Array:
    return stopping.turning_point(kl, score, watched, window=window)[1]
