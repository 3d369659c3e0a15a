"""The steps of a run on disk: each one durable and whole, or not there."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections import ChainMap
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp

from rlhfjax.checkpoint import files, together
from rlhfjax.checkpoint.digests import digests, flatten, shape_of, unflatten
from rlhfjax.checkpoint.files import FILES, Refused, reason
from rlhfjax.checkpoint.parameters import abstract
from rlhfjax.checkpoint.together import error_of, failure_anywhere, from_first

FORMAT = 1
ARRAYS, RECORD = "arrays", "record.json"
PACKAGES = (
    "rlhfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers",
    "scikit-learn",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers and the files, as far as they are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


class CheckpointError(Exception):
    """A step that could not be saved or must not be restored; says which, why and what to do."""


class Restored(NamedTuple):
    """What a step held.

    Attributes:
      step: its number.
      state: the tree of arrays.
      cursor: where the data goes on.
      metrics: as they were given to `save`.
      versions: of the packages that wrote it.
      refused: later steps that were not taken, and why.
    """

    step: int
    state: Any
    cursor: dict[str, Any]
    metrics: dict[str, float]
    versions: dict[str, str]
    refused: dict[int, str]


class Checkpoints:
    """A folder with a folder for each step, which is saved while the training goes on.

        with Checkpoints(out / "checkpoints", config=config, keep=2) as checkpoints:
            restored = checkpoints.restore(state)
            ...
            checkpoints.save(step, state, cursor={"epoch": 1, "position": 20})

    A step holds the arrays as Orbax writes them, `record.json` with a digest of every array and
    all that is not an array, and `files.json`, written last and when all else is on the disk,
    with a hash of every file. A step counts as saved from then on. With several processes every
    one makes the same calls, on a directory that all of them see.

    Args:
      directory: made if it is missing, with those above it, for good.
      config: what decides the numbers of the run, as JSON; a step of another run is refused.
      keep: how many of the last steps to keep.
      best: `metrics -> number`; the step where it is greatest is kept as well.

    Raises:
      CheckpointError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        config: Mapping[str, Any],
        keep: int = 2,
        best: Callable[[dict[str, float]], float] | None = None,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.config = json.loads(json.dumps(dict(config), default=str))
        self.keep, self.best = keep, best
        try:
            files.make(self.directory)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: {error.strerror}; give a directory that can be written"
            ) from error
        self._refused: dict[int, str] = {}
        self._orbax = self._new_orbax()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._exchange: together.Exchange  # of the save that goes on

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._background.shutdown()
            error_of(self._orbax.close)  # what it has to say, `wait` has said

    def steps(self) -> list[int]:
        """The steps that are saved, in their order, but for those that `restore` refused."""
        return from_first(self._saved)

    def save(
        self,
        step: int,
        state: Any,
        *,
        cursor: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        """Begins to save a step and returns as soon as the state may be changed.

        A save before it that failed is told in a warning; the training can go on, and the steps
        saved before are still there.

        Args:
          step: its number, greater than that of all steps saved.
          state: any tree of arrays.
          cursor: where the data goes on, as JSON.
          metrics: numbers that `best` may look at.
          after: what the step must not be saved without, called by the first process; where it
            fails, so does the save.

        Raises:
          ValueError: the step is saved already, or two arrays have one name.
          TypeError: what is no JSON; jax's and NumPy's scalars are numbers.
        """
        try:
            self.wait()
        except CheckpointError as error:
            warnings.warn(f"{error}; training goes on", stacklevel=2)
        if step in self.steps():
            raise ValueError(f"{self._path(step)} is saved already: number steps on")
        record = {
            "format": FORMAT,
            "step": step,
            "digests": digests(state),
            "cursor": files.as_json(cursor, "cursor"),
            "metrics": files.as_json(metrics or {}, "metrics"),
            "config": self.config,
            "versions": versions(),
        }
        path = self._path(step)
        arrays = flatten(state)
        self._exchange = together.Exchange()
        failed = together.on_first(lambda: self._make_room(path, after))
        if failed is None:
            failed = error_of(
                lambda: self._orbax.save(path / ARRAYS, args=ocp.args.StandardSave(arrays))
            )
        self._saving = step, self._background.submit(self._finish, path, record, failed)

    def wait(self) -> None:
        """Returns when the last step is saved.

        Raises:
          CheckpointError: it was not; what was there of it is removed.
        """
        if self._saving is None:
            return
        (step, saving), self._saving = self._saving, None
        error = saving.exception()
        why = failure_anywhere(error)
        self._exchange.close()
        if why:
            self._orbax = self._new_orbax()
            if jax.process_index() == 0 and not (self._path(step) / FILES).exists():
                shutil.rmtree(self._path(step), ignore_errors=True)
            last = self.steps()[-1:]
            raise CheckpointError(
                f"{self.directory}: step {step} was not saved: {why}; "
                + (f"the last step saved is {last[0]}" if last else "no step is saved")
            ) from error

    def best_step(self) -> int | None:
        """The saved step where `best` is greatest; None without `best`, or without a step."""
        return next(iter(from_first(self._best)), None)

    def restore(self, like: Any, *, step: int | None = None) -> Restored | None:
        """The newest step that is as it was saved, to the last bit.

        A later one that is incomplete, altered or of other arrays is refused, with a warning that
        names it, and left as it is.

        Args:
          like: the state's structure, of arrays or of `jax.ShapeDtypeStruct`; its shardings are
            where the arrays go, whatever mesh they were saved from; by default where jax makes
            new ones.
          step: this one and no other, such as `best_step()`.

        Returns:
          the step, or None where none was ever saved to its end.

        Raises:
          CheckpointError: there are steps and all of them are refused, or they are another run's;
            there is no such step.
        """
        self.wait()
        refused: dict[int, str] = {}
        broken_off = 0
        found = from_first(self._numbers)
        chosen = from_first(lambda: [] if step is None else [step])
        if chosen:
            if chosen[0] not in found:
                raise CheckpointError(
                    f"{self.directory}: there is no step {chosen[0]}, only {found}"
                )
            found = chosen
        for number in reversed(found):
            try:
                restored = self._restore(number, like)
            except Refused as refusal:
                refused[number] = self._refused[number] = str(refusal)
                broken_off += isinstance(refusal, _BrokenOff)
                warnings.warn(f"{self._path(number)}: {refusal}; not taken", stacklevel=2)
            else:
                self._refused.pop(number, None)
                return restored._replace(refused=refused)
        if not chosen and broken_off == len(found):
            return None
        reasons = "; ".join(f"step {number}: {why}" for number, why in refused.items())
        advice = "move the directory away to begin anew" if not chosen else "take another one"
        raise CheckpointError(f"{self.directory}: nothing can be taken: {reasons}; {advice}")

    def _numbers(self) -> list[int]:
        """Of all folders of steps; of none, where the directory is gone."""
        folders = (p for p in self.directory.glob("*") if p.name.isdecimal() and p.is_dir())
        return sorted(int(folder.name) for folder in folders)

    def _saved(self) -> list[int]:
        there = (n for n in self._numbers() if (self._path(n) / FILES).is_file())
        return [n for n in there if n not in self._refused]

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _make_room(self, path: Path, after: Callable[[], None] | None) -> None:
        """A step that was refused keeps its files under another name; half a step goes."""
        if after is not None:
            after()
        if not (path / FILES).exists():
            shutil.rmtree(path, ignore_errors=True)
        elif path.exists():
            names = (path.with_name(f"{path.name}.refused{number or ''}") for number in count())
            path.rename(next(name for name in names if not name.exists()))
        path.mkdir()

    def _finish(self, path: Path, record: dict[str, Any], failed: Exception | None) -> None:
        is_first = jax.process_index() == 0
        try:
            if failed is not None:
                raise failed
            try:
                if is_first:
                    files.write_json(path / RECORD, record)
            finally:  # Before the folder may be removed.
                self._orbax.wait_until_finished()
            # One of them says what there is: a network may show the others less, or more.
            names = self._exchange.tell(files.names(path) if is_first else [])[0]
            parts = self._exchange.tell(files.hashes(path, names[together.own_part()]))
            if is_first:
                files.seal(path, dict(ChainMap(*parts)))
            self._exchange.tell()
        except Exception as error:
            self._exchange.fail(error)
            raise
        self._refused.pop(record["step"], None)
        left = error_of(self._prune) if is_first else None
        if left is not None:
            warnings.warn(
                f"{self.directory}: old steps are still there: {reason(left)}", stacklevel=2
            )

    def _new_orbax(self) -> ocp.AsyncCheckpointer:
        options = ocp.options.AsyncOptions(
            # Before `save` returns: where it fails, nothing is left waiting for folders.
            create_directories_asynchronously=False,
            # Orbax's own would not end, for 20 minutes, where one process could not write.
            barrier_sync_fn=lambda **_: self._exchange.tell(),
        )
        return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)

    def _prune(self) -> None:
        kept = {*self._saved()[-self.keep :], *self._best()}
        for step in set(self._numbers()) - kept - self._refused.keys():
            # Without its list of files a step is none, should the rest of this not be reached.
            (self._path(step) / FILES).unlink(missing_ok=True)
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _best(self) -> list[int]:
        """The best step, if there is one."""
        if self.best is None:
            return []
        return sorted(self._saved(), key=partial(self._goodness, self.best), reverse=True)[:1]

    def _goodness(self, best: Callable[[dict[str, float]], float], step: int) -> float:
        try:
            goodness = best(self._record(step)["metrics"])
        except (OSError, ValueError):  # altered, which is for `restore` to say
            return -math.inf
        return -math.inf if math.isnan(goodness) else goodness

    def _record(self, step: int) -> dict[str, Any]:
        return json.loads((self._path(step) / RECORD).read_bytes())

    def _restore(self, step: int, like: Any) -> Restored:
        path = self._path(step)
        if from_first(lambda: [int((path / FILES).exists())]) == [0]:
            raise _BrokenOff("incomplete, its saving was broken off")
        altered = failure_anywhere(error_of(lambda: files.check(path, together.own_part())))
        if altered:
            raise Refused(altered)
        records: list[dict[str, Any]] = []
        unread = failure_anywhere(error_of(lambda: records.append(self._record(step))))
        if unread:
            raise Refused(f"{RECORD} cannot be read: {unread}")
        (record,) = records
        if record.get("format") != FORMAT:
            raise Refused(
                f"format {record.get('format')}, this version reads {FORMAT}: restore it with "
                f"rlhfjax {record.get('versions', {}).get('rlhfjax', 'of an older version')}"
            )
        same_config(self.directory, record["config"], self.config)
        wanted = flatten(like)
        _check_shapes(record["digests"], wanted)
        places = abstract(wanted)
        read: list[dict[str, Any]] = []
        # Its handler alone: in a barrier of Orbax's own it would miss a process that cannot read.
        handler, args = self._orbax.handler, ocp.args.StandardRestore(places)
        unread = failure_anywhere(
            error_of(lambda: read.append(handler.restore(path / ARRAYS, args=args)))
        )
        if unread:
            raise Refused(f"cannot be read: {unread}")
        (arrays,) = read
        for name, found in digests(arrays).items():
            if found != record["digests"][name]:
                raise Refused(f"{name} has the digest {found}, not {record['digests'][name]}")
        return Restored(
            step,
            unflatten(arrays, like),
            record["cursor"],
            record["metrics"],
            record["versions"],
            {},
        )


def same_config(directory: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuses to go on with another run.

    Args:
      directory: whose the stored one is.
      stored: the configuration there, as JSON.
      config: that of this run.

    Raises:
      CheckpointError: they differ; it names every number that does.
    """
    there, here = _flat(stored), _flat(config)
    differ = [
        f"{name} is {there.get(name, 'missing')!r} there, {here.get(name, 'missing')!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name, "missing") != here.get(name, "missing")
    ]
    if differ:
        raise CheckpointError(
            f"{directory} belongs to another run: {'; '.join(differ)}; go on with its own "
            "configuration, or give another directory"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat


def _check_shapes(stored: Mapping[str, str], wanted: Mapping[str, Any]) -> None:
    there = {name: text.rsplit(" ", 1)[0] for name, text in stored.items()}
    here = {name: shape_of(array) for name, array in wanted.items()}
    gone = "missing"
    differ = [
        f"{name} is {there.get(name, gone)} in the step, {here.get(name, gone)} in the run"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    if differ:
        raise Refused(", ".join(differ[:8]) + (f" and {len(differ) - 8} more" * (len(differ) > 8)))


class _BrokenOff(Refused):
    """A step that was never saved to its end."""
