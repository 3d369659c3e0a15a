"""Records from files, each with its place; bad ones are told and only so many are left out."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from rlhfjax.data import hub
from rlhfjax.data.text import BYTE_ORDER_MARK, DataError, position

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
NUM_TOLD = 10


class Place(NamedTuple):
    """Where a record stands: a line of a text file, a row of a parquet file; the first is 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Record(NamedTuple):
    """What one record holds by column, and its place."""

    fields: dict[str, Any]
    place: Place


class BadRecords:
    """The records that were left out because something is wrong with them.

    One object may go through the reading of files, of formats and of tokens, and its bound then
    holds for all of it.

    Args:
      max_bad: how many there may be.
      advice: what to do where there are more.

    Attributes:
      found: place and reason of each, in their order.
    """

    def __init__(
        self, max_bad: int = 0, *, advice: str = "correct them, or remove them from the data"
    ) -> None:
        self.max_bad, self.advice = max_bad, advice
        self.found: list[tuple[Place, str]] = []

    def add(self, place: Place, reason: str) -> None:
        """Tells of one more; `check` says whether that is too many.

        Args:
          place: of the record.
          reason: what is wrong with it.
        """
        self.found.append((place, reason))

    def check(self) -> None:
        """Refuses more than `max_bad` of them.

        Raises:
          DataError: with their number, and place and reason of the first ones.
        """
        if len(self.found) > self.max_bad:
            raise DataError(f"{self}\n{self.advice}")

    def __str__(self) -> str:
        first = [f"{place}: {reason}" for place, reason in self.found[:NUM_TOLD]]
        more = [f"and {len(self.found) - NUM_TOLD} more"] if len(self.found) > NUM_TOLD else []
        return "\n  ".join([f"{len(self.found)} bad records:", *first, *more])


def read(path: Path | str, *, pattern: str = "*", bad: BadRecords | None = None) -> list[Record]:
    """Reads a file of records, or every such file of a folder.

    A file is JSON lines (`.jsonl`, `.json`), a JSON array (`.json`), either of them with `.gz`
    behind it, or parquet. A line of white space is no record.

    Args:
      path: the file or the folder, whose other files and folders are ignored.
      pattern: of a folder, only files with such names: `train*` where it holds a test set too.
      bad: takes the records that are not JSON, not an object or not UTF-8; by default the first
        ones are refused.

    Returns:
      The records, files in the order of their names.

    Raises:
      DataError: too many bad records, none that is good, no such file, one of another kind, or one
        that is damaged.
    """
    bad = BadRecords() if bad is None else bad
    records = [record for file in _files(Path(path), pattern) for record in _read(file, bad)]
    bad.check()
    if not records:
        raise DataError(f"{path}: no records; give a file with at least one")
    return records


def renamed(records: Sequence[Record], names: Mapping[str, str]) -> list[Record]:
    """Records whose columns have other names, such as those of `formats`.

    Args:
      records: any.
      names: old name → new name; what a record has under the new name is replaced.

    Returns:
      The records in their order.

    Raises:
      DataError: a column that no record has.
    """
    columns = {column for record in records for column in record.fields}
    if unknown := names.keys() - columns:
        raise DataError(
            f"{files_of(records)}: no column {', '.join(sorted(unknown))} to rename; there are "
            f"{', '.join(sorted(columns))}"
        )
    return [
        record._replace(
            fields={k: v for k, v in record.fields.items() if k not in names}
            | {new: record.fields[old] for old, new in names.items() if old in record.fields}
        )
        for record in records
    ]


def files_of(records: Sequence[Record]) -> str:
    """The file that records are of, for messages; of several the first.

    Args:
      records: any.

    Returns:
      its name, and how many more there are.
    """
    first, *others = dict.fromkeys(record.place.file for record in records) or ["(no file)"]
    return f"{first} and {len(others)} more" if others else first


def held_out(
    records: Sequence[Record], fraction: float, *, salt: str = ""
) -> tuple[list[Record], list[Record]]:
    """Divides records by a hash of each, so that one stays on its side whatever else there is.

    Args:
      records: any.
      fraction: about how many of them are held out, 0 to 1.
      salt: another one gives another division.

    Returns:
      Those to learn from, and those held out, in their order.

    Raises:
      ValueError: the fraction is no such number.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"the fraction that is held out must be between 0 and 1, is {fraction}")
    sides: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        text = json.dumps(record.fields, sort_keys=True, default=str)
        sides[position(text, salt=salt) < fraction].append(record)
    return sides


def _files(path: Path, pattern: str) -> list[Path]:
    kinds = ", ".join(SUFFIXES)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: not a file of records; give one of {kinds}")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder{hub.advice(path, 'dataset')}")
    files = sorted(
        file
        for file in path.iterdir()
        if file.name.endswith(SUFFIXES) and fnmatch(file.name, pattern) and file.is_file()
    )
    if not files:
        raise DataError(f"{path}: no file {pattern} of one of {kinds}")
    return files


def _read(file: Path, bad: BadRecords) -> Iterator[Record]:
    if file.suffix == ".parquet":
        yield from _rows(file)
        return
    line = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            if file.name.endswith((".json", ".json.gz")) and _begins_array(stream.peek(1 << 16)):
                found: Any = _elements(file, stream.read())
            else:
                found = enumerate(stream, start=1)
            for line, content in found:
                place = Place(str(file), line)
                try:
                    if isinstance(content, bytes):
                        content = content.removeprefix(BYTE_ORDER_MARK) if line == 1 else content
                        if not (stripped := content.rstrip()):
                            continue
                        content = _json(stripped)
                    if not isinstance(content, dict):
                        raise ValueError(f"{type(content).__name__}, not an object: {{…}}")
                except ValueError as error:
                    bad.add(place, str(error))
                else:
                    yield Record(content, place)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{file}: damaged behind line {line} ({error}); fetch or write it again"
        ) from error


def _begins_array(start: bytes) -> bool:
    return start.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _elements(file: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """The elements of an array, and the lines at which they begin."""
    content = content.removeprefix(BYTE_ORDER_MARK)
    try:
        elements = _json(content)
    except ValueError as error:
        raise DataError(f"{file}: {error}; behind it an array cannot be read") from error
    text = content.decode()
    # Elements are found a second time, now that nothing but white space and commas is between.
    between, find = re.compile(r"[\s,]*"), json.JSONDecoder().raw_decode
    line, end = 1, text.index("[") + 1
    line += text.count("\n", 0, end)
    for element in elements:
        gap = between.match(text, end)
        assert gap is not None
        line += gap[0].count("\n")
        yield line, element
        start, end = gap.end(), find(text, gap.end())[1]
        line += text.count("\n", start, end)


def _json(content: bytes) -> Any:
    """The value, or a ValueError that says where and why there is none."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise ValueError(f"not UTF-8{_line(line)}, byte {column}") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        where = f"{_line(error.lineno)}, character {error.colno}"
        raise ValueError(f"not JSON{where}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error


def _line(number: int) -> str:
    return f", line {number}" if number > 1 else ""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name}; write null")


def _rows(file: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(
            f"{file}: parquet is read by pyarrow: pip install 'rlhfjax[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Record(row, Place(str(file), number))
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: not a parquet file that can be read ({error})") from error
