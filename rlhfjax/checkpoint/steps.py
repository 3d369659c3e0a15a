"""The steps of a run on disk: each one durable and whole, or not there."""

from __future__ import annotations

import json
import math
import shutil
import warnings
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
from rlhfjax.checkpoint.together import error_of, failure_anywhere

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
      directory: made if it is missing.
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
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self.directory}: {error.strerror}; give a directory that can be written"
            ) from error
        self._refused: dict[int, str] = {}
        self._orbax = _orbax()
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._num_saves = 0

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
            self._orbax.close()

    def steps(self) -> list[int]:
        """The steps that are saved, in their order, but for those that `restore` refused."""
        there = (n for n in self._numbers() if (self._path(n) / FILES).is_file())
        return [n for n in there if n not in self._refused]

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
          ValueError: the step is saved already.
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
            "cursor": dict(cursor),
            "metrics": dict(metrics or {}),
            "config": self.config,
            "versions": versions(),
        }
        path = self._path(step)
        arrays = flatten(state)
        failed = together.on_first(lambda: self._make_room(path, after))
        if failed is None:
            failed = error_of(
                lambda: self._orbax.save(path / ARRAYS, args=ocp.args.StandardSave(arrays))
            )
        self._num_saves += 1
        key = f"{self.directory}:{self._num_saves}"
        self._saving = step, self._background.submit(self._finish, path, record, key, failed)

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
        if why:
            self._orbax = _orbax()
            if jax.process_index() == 0 and not (self._path(step) / FILES).exists():
                shutil.rmtree(self._path(step), ignore_errors=True)
            last = self.steps()[-1:]
            raise CheckpointError(
                f"{self.directory}: step {step} was not saved: {why}; "
                + (f"the last step saved is {last[0]}" if last else "no step is saved")
            ) from error

    def best_step(self) -> int | None:
        """The saved step where `best` is greatest; None without `best`, or without a step."""
        if self.best is None:
            return None
        return max(self.steps(), key=partial(self._goodness, self.best), default=None)

    def restore(self, like: Any, *, step: int | None = None) -> Restored | None:
        """The newest step that is as it was saved, to the last bit.

        A later one that is incomplete, altered or of other arrays is refused, with a warning that
        names it, and left as it is.

        Args:
          like: the state's structure, of arrays or of `jax.ShapeDtypeStruct`; its shardings are
            where the arrays go, whatever mesh they were saved from.
          step: this one and no other, such as `best_step()`.

        Returns:
          the step, or None where none was ever saved to its end.

        Raises:
          CheckpointError: there are steps and all of them are refused, or they are another run's;
            there is no such step.
        """
        self.wait()
        self._refused = {}
        broken_off = 0
        found = together.as_first(self._numbers())
        if step is not None:
            if step not in found:
                raise CheckpointError(f"{self.directory}: there is no step {step}, only {found}")
            found = [step]
        for number in reversed(found):
            try:
                restored = self._restore(number, like)
            except Refused as refusal:
                self._refused[number] = str(refusal)
                broken_off += isinstance(refusal, _BrokenOff)
                warnings.warn(f"{self._path(number)}: {refusal}; not taken", stacklevel=2)
            else:
                return restored._replace(refused=dict(self._refused))
        if step is None and broken_off == len(found):
            return None
        reasons = "; ".join(f"step {number}: {why}" for number, why in self._refused.items())
        advice = "move the directory away to begin anew" if step is None else "take another one"
        raise CheckpointError(f"{self.directory}: nothing can be taken: {reasons}; {advice}")

    def _numbers(self) -> list[int]:
        """Of all folders of steps; of none, where the directory is gone."""
        folders = (p for p in self.directory.glob("*") if p.name.isdecimal() and p.is_dir())
        return sorted(int(folder.name) for folder in folders)

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

    def _finish(
        self, path: Path, record: dict[str, Any], key: str, failed: Exception | None
    ) -> None:
        if failed is not None:
            raise failed
        if jax.process_index() == 0:
            files.write_json(path / RECORD, record)
        self._orbax.wait_until_finished()
        hashes = together.merged_on_first(
            lambda: files.hashes(path, files.names(path)[together.own_part()]), key
        )
        if jax.process_index() != 0:
            return
        files.seal(path, hashes)
        self._refused.pop(record["step"], None)
        error = error_of(self._prune)
        if error is not None:
            warnings.warn(
                f"{self.directory}: old steps are still there: {reason(error)}", stacklevel=2
            )

    def _prune(self) -> None:
        saved = self.steps()
        kept = set(saved[-self.keep :])
        best = self.best_step()
        if best is not None:
            kept.add(best)
        for step in set(self._numbers()) - kept - self._refused.keys():
            # Without its list of files a step is none, should the rest of this not be reached.
            (self._path(step) / FILES).unlink(missing_ok=True)
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _goodness(self, best: Callable[[dict[str, float]], float], step: int) -> float:
        try:
            return best(self._record(step)["metrics"])
        except (OSError, ValueError):  # altered, which is for `restore` to say
            return -math.inf

    def _record(self, step: int) -> dict[str, Any]:
        return json.loads((self._path(step) / RECORD).read_bytes())

    def _restore(self, step: int, like: Any) -> Restored:
        path = self._path(step)
        whole = together.as_first([int((path / FILES).exists())])
        if whole == [0]:
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
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)),
            wanted,
        )
        read: list[dict[str, Any]] = []
        unread = failure_anywhere(
            error_of(
                lambda: read.append(
                    self._orbax.restore(path / ARRAYS, args=ocp.args.StandardRestore(abstract))
                )
            )
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


def _orbax() -> ocp.AsyncCheckpointer:
    # Folders are made before `save` returns: where that fails, nothing is left waiting for them.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)


class _BrokenOff(Refused):
    """A step that was never saved to its end."""
