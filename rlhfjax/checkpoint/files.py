"""What a folder holds, file by file: written so that it lasts, and known again when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

FILES = "files.json"


class Refused(Exception):
    """A step that is not taken; says why."""


def reason(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, Refused):
        return str(error)
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def names(folder: Path) -> list[str]:
    """The files of a folder, at any depth, but for their list."""
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return [name for name in found if name != FILES]


def hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of files, each of them on the disk.

    Args:
      folder: where they are.
      names: relative to it.

    Returns:
      name → 64 hexadecimal digits.
    """

    def hash_of(name: str) -> str:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(hash_of, names), strict=True))


def seal(folder: Path, hashes: Mapping[str, str]) -> None:
    """Writes the list of a folder's files, when all of it is on the disk.

    With the names in it, its own name is on the disk then; see `make` for those above.

    Args:
      folder: a step.
      hashes: of all its files.

    Raises:
      Refused: these are not the files that are there.
    """
    different = hashes.keys() ^ set(names(folder))
    if different:
        raise Refused(f"{', '.join(sorted(different))} came or went while it was written")
    for path in (folder.parent, folder, *(p for p in folder.rglob("*") if p.is_dir())):
        sync(path)
    write_json(folder / FILES, dict(hashes) | {"all": _hash_of_list(hashes)})


def check(folder: Path, part: slice) -> None:
    """Refuses a folder that is not as it was sealed.

    Args:
      folder: a step.
      part: of its files, in their order, whose content is looked at; that nothing is missing and
        nothing too many is seen for all of them.

    Raises:
      Refused: naming the file.
    """
    try:
        listed = json.loads((folder / FILES).read_bytes())
    except (OSError, ValueError) as error:
        raise Refused(f"{FILES} cannot be read: {reason(error)}") from None
    if not isinstance(listed, dict) or listed.pop("all", None) != _hash_of_list(listed):
        raise Refused(f"{FILES} was altered")
    found = names(folder)
    for name in sorted(listed.keys() | set(found)):
        if name not in found:
            raise Refused(f"{name} is missing")
        if name not in listed:
            raise Refused(f"{name} does not belong to it")
    for name, hash_of_it in hashes(folder, found[part]).items():
        if hash_of_it != listed[name]:
            raise Refused(f"{name} was altered")


def as_json(content: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The content as JSON gives it back; scalars of jax and NumPy are numbers.

    Args:
      content: to be written.
      what: it is, for the error.

    Returns:
      a copy of it.

    Raises:
      TypeError: some of it is no JSON; names it.
    """

    def number(x: Any) -> Any:
        if isinstance(x, jax.Array | np.ndarray | np.generic) and x.ndim == 0:
            return x.item()
        raise TypeError(f"it holds a {type(x).__name__}")

    plain = {}
    for name, value in content.items():
        try:
            plain[name] = json.loads(json.dumps(value, default=number))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what}[{name!r}] is no JSON: {error}") from None
    return plain


def make(directory: Path) -> None:
    """Makes a directory, and those above it, whose names are on the disk when this returns.

    Args:
      directory: may exist.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_text` of JSON.

    Args:
      path: the file.
      content: what other than JSON is in it becomes text.
    """
    write_text(path, json.dumps(content, indent=2, default=str))


def write_text(path: Path, text: str) -> None:
    """Writes a file that is on the disk, whole and under its name, when this returns.

    Args:
      path: the file, replaced if it exists.
      text: its content.
    """
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(directory: Path) -> None:
    """Returns when the names in it are on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _hash_of_list(hashes: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
