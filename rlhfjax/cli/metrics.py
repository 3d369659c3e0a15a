"""Metrics on disk: one JSON object a line."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from jax.typing import ArrayLike

from rlhfjax.checkpoint import write_text
from rlhfjax.checkpoint.files import sync

RESERVED = ("stage", "step")
NEWLINE = b"\n"


class MetricsLog:
    """Appends a line `{"stage": …, "step": …, name: number, …}` for every `write`.

    The file and its folder are made if they are missing; lines of an earlier run are kept, so
    that a continued run continues its log. A number that is not finite is written as `null`,
    since JSON has no other way to say it. Each line is on its way to the disk when `write`
    returns; where there is no room it waits, with a warning, and comes before the next one.

        with MetricsLog(out / "metrics.jsonl") as log:
            log.write("ppo", 0, {"objective/kl": kl})
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = FileIO(self.path, "ab")
        self._waiting = b""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError) if error else nullcontext(), self._file:  # would hide the error
            self._write()

    def sync(self) -> None:
        """Returns when all lines are on the disk.

        Raises:
          OSError: some cannot be written, as where the disk is full.
        """
        self._write()
        if self.path.is_file():
            os.fsync(self._file.fileno())
            sync(self.path.parent)

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: {self._waiting.count(NEWLINE)} lines wait; make room",
                str(self.path),
            ) from error

    def rewind(self, stage: str, count: int) -> list[dict[str, Any]]:
        """Takes back what a stage wrote after it was last saved, so that it can be written again.

        The lines of the other stages stay, and stages stand in the order in which they began. So
        does a last line that was broken off not stay.

        Args:
          stage: the stage that goes on.
          count: how many of its lines stay.

        Returns:
          the lines that stay, of this stage.

        Raises:
          ValueError: the stage has fewer lines, or one that is none.
        """
        if not self.path.is_file():  # such as /dev/null
            return []
        before = self.path.read_bytes()
        by_stage: dict[str, list[bytes]] = {stage: []} if not before else {}
        for number, line in enumerate(before.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                by_stage.setdefault(json.loads(line)["stage"], []).append(line)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}:{number}: not a line of a log, it was altered: mend it, or begin "
                    "anew in another directory"
                ) from None
        own = by_stage.get(stage, [])
        if len(own) < count:
            raise ValueError(
                f"{self.path}: {len(own)} lines of stage {stage!r}, of which {count} steps are "
                "saved: the log was altered, bring it back or begin anew in another directory"
            )
        by_stage[stage] = own[:count]
        after = b"".join(line for lines in by_stage.values() for line in lines)
        if after != before:
            write_text(self.path, after.decode())
            self._file.close()
            self._file = FileIO(self.path, "ab")
        return [json.loads(line) for line in by_stage[stage]]

    def write(
        self, stage: str, step: int, metrics: Mapping[str, ArrayLike]
    ) -> dict[str, str | int | float | None]:
        """Writes one line.

        Args:
          stage: which part of the run, such as "sft".
          step: the step within it.
          metrics: name → a number: Python, NumPy or jax, of one element.

        Returns:
          The line as a dictionary, numbers as Python floats, None for those not finite.

        Raises:
          ValueError: a metric named "stage" or "step", or one of more than one element.
        """
        row: dict[str, str | int | float | None] = {"stage": stage, "step": int(step)}
        for name, value in jax.device_get(dict(metrics)).items():
            if name in RESERVED:
                raise ValueError(f"metric {name!r}: the name is taken; choose another")
            if np.size(value) != 1:
                raise ValueError(
                    f"metric {name!r} has shape {np.shape(value)}; reduce it to one number"
                )
            number = float(np.asarray(value, dtype=np.float64).item())
            row[name] = number if math.isfinite(number) else None
        self._waiting += json.dumps(row, allow_nan=False).encode() + NEWLINE
        try:
            self._write()
        except OSError as error:
            warnings.warn(f"{error}; training goes on", stacklevel=2)
        return row
