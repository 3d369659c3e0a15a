"""Labelled text: reading a folder of it, and splitting it by a hash of each text."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
HASH_BYTES = 8


class DataError(ValueError):
    """Input data that cannot be used; the message says where, what, and what to do."""


class LabelledText(NamedTuple):
    """One text and whether people like it (`label` True: preferred)."""

    text: str
    label: bool


def read_labelled(directory: Path) -> list[LabelledText]:
    """Reads every `*.pos` and `*.neg` file of a folder, one text a line.

    Lines end at a line feed and nowhere else. White space around a text, a carriage return
    included, and a byte order mark are dropped; the last line may lack its line feed.

    Args:
      directory: the folder; other files in it are ignored.

    Returns:
      All texts, files in the order of their names; `*.pos` gives label True, `*.neg` False.

    Raises:
      DataError: no such folder, no file of either kind, an empty file, an empty line, or bytes
        that are not UTF-8.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: not a folder; name one that holds *.pos and *.neg files")
    texts = []
    for suffix, label in ((".pos", True), (".neg", False)):
        files = sorted(p for p in directory.iterdir() if p.suffix == suffix and p.is_file())
        if not files:
            raise DataError(
                f"{directory}: no *{suffix} file; add one with a "
                f"{'preferred' if label else 'rejected'} text on each line"
            )
        texts += [LabelledText(line, label) for file in files for line in _read_lines(file)]
    return texts


def _read_lines(file: Path) -> list[str]:
    content = file.read_bytes().removeprefix(BYTE_ORDER_MARK)
    if not content:
        raise DataError(f"{file}: empty file; put one text on each line, or remove it")
    lines = []
    for number, raw in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file}:{number}: byte {error.start + 1} of the line is not UTF-8; "
                "save the file as UTF-8"
            ) from error
        if not line:
            raise DataError(f"{file}:{number}: empty line; remove it or put a text there")
        lines.append(line)
    return lines


def fingerprint(texts: Iterable[LabelledText]) -> str:
    """What tells one corpus from another.

    Args:
      texts: in their order.

    Returns:
      a SHA-256 in hexadecimal.
    """
    return hashlib.sha256(repr([tuple(text) for text in texts]).encode()).hexdigest()


def split_by_hash(
    texts: Iterable[LabelledText], fractions: Mapping[str, float], *, salt: str = ""
) -> dict[str, list[LabelledText]]:
    """Splits texts by a hash of their content, so that no text is in two splits.

    The hash is a position in [0, 1); each split owns an interval whose length is its fraction.
    A text stays in its split whatever the order of the input and whatever is added to it. Equal
    texts count once, with the label that most of them carry; a text with as many labels of
    either kind says nothing and is left out.

    Args:
      texts: in any order.
      fractions: name of a split → its share, positive, in the order of the intervals; they sum
        to 1.
      salt: another salt gives another, independent split.

    Returns:
      Name → texts in the order of their hash, a fixed shuffle.

    Raises:
      ValueError: fractions that are not positive or do not sum to 1.
    """
    if not all(f > 0 for f in fractions.values()) or not math.isclose(sum(fractions.values()), 1):
        raise ValueError(f"fractions must be positive and sum to 1, got {dict(fractions)}")
    votes: Counter[str] = Counter()
    for text, label in texts:
        votes[text] += 1 if label else -1
    names = list(fractions)
    ends = [sum(list(fractions.values())[: i + 1]) for i in range(len(names))]
    ends[-1] = 1.0
    splits: dict[str, list[LabelledText]] = {name: [] for name in names}
    for place, text in sorted((position(text, salt=salt), text) for text in votes):
        if votes[text]:
            name = next(n for n, end in zip(names, ends, strict=True) if place < end)
            splits[name].append(LabelledText(text, votes[text] > 0))
    return splits


def position(text: str, *, salt: str = "") -> float:
    """Where a text stands by its hash, whatever else there is.

    Args:
      text: anything.
      salt: another one gives another, independent place.

    Returns:
      a number in [0, 1).
    """
    # The first 53 bits of the hash, so that the quotient is exact and below 1.
    digest = hashlib.blake2b(f"{salt}\0{text}".encode(), digest_size=HASH_BYTES).digest()
    return (int.from_bytes(digest) >> 11) / 2**53
