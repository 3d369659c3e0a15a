"""Several texts in a row of a batch, so that little of it is padding.

Texts of a row are told apart by segment ids, from which the model has its attention and positions.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from rlhfjax.data.batches import rows_of_part
from rlhfjax.data.text import DataError
from rlhfjax.data.tokenized import Learned


class PackedBatch(NamedTuple):
    """The arguments of the step of `algorithms.sft` in their order."""

    tokens: np.ndarray  # [B, S] int32
    loss_mask: np.ndarray  # [B, S] bool, to be learned
    attention_mask: np.ndarray  # [B, S] bool
    segment_ids: np.ndarray  # [B, S] int32, the texts of a row are 1, 2, …; 0 at padding


def best_fit(lengths: Sequence[int], *, length: int) -> list[list[int]]:
    """Which texts share a row: the longest first, each to where it leaves the least room.

    Texts of equal length are taken in their order. At most 11/9·n + 1 rows, where the best packing
    has n.

    Args:
      lengths: of the texts, none of them greater than `length`.
      length: of a row.

    Returns:
      The indices of the texts of each row.

    Raises:
      DataError: a text that is empty or longer than a row.

    References:
      Johnson 1973, Near-Optimal Bin Packing Algorithms; Ding et al. 2024, Fewer Truncations Improve
      Language Modeling.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free in each row that is not full, ascending
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = lengths[index]
        if not 1 <= size <= length:
            raise DataError(f"text {index} has {size} tokens, a row holds 1 to {length}")
        place = bisect_left(room, (size, 0))
        free, row = room.pop(place) if place < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        if free > size:
            insort(room, (free - size, row))
    return rows


def packed_batches(
    texts: Sequence[Learned],
    *,
    batch_size: int,
    length: int,
    pad_token: int,
    seed: int,
    epoch: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[PackedBatch]:
    """One epoch of packed rows: every text once, whole, and in rows of other company each epoch.

    Args:
      texts: those of the epoch, none longer than a row: `tokenized.supervised` shortens to
        `max_length=length`, and counts.
      batch_size: B; rows left over are padding throughout.
      length: S.
      pad_token: the id at padded positions.
      seed: with `epoch`, decides the order.
      epoch: counts the passes over the texts.
      start: the batch to begin with, to go on with an epoch that was broken off.
      part: `(index, count)`: of every batch only this one of so many equal parts of its rows.

    Returns:
      An iterator over batches.

    Raises:
      DataError: a text that is empty or longer than a row.
      ValueError: the parts do not divide the batch.
    """
    mine = rows_of_part(batch_size, part)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(texts)).tolist()
    rows = best_fit([len(texts[i].tokens) for i in order], length=length)
    rows = [[order[i] for i in rows[row]] for row in rng.permutation(len(rows))]

    def batch(first: int) -> PackedBatch:
        shape = (mine.stop - mine.start, length)
        tokens, segments = np.full(shape, pad_token, np.int32), np.zeros(shape, np.int32)
        learned = np.zeros(shape, bool)
        for row, members in enumerate(rows[first : first + batch_size][mine]):
            end = 0
            for number, text in enumerate((texts[i] for i in members), start=1):
                begin, end = end, end + len(text.tokens)
                tokens[row, begin:end] = text.tokens
                learned[row, begin:end] = text.learned
                segments[row, begin:end] = number
        return PackedBatch(tokens, learned, segments > 0, segments)

    return (batch(first) for first in range(start * batch_size, len(rows), batch_size))
