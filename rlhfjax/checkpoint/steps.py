"""The steps of a run on disk: each one durable and whole, or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rlhfjax.checkpoint.digests import digests, flatten, shape_of, unflatten

FORMAT = 1
ARRAYS, RECORD, FILES = "arrays", "record.json", "files.json"
PACKAGES = ("rlhfjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """Of the packages that decide the numbers and the files."""
    return {name: version(name) for name in PACKAGES}


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
    ) -> None:
        """Begins to save a step and returns as soon as the state may be changed.

        A save before it that failed is told in a warning; the training can go on, and the steps
        saved before are still there.

        Args:
          step: its number, greater than that of all steps saved.
          state: any tree of arrays.
          cursor: where the data goes on, as JSON.
          metrics: numbers that `best` may look at.

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
        failed = _on_first_process(lambda: self._make_room(path))
        if failed is None:
            failed = _error_of(
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
        reason = _failure_anywhere(error)
        if reason:
            self._orbax = _orbax()
            if jax.process_index() == 0 and not (self._path(step) / FILES).exists():
                shutil.rmtree(self._path(step), ignore_errors=True)
            last = self.steps()[-1:]
            raise CheckpointError(
                f"{self.directory}: step {step} was not saved: {reason}; "
                + (f"the last step saved is {last[0]}" if last else "no step is saved")
            ) from error

    def restore(self, like: Any) -> Restored | None:
        """The newest step that is as it was saved, to the last bit.

        A later one that is incomplete, altered or of other arrays is refused, with a warning that
        names it, and left as it is.

        Args:
          like: the state's structure, of arrays or of `jax.ShapeDtypeStruct`; its shardings are
            where the arrays go, whatever mesh they were saved from.

        Returns:
          the step, or None where none was ever saved to its end.

        Raises:
          CheckpointError: there are steps and all of them are refused, or they are another run's.
        """
        self.wait()
        self._refused = {}
        broken_off = 0
        found = _as_first_process(self._numbers())
        for step in reversed(found):
            try:
                restored = self._restore(step, like)
            except _Refused as refusal:
                self._refused[step] = str(refusal)
                broken_off += isinstance(refusal, _BrokenOff)
                warnings.warn(f"{self._path(step)}: {refusal}; not taken", stacklevel=2)
            else:
                return restored._replace(refused=dict(self._refused))
        if broken_off == len(found):
            return None
        reasons = "; ".join(f"step {step}: {why}" for step, why in self._refused.items())
        raise CheckpointError(
            f"{self.directory}: none of its steps can be taken: {reasons}; "
            "move the directory away to begin anew"
        )

    def _numbers(self) -> list[int]:
        """Of all folders of steps; of none, where the directory is gone."""
        folders = (p for p in self.directory.glob("*") if p.name.isdecimal() and p.is_dir())
        return sorted(int(folder.name) for folder in folders)

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    def _make_room(self, path: Path) -> None:
        """A step that was refused keeps its files under another name; half a step goes."""
        if not (path / FILES).exists():
            shutil.rmtree(path, ignore_errors=True)
        elif path.exists():
            names = (path.with_name(f"{path.name}.refused{number or ''}") for number in count())
            path.rename(next(name for name in names if not name.exists()))
        path.mkdir()

    def _finish(self, path: Path, record: dict[str, Any], failed: Exception | None) -> None:
        if failed is not None:
            raise failed
        self._orbax.wait_until_finished()
        if jax.process_index() != 0:
            return
        write_json(path / RECORD, record)
        hashes = _hashes(path)
        for folder in (self.directory, path, *(p for p in path.rglob("*") if p.is_dir())):
            _sync(folder)
        write_json(path / FILES, hashes)
        self._refused.pop(record["step"], None)
        error = _error_of(self._prune)
        if error is not None:
            warnings.warn(
                f"{self.directory}: old steps are still there: {_reason(error)}", stacklevel=2
            )

    def _prune(self) -> None:
        saved = self.steps()
        kept = set(saved[-self.keep :])
        if self.best is not None:
            kept.add(max(saved, key=self._goodness))
        for step in set(self._numbers()) - kept - self._refused.keys():
            # Without its list of files a step is none, should the rest of this not be reached.
            (self._path(step) / FILES).unlink(missing_ok=True)
            shutil.rmtree(self._path(step), ignore_errors=True)

    def _goodness(self, step: int) -> float:
        assert self.best is not None
        try:
            return self.best(self._record(step)["metrics"])
        except (OSError, ValueError):  # altered, which is for `restore` to say
            return -math.inf

    def _record(self, step: int) -> dict[str, Any]:
        return json.loads((self._path(step) / RECORD).read_bytes())

    def _restore(self, step: int, like: Any) -> Restored:
        path = self._path(step)
        whole = _as_first_process([int((path / FILES).exists())])
        if whole == [0]:
            raise _BrokenOff("incomplete, its saving was broken off")
        refusal = _on_first_process(lambda: _check_files(path))
        if refusal is not None:
            raise _Refused(_reason(refusal))
        records: list[dict[str, Any]] = []
        unread = _failure_anywhere(_error_of(lambda: records.append(self._record(step))))
        if unread:
            raise _Refused(f"{RECORD} cannot be read: {unread}")
        (record,) = records
        if record.get("format") != FORMAT:
            raise _Refused(
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
        unread = _failure_anywhere(
            _error_of(
                lambda: read.append(
                    self._orbax.restore(path / ARRAYS, args=ocp.args.StandardRestore(abstract))
                )
            )
        )
        if unread:
            raise _Refused(f"cannot be read: {unread}")
        (arrays,) = read
        for name, found in digests(arrays).items():
            if found != record["digests"][name]:
                raise _Refused(f"{name} has the digest {found}, not {record['digests'][name]}")
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
        raise _Refused(", ".join(differ[:8]) + (f" and {len(differ) - 8} more" * (len(differ) > 8)))


def _orbax() -> ocp.AsyncCheckpointer:
    # Folders are made before `save` returns: where that fails, nothing is left waiting for them.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler(), async_options=options)


class _Refused(Exception):
    """A step that is not taken."""


class _BrokenOff(_Refused):
    """A step that was never saved to its end."""


def _error_of(function: Callable[[], Any]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def _on_first_process(function: Callable[[], None]) -> Exception | None:
    """The error of what one process does for all of them, in all of them."""
    error = _error_of(function) if jax.process_index() == 0 else None
    found = _failure_anywhere(error)
    return error or (_Refused(found) if found else None)


def _as_first_process(numbers: list[int]) -> list[int]:
    """What one process sees on the disk, where a network may show the others something older."""
    if jax.process_count() == 1:
        return numbers
    length = multihost_utils.broadcast_one_to_all(np.int32(len(numbers)))
    padded = np.resize(np.array(numbers or [0], np.int32), max(int(length), 1))
    return multihost_utils.broadcast_one_to_all(padded)[: int(length)].tolist()


def _failure_anywhere(error: BaseException | None) -> str:
    """Why the first process failed that did, "" where none did: the same answer in all of them."""
    reason = "" if error is None else _reason(error)
    if jax.process_count() == 1:
        return reason
    text = np.frombuffer(reason.encode()[:500].ljust(500), np.uint8)
    reasons = (
        bytes(row).decode(errors="replace").strip()
        for row in multihost_utils.process_allgather(text)
    )
    return next(filter(None, reasons), "")


def _check_files(path: Path) -> None:
    try:
        listed = json.loads((path / FILES).read_bytes())
    except (OSError, ValueError) as error:
        raise _Refused(f"{FILES} cannot be read: {_reason(error)}") from None
    if not isinstance(listed, dict) or listed.pop("all", None) != _hash_of_list(listed):
        raise _Refused(f"{FILES} was altered")
    found = _hashes(path)
    for name in sorted(listed.keys() | found.keys() - {"all"}):
        if name not in found:
            raise _Refused(f"{name} is missing")
        if name not in listed:
            raise _Refused(f"{name} does not belong to it")
        if found[name] != listed[name]:
            raise _Refused(f"{name} was altered")


def _hashes(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a step, each of them on the disk, and of their list."""

    def hash_of(name: str) -> str:
        with (path / name).open("rb") as file:
            os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    names = [name for name in names if name != FILES]
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(names, pool.map(hash_of, names), strict=True))
    return hashes | {"all": _hash_of_list(hashes)}


def _hash_of_list(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is on the disk, whole and under its name, when this returns.

    Args:
      path: the file, replaced if it exists.
      content: what other than JSON is in it becomes text.
    """
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, default=str)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _reason(error: BaseException) -> str:
    if isinstance(error, _Refused):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
