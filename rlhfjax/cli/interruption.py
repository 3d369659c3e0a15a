"""Being asked to stop: SIGTERM from a scheduler, Ctrl-C from a person."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

INTERRUPTED = os.EX_TEMPFAIL
"""75, the exit status of a run that was asked to stop, has saved and can be resumed."""


@contextmanager
def interruption() -> Iterator[Callable[[int], bool]]:
    """Puts off SIGTERM and SIGINT until it suits; a second SIGINT is not put off.

    With several processes any of them may be told, and all of them learn it at the same step: there
    jax's preemption service listens, to SIGTERM alone.

    Yields:
      `asked(step)`, whether to stop, to be called once with every step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    told: list[int] = []

    def listen(number: int, _: object) -> None:
        told.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, listen)
    try:
        yield lambda step: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
