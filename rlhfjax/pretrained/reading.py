"""Files of a model directory, none of them trusted: safetensors read one tensor at a time.

The format is eight bytes with the length of a header, the header as JSON, and the numbers.  It is
read here rather than through the library of its name, which maps whole files into memory, tells no
offsets, and seldom says which tensor of which file it refuses; the tests hold the two together.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rlhfjax.data import hub
from rlhfjax.pretrained.tensors import Entry

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATING = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# Of what an ignored tensor may be as well, in bytes.
SIZES = {name: dtype.itemsize for name, dtype in FLOATING.items()} | {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "U32": 4,
    "I32": 4, "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
LONGEST_HEADER = 100_000_000
PIECE = 1 << 20


class DirectoryError(ValueError):
    """A model directory that cannot be used; says which file and tensor, why, and what to do."""


class Stored(NamedTuple):
    """A tensor that is in a file and has not been read.

    Attributes:
      file: where it is.
      name: what it is called there.
      dtype: as the format calls it, such as "BF16".
      shape: as stored.
      begin: the place of its first byte in the file.
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int


def json_of(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      file: in UTF-8.

    Returns:
      the parsed object.

    Raises:
      DirectoryError: there is no such file, or something else is in it.
    """
    if not file.is_file():
        raise DirectoryError(f"{file}: no such file; is {file.parent} a model directory?")
    return parsed(file, file.read_bytes())


def parsed(file: Path | str, content: bytes) -> dict[str, Any]:
    """`json_of` a file that is in memory."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise DirectoryError(f"{file}: {name} is there twice")
            found[name] = value
        return found

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    except DirectoryError:
        raise
    except (ValueError, RecursionError) as error:
        raise DirectoryError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DirectoryError(f"{file}: holds no JSON object")
    return value


def config(directory: Path) -> dict[str, Any]:
    """The parsed `config.json`.

    Args:
      directory: of the model.

    Returns:
      the parsed object.

    Raises:
      DirectoryError: it is not there or cannot be read, or asks for code that comes with the model.
    """
    file = directory / CONFIG
    if not directory.exists():
        raise DirectoryError(f"{directory}: no such directory{hub.advice(directory, 'model')}")
    found = json_of(file)
    if "auto_map" in found:
        raise DirectoryError(
            f"{file}: auto_map asks for code that comes with the model, and such code is never run"
        )
    return found


def tensors(directory: Path) -> dict[str, Stored]:
    """What is in the safetensors of a directory, in one file or in those that an index names.

    Args:
      directory: of the model; its files may be symbolic links, as in a cache of downloads.

    Returns:
      name → tensor, none of them read.

    Raises:
      DirectoryError: naming the file, and the tensor where it is one that is wrong.
    """
    if (directory / SINGLE).is_file():
        return header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise DirectoryError(f"{directory}: {_why_no_tensors(directory)}")
    index = directory / INDEX
    files = json_of(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise DirectoryError(f"{index}: weight_map says for no tensor where it is")
    for name, file in files.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise DirectoryError(
                f"{index}: {name} is said to be in {file!r}, which is not the name of a "
                "safetensors file in this directory"
            )
    found: dict[str, Stored] = {}
    for file in sorted(set(files.values())):
        if not (directory / file).is_file():
            raise DirectoryError(f"{directory / file}: no such file, though {INDEX} names it")
        for name, tensor in header(directory / file).items():
            if name in found:
                raise DirectoryError(f"{tensor.file}: {name} is in {found[name].file.name} too")
            found[name] = tensor
    for name, file in files.items():
        if name not in found or found[name].file.name != file:
            raise DirectoryError(f"{directory / file}: {name} is missing, though {INDEX} names it")
    return found


def header(file: Path) -> dict[str, Stored]:
    """What is in a safetensors file, which is checked from its first byte to its last.

    Args:
      file: the file.

    Returns:
      name → tensor, in the order of the file.

    Raises:
      DirectoryError: it is no such file, it ends early, or its tensors overlap, leave gaps, or are
        of other sizes than their shapes.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise DirectoryError(
                f"{file}: its header should have {length} bytes and the file has {size}: it was "
                "cut off or is no safetensors file; download it again"
            )
        text = opened.read(length)
    if not text.startswith(b"{"):
        raise DirectoryError(f"{file}: it begins with no header and is no safetensors file")
    listed = parsed(file, text)
    listed.pop("__metadata__", None)
    start = 8 + length
    found = {name: _stored(file, name, entry, start) for name, entry in listed.items()}
    in_order = sorted(found.values(), key=lambda tensor: (tensor.begin, num_bytes(tensor)))
    end, before = start, "the header"
    for tensor in in_order:
        if tensor.begin != end:
            wrong = "overlaps" if tensor.begin < end else "leaves a gap after"
            raise DirectoryError(f"{file}: {tensor.name} {wrong} {before}")
        end, before = end + num_bytes(tensor), tensor.name
        if end > size:
            raise DirectoryError(
                f"{file}: {tensor.name} ends at byte {end}, and the file at {size}: it was cut "
                "off; download it again"
            )
    if end != size:
        raise DirectoryError(f"{file}: {size - end} bytes after {before} belong to no tensor")
    return {tensor.name: tensor for tensor in in_order}


def num_bytes(tensor: Stored) -> int:
    """The size of a tensor in its file."""
    return math.prod(tensor.shape) * SIZES[tensor.dtype]


def read(tensor: Stored, dtype: DTypeLike) -> np.ndarray:
    """The numbers of a tensor, and no more memory than they and a piece of what is cast take.

    Args:
      tensor: of a floating dtype.
      dtype: of the result.

    Returns:
      an array of the tensor's shape.

    Raises:
      DirectoryError: the file has become shorter.
    """
    result = np.empty(tensor.shape, dtype)
    flat = result.reshape(-1)
    stored = FLOATING[tensor.dtype]
    with tensor.file.open("rb", buffering=0) as file:
        file.seek(tensor.begin)
        if stored == flat.dtype:
            _fill(file, flat, tensor)
            return result
        piece = np.empty(min(PIECE, flat.size), stored)
        for start in range(0, flat.size, PIECE):
            part = piece[: flat.size - start]
            _fill(file, part, tensor)
            flat[start : start + len(part)] = part
    return result


def claim(
    entries: Sequence[Entry], stored: Mapping[str, Stored], ignored: Sequence[str], where: Path
) -> dict[str, Stored]:
    """Finds the tensors that parameters are made of, all of them before one is read.

    Args:
      entries: the parameters.
      stored: what there is; the first part of all names may be left out, as in GPT-2's own files.
      ignored: regular expressions of whole names that no parameter needs.
      where: the directory, for messages.

    Returns:
      name in `entries` → tensor.

    Raises:
      DirectoryError: one is missing, of another shape, not floating, or nobody's.
    """
    claimed: dict[str, Stored] = {}
    for entry in entries:
        for name, shape in zip(entry.names, entry.shapes, strict=True):
            tensor = stored.get(name) or stored.get(name.partition(".")[2])
            if tensor is None:
                raise DirectoryError(f"{where}: {name} is missing in {_files(stored)}")
            if tensor.shape != shape:
                raise DirectoryError(
                    f"{tensor.file}: {name} has the shape {list(tensor.shape)}, and {CONFIG} says "
                    f"{list(shape)}"
                )
            if tensor.dtype not in FLOATING:
                raise DirectoryError(
                    f"{tensor.file}: {name} is {tensor.dtype}, as in a quantised model, which "
                    "cannot be trained; take the model in one of " + ", ".join(FLOATING)
                )
            claimed[name] = tensor
    taken = {tensor.name for tensor in claimed.values()}
    for name, tensor in stored.items():
        if name not in taken and not any(re.fullmatch(pattern, name) for pattern in ignored):
            raise DirectoryError(
                f"{tensor.file}: {name} belongs to no parameter of the model that {CONFIG} names"
            )
    return claimed


def _files(stored: Mapping[str, Stored]) -> str:
    return ", ".join(sorted({tensor.file.name for tensor in stored.values()})) or "an empty file"


def _why_no_tensors(directory: Path) -> str:
    if not directory.is_dir():
        return "no such directory"
    pickles = sorted(
        path.name for path in directory.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}
    )
    if not pickles:
        return f"neither {SINGLE} nor {INDEX} is in it"
    return (
        f"{pickles[0]} is a pickle, which may run any code when it is read and never is read here; "
        f"convert it where you trust it: AutoModelForCausalLM.from_pretrained(…)"
        ".save_pretrained(…) of transformers writes safetensors"
    )


def _stored(file: Path, name: str, entry: Any, start: int) -> Stored:
    def number(x: Any) -> bool:
        return type(x) is int and x >= 0

    entry = entry if isinstance(entry, dict) else {}
    dtype, shape, place = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    lists = isinstance(shape, list) and isinstance(place, list) and len(place) == 2
    if not lists or not all(map(number, [*shape, *place])):
        raise DirectoryError(f"{file}: {name} has no shape and place that can be read")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise DirectoryError(f"{file}: {name} is of dtype {dtype!r}, which cannot be read")
    tensor = Stored(file, name, dtype, tuple(shape), start + place[0])
    if place[1] - place[0] != num_bytes(tensor):
        raise DirectoryError(
            f"{file}: {name} has {place[1] - place[0]} bytes, and {dtype}{shape} takes "
            f"{num_bytes(tensor)}"
        )
    return tensor


def _fill(file: BinaryIO, flat: np.ndarray, tensor: Stored) -> None:
    rest = flat.view(np.uint8).data
    while rest:
        count = file.readinto(rest)  # type: ignore[attr-defined]
        if not count:
            raise DirectoryError(f"{tensor.file}: {tensor.name} was cut off while it was read")
        rest = rest[count:]
