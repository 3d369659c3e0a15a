"""Progress for people: a bar on a terminal, a line now and then in a log file."""

import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0
FORMAT = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
FORMAT_WITH_BAR = "{desc}: {percentage:3.0f}%|{bar}| " + FORMAT.removeprefix("{desc}: ")


@contextmanager
def progress(
    total: int,
    description: str,
    *,
    done: int = 0,
    stream: TextIO | None = None,
) -> Iterator[Callable[..., None]]:
    """Shows how far a stage is, the time left, how fast it goes, and the few numbers that matter.

    On a terminal this is a bar in place. Anywhere else it is a plain line at the first step,
    every 15 seconds, and at the end.

        with progress(len(prompts), "ppo") as advance:
            advance(kl=0.1, score=0.7)

    Args:
      total: the number of steps.
      description: the name of the stage.
      done: steps that an earlier run has done.
      stream: where to write; standard error if None.

    Yields:
      `advance(**numbers)`: one step is done; numbers to show beside it.
    """
    out = sys.stderr if stream is None else stream
    terminal = out.isatty()
    bar = tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="step",
        file=out if terminal else io.StringIO(),
        mininterval=0.1 if terminal else math.inf,
        dynamic_ncols=terminal,
        bar_format=FORMAT_WITH_BAR if terminal else FORMAT,
    )
    shown_at = -math.inf

    def advance(**numbers: float) -> None:
        nonlocal shown_at
        bar.set_postfix_str(
            ", ".join(f"{name} {float(number):.3g}" for name, number in numbers.items()),
            refresh=False,
        )
        bar.update()
        if not terminal and (
            bar.n == total or time.monotonic() - shown_at >= SECONDS_BETWEEN_LINES
        ):
            shown_at = time.monotonic()
            with suppress(OSError):  # a screen that is a file on a full disk
                print(bar, file=out, flush=True)

    with bar:
        yield advance
