"""Where the seconds of a run go."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax


class Clock:
    """Wall-clock seconds since it was made, and of named stages.

    clock = Clock()
    with clock("sft"):
        ...
    clock.seconds["sft"], clock.total()
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Adds what happens inside to the stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start


class Compilations:
    """Counts the programs that XLA compiles, and the seconds of tracing and compiling.

    Attributes:
      count: programs compiled since this was made.
      seconds: of tracing, lowering and compiling them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds += duration_secs
            self.count += event.endswith("backend_compile_duration")
