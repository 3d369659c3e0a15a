"""A run in a directory: it can be broken off at any moment, and goes on to the same end."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import yaml
from jax.experimental import multihost_utils

from rlhfjax import checkpoint, sharding
from rlhfjax.checkpoint import CheckpointError, Checkpoints, versions
from rlhfjax.cli.environment import environment
from rlhfjax.cli.interruption import INTERRUPTED, interruption
from rlhfjax.cli.metrics import MetricsLog
from rlhfjax.cli.progress import progress
from rlhfjax.cli.timing import Compilations
from rlhfjax.data.cursor import Cursor

Row = dict[str, Any]
Batches = Callable[[Cursor], Iterator[tuple[Any, Cursor]]]
Step = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]
MOST_SKIPPED = 5
IN_A_ROW = "steps in a row with skipped updates"


class TrainingError(Exception):
    """A run that cannot go on; says why, and where its last state and batch lie."""


class Trained(NamedTuple):
    """What a stage leaves behind.

    Attributes:
      state: after its last step.
      rows: its lines of the log.
      recompilations: programs that were compiled after the first step.
      stopped: why it ended before its time; "" if it did not.
    """

    state: Any
    rows: list[Row]
    recompilations: int
    stopped: str = ""


class Run:
    """A directory: `config.yaml`, `env.json`, `metrics.jsonl`, and `checkpoints/` of every stage.

    A stage that was broken off goes on at its last saved step, and what the log has beyond it is
    taken back. With several processes all of them make the same calls, and the first one writes.
    What is in `reports` is called with every line of the log.

    Args:
      out: the directory.
      config: all that was asked for, as JSON.
      may_change: names in it, at any depth, that may differ when the run is resumed.
      mesh: where the arrays live.
      resume: go on with what is there, if anything is.
      keep: how many steps of each stage to keep.
      fingerprint: of the data; the run is not resumed with others.

    Raises:
      CheckpointError: there is a run already and `resume` is False, or it was another run.
    """

    def __init__(
        self,
        out: Path,
        config: Mapping[str, Any],
        *,
        may_change: Collection[str] = (),
        mesh: jax.sharding.Mesh,
        resume: bool,
        keep: int = 2,
        fingerprint: str = "",
    ) -> None:
        self.out, self.mesh, self.keep = Path(out), mesh, keep
        config = json.loads(json.dumps(dict(config), default=str))
        self.config, self.fingerprint = _without(config, may_change), fingerprint
        self.is_first = jax.process_index() == 0
        self.compilations = Compilations()
        self._screen = None if self.is_first else io.StringIO()
        self._resources = ExitStack()
        self._calls = 0
        self.reports: list[Callable[[Row], object]] = []
        self._open(config, may_change, resume)

    def _open(self, config: Mapping[str, Any], may_change: Collection[str], resume: bool) -> None:
        told, log = self.out / "config.yaml", self.out / "metrics.jsonl"
        has_log = log.is_file() and log.stat().st_size > 0
        has_steps = any((self.out / "checkpoints").glob("*/*"))
        # The state before the first step is nothing that could be lost.
        has_begun = any((self.out / "checkpoints").glob("*/[1-9]*")) or has_log
        if has_begun and not resume:
            raise CheckpointError(
                f"{self.out} holds a run: go on with it (--resume), move it away, or give another "
                "directory"
            )
        if has_steps and resume and told.is_file():
            self._same_run(_without(_read(told), may_change), _read(self.out / "env.json"))
        if jax.process_count() > 1:  # All have looked before one changes anything.
            multihost_utils.sync_global_devices("the run is open")
        if not self.is_first:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._resources.callback(os.close, _lock(self.out))
            if has_steps and not resume:
                shutil.rmtree(self.out / "checkpoints")
            text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
            if not told.is_file() or told.read_bytes() != text.encode():
                checkpoint.write_text(told, text)
            self.write("env.json", environment() | {"fingerprint": self.fingerprint})
        except OSError as error:
            self._resources.close()
            raise CheckpointError(
                f"{self.out}: {error.strerror}; make room there, or give a directory that can be "
                "written"
            ) from error

    def _same_run(self, stored: dict[str, Any], machine: dict[str, Any]) -> None:
        """Refuses another run; of a file that has lost something every step has the rest."""
        checkpoint.same_config(self.out, stored, _common(self.config, stored))
        there = machine.get("fingerprint", self.fingerprint)
        if there != self.fingerprint:
            raise CheckpointError(
                f"{self.out} belongs to a run on other data: {there} there, {self.fingerprint} "
                "here; go on with its own, or give another directory"
            )
        before = machine.get("versions", versions())
        if before != versions():
            warnings.warn(
                f"{self.out} was begun with {before}, this is {versions()}: it goes on, but "
                "perhaps not to the same bits",
                stacklevel=5,
            )

    def __enter__(self) -> Self:
        path = self.out / "metrics.jsonl" if self.is_first else Path(os.devnull)
        self.log = self._resources.enter_context(MetricsLog(path))
        self._asked_to_stop = self._resources.enter_context(interruption())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._resources.__exit__(kind, error, trace)

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes a JSON file into the directory, all of it or none; the first process does.

        Args:
          name: of the file.
          content: what other than JSON is in it becomes text.
        """
        if self.is_first:
            checkpoint.write_json(self.out / name, content)

    def train(
        self,
        stage: str,
        start: Callable[..., Any],
        *inputs: Any,
        step: Step,
        batches: Batches,
        num_steps: int,
        save_every: int,
        show: Mapping[str, str],
        best: str | None = None,
        first: int = 1,
        stop: Callable[[list[Row]], str] | None = None,
    ) -> Trained:
        """Trains for so many steps, from the start or from where the stage was broken off.

        Args:
          stage: its name.
          start: `(*inputs) -> state`, pure; compiled, so that the arrays are born in their shards.
          *inputs: arrays.
          step: `(state, batch) -> (state, metrics)`.
          batches: `(cursor) -> (batch, cursor behind it), …`, from the cursor on.
          num_steps: how many there are in all.
          save_every: steps between two saves; the first and the last state are saved as well.
          show: name of a number beside the progress → name of the metric.
          best: a metric; the step that was saved when it was greatest is kept too.
          first: what the log calls the first step.
          stop: from the lines of the log so far to why the stage ends here, or "". The first
            process asks; what is resumed ends where it would have.

        Returns:
          the state at the end, and the lines of the log.

        Raises:
          CheckpointError: the last step could not be saved, or no saved step can be taken.
          TrainingError: the run cannot go on.
          SystemExit: with `INTERRUPTED`, after saving, when it was asked to stop.
        """
        begin = sharding.init(start, self.mesh)
        like = jax.eval_shape(start, *inputs)
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            like,
            sharding.shardings(like, self.mesh),
        )
        folder = self.out / "checkpoints" / stage
        by = None if best is None else partial(_metric, best)
        known = self.config | {"fingerprint": self.fingerprint}
        with Checkpoints(folder, config=known, keep=self.keep, best=by) as checkpoints:
            restored = checkpoints.restore(like)
            if restored is None:
                done, cursor, state = 0, Cursor(), begin(*inputs)
                checkpoints.save(0, state, cursor=cursor._asdict())
            else:
                done, cursor, state = restored.step, Cursor(**restored.cursor), restored.state
            rows = self.log.rewind(stage, done)
            stopped = self._reason(stop, rows)
            skipped = 0 if restored is None else int(restored.metrics.get(IN_A_ROW, 0))
            compiled = None
            with progress(num_steps, stage, done=done, stream=self._screen) as advance:
                left = 0 if stopped else num_steps - done
                for batch, behind in islice(batches(cursor), left):
                    state, metrics = step(state, batch)
                    row = self.log.write(stage, first + done, metrics)
                    for report in self.reports:
                        report(row)
                    compiled = self.compilations.count if compiled is None else compiled
                    done += 1
                    rows.append(row)
                    skipped = skipped + 1 if row.get("val/num_skipped") else 0
                    self._check(row, skipped, state, batch)
                    advance(**{name: _shown(row[metric]) for name, metric in show.items()})
                    stopped = self._reason(stop, rows)
                    self._calls += 1
                    asked = self._asked_to_stop(self._calls)
                    if asked or stopped or done == num_steps or done % save_every == 0:
                        numbers = {name: x for name, x in row.items() if isinstance(x, float)}
                        numbers[IN_A_ROW] = skipped
                        checkpoints.save(
                            done,
                            state,
                            cursor=behind._asdict(),
                            metrics=numbers,
                            after=self.log.sync,
                        )
                    if asked:
                        checkpoints.wait()
                        if self.is_first:
                            told = f"{self.out}: {stage} is saved at step {done}; --resume goes on"
                            print(told, file=sys.stderr)
                        raise SystemExit(INTERRUPTED)
                    if stopped:
                        break
        if stopped and self.is_first:
            told = f"{self.out}: {stage} ends at step {done} of {num_steps}: {stopped}"
            print(told, file=sys.stderr)
        if stopped or done == num_steps:
            self.log.rewind(stage, done)  # stages in their order, if one went back
        recompilations = self.compilations.count - (compiled or self.compilations.count)
        return Trained(state, rows, recompilations, stopped)

    def _reason(self, stop: Callable[[list[Row]], str] | None, rows: list[Row]) -> str:
        """Why the stage ends here, or "": only the first process has all lines of the log."""
        if stop is None:
            return ""
        why = stop(rows) if self.is_first else ""
        if jax.process_count() == 1:
            return why
        ends = bool(multihost_utils.broadcast_one_to_all(np.bool_(why)))
        return why or "the first process says so" if ends else ""

    def _check(self, row: Row, skipped: int, state: Any, batch: Any) -> None:
        """Stops what would go on for nothing."""
        if row.get("val/num_scored") == 0:
            why = "no sample of the batch has a finite score: look at the reward"
        elif skipped >= MOST_SKIPPED:
            why = (
                f"gradients of {skipped} steps in a row were not finite: lower the learning "
                "rate, clip the gradients, or look at the batch"
            )
        else:
            return
        dump = self.out / "dump"
        try:
            self._dump(dump, row, state, batch)
            where = f"state, batch and metrics are in {dump}"
        except Exception as error:
            where = f"state and batch could not be written to {dump}: {error}"
        raise TrainingError(f"{row['stage']} step {row['step']}: {why}; {where}")

    def _dump(self, folder: Path, row: Row, state: Any, batch: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(folder / "state", checkpoint.flatten(state))
        self.write("dump/row.json", row)
        if self.is_first:
            arrays = checkpoint.flatten({"batch": jax.tree.map(_array, batch)})
            host = {name: np.asarray(x) for name, x in arrays.items()}
            np.savez(folder / "batch.npz", allow_pickle=False, **host)


def _shown(number: Any) -> float:
    """A number of a line of the log, where one that is not finite is None."""
    return math.nan if number is None else number


def _array(x: Any) -> Any:
    """What can be written as an array; of other leaves, such as the text of a prompt, nothing."""
    return x if hasattr(x, "dtype") else None


def _metric(name: str, metrics: Mapping[str, float]) -> float:
    """Where a step has no such number, it is not the best one."""
    return metrics.get(name, -math.inf)


def _lock(directory: Path) -> int:
    """Open as long as the run lasts, so that no other one begins there; a kill ends it too."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise CheckpointError(
            f"{directory}: another run is at work there; wait for its end, or give another one"
        ) from None
    except OSError:  # a file system without locks
        pass
    return handle


def _read(path: Path) -> dict[str, Any]:
    """What it says, or nothing where it cannot be read: every step has the configuration too."""
    try:
        return dict(yaml.safe_load(path.read_bytes()))  # of which JSON is a part
    except (yaml.YAMLError, ValueError, TypeError, OSError):
        warnings.warn(f"{path} was altered and is written anew", stacklevel=5)
        return {}


def _common(config: Any, stored: Any) -> Any:
    """The part of a tree of dictionaries whose names the other one has too."""
    if not isinstance(config, dict) or not isinstance(stored, dict):
        return config
    return {name: _common(x, stored[name]) for name, x in config.items() if name in stored}


def _without(config: Any, names: Collection[str]) -> Any:
    """The tree of dictionaries without these names."""
    if not isinstance(config, dict):
        return config
    return {name: _without(x, names) for name, x in config.items() if name not in names}
