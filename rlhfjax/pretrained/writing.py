"""Model directories on the disk: safetensors written one tensor at a time, whole or not there."""

from __future__ import annotations

import glob
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from rlhfjax.checkpoint.files import sync
from rlhfjax.pretrained.reading import CONFIG, FLOATING, INDEX, PIECE, SINGLE
from rlhfjax.types import Params

NAMES = {dtype: name for name, dtype in FLOATING.items()}
# Behind the name of a directory: one that is being written, or that was there before.
LEFT = re.compile(r"\.[0-9a-f]{8}(\.old)?")


class Planned(NamedTuple):
    """A tensor to write.

    Attributes:
      name: what it is called in the file.
      dtype: one of `FLOATING`.
      shape: as stored.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path, plan: Sequence[Planned], arrays: Iterable[np.ndarray], *, max_shard_bytes: int
) -> None:
    """Writes one safetensors file, or several and their index where one would grow too large.

    Args:
      folder: that gets them.
      plan: what the arrays are, in their order.
      arrays: taken one at a time; cast to the planned dtype.
      max_shard_bytes: of the tensors in a file; a larger tensor has a file of its own.
    """
    shards: list[list[Planned]] = [[]]
    for tensor in plan:
        size = sum(planned.num_bytes for planned in shards[-1])
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    arrays = iter(arrays)
    if len(shards) == 1:
        write_file(folder / SINGLE, plan, arrays)
        return
    stem, suffix = os.path.splitext(SINGLE)
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        write_file(folder / file, shard, arrays)
        files |= {tensor.name: file for tensor in shard}
    total = sum(tensor.num_bytes for tensor in plan)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(file: Path, plan: Sequence[Planned], arrays: Iterator[np.ndarray]) -> None:
    """Writes one safetensors file.

    Args:
      file: a new one.
      plan: what is in it.
      arrays: of which as many are taken.

    Raises:
      ValueError: an array is not of its planned shape.
    """
    listed: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in plan:
        begin, end = end, end + tensor.num_bytes
        listed[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(listed, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in plan:
            _write_array(opened, next(arrays), tensor)


def _write_array(file: BinaryIO, array: np.ndarray, tensor: Planned) -> None:
    """Some rows at a time, for turned and cast they are copies."""
    if array.shape != tensor.shape:
        raise ValueError(f"{tensor.name} is {array.shape}, not {tensor.shape} as planned")
    rows = np.atleast_1d(array)
    step = max(1, PIECE * len(rows) // max(1, rows.size))
    for start in range(0, len(rows), step):
        piece = np.asarray(rows[start : start + step], tensor.dtype, order="C")
        file.write(piece.reshape(-1).view(np.uint8).data)


@contextmanager
def new_directory(directory: Path, *, overwrite: bool, config: str = CONFIG) -> Iterator[Path]:
    """A folder to fill, which gets its name when all of it is on the disk, or never.

    Args:
      directory: its name to be.
      overwrite: a model directory of that name goes when the new one is there.
      config: the file by which such a directory is known.

    Yields:
      the folder.

    Raises:
      FileExistsError: something else is there, or `overwrite` is False.
    """
    directory = Path(directory).resolve()
    _free(directory, overwrite, config)
    mark = secrets.token_hex(4)
    folder = directory.with_name(f".{directory.name}.{mark}")
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in (*folder.rglob("*"), folder):
            sync(path)
        if directory.exists() and any(directory.iterdir()):
            _free(directory, overwrite, config)
            directory.rename(directory.with_name(f".{directory.name}.{mark}.old"))
        folder.rename(directory)
        sync(directory.parent)
        # The one before, and what was left behind where a process was killed here.
        for path in directory.parent.glob(f".{glob.escape(directory.name)}.*"):
            if LEFT.fullmatch(path.name.removeprefix(f".{directory.name}")):
                shutil.rmtree(path, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _free(directory: Path, overwrite: bool, config: str) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{directory} is there already: give another name, or remove it")
    if not (directory / config).is_file():
        raise FileExistsError(
            f"{directory} is no model directory, for it has no {config}: nothing is overwritten"
        )


def without_bias(head: Params, where: Path | str) -> Params:
    """A head for scores as it is stored: the weights alone.

    Args:
      head: `{"kernel"}`, or with a "bias".
      where: the directory, for messages.

    Returns:
      `{"kernel"}`.

    Raises:
      ValueError: it has a bias, for which the layout has no place.
    """
    if np.any(whole(head.get("bias", np.zeros(())))):
        raise ValueError(
            f"{where}: the head has a bias, and in this layout none has one: train a "
            "`pretrained.score_head`, or set the bias to 0, which shifts every score alike"
        )
    return {name: x for name, x in head.items() if name != "bias"}


def whole(array: Any) -> np.ndarray:
    """All of an array, for all processes, each of which makes the call.

    Args:
      array: wherever it is.

    Returns:
      its values.
    """
    if isinstance(array, Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    # Of a copy: jax keeps what an array that is divided, or on an accelerator, was read as.
    return np.asarray(jnp.copy(array))
