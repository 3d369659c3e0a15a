"""Where in its data a run is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple


class Cursor(NamedTuple):
    """The next batch to be taken; with the seed, which is part of a run's configuration, all of it.

    Attributes:
      epoch: passes over the data that are done.
      position: batches of this pass that are done.
    """

    epoch: int = 0
    position: int = 0


def batches_from(
    cursor: Cursor, epoch: Callable[[int, int], Iterable[Any]]
) -> Iterator[tuple[Any, Cursor]]:
    """The batches of this pass over the data and of all that follow it.

    Args:
      cursor: where to begin; that of a batch to go on behind it.
      epoch: `(number, start) -> batches`, those of one pass from the batch `start` on.

    Yields:
      a batch, and the cursor behind it.

    Raises:
      ValueError: a pass without a batch.
    """
    for number in count(cursor.epoch):
        start = position = cursor.position if number == cursor.epoch else 0
        for batch in epoch(number, start):
            position += 1
            yield batch, Cursor(number, position)
        if position == 0:
            raise ValueError(f"epoch {number} has no batches: give more data")
