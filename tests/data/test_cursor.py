"""From any cursor on come the batches that came behind it the first time."""

from collections.abc import Iterator
from itertools import islice

import pytest

from rlhfjax.data.cursor import Cursor, batches_from


def epoch(number: int, start: int) -> Iterator[str]:
    """Two batches in the first epoch, one more in each that follows."""
    yield from [f"{number}.{position}" for position in range(number + 2)][start:]


def test_from_the_beginning() -> None:
    found = list(islice(batches_from(Cursor(), epoch), 6))
    assert [batch for batch, _ in found] == ["0.0", "0.1", "1.0", "1.1", "1.2", "2.0"]
    assert [cursor for _, cursor in found] == [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3), (2, 1)]


def test_from_every_cursor() -> None:
    every = list(islice(batches_from(Cursor(), epoch), 9))
    for number, (_, cursor) in enumerate(every):
        rest = list(islice(batches_from(Cursor(*cursor), epoch), 8 - number))
        assert rest == every[number + 1 :]


def test_data_without_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="epoch 0 has no batches"):
        next(batches_from(Cursor(), lambda number, start: iter(())))
