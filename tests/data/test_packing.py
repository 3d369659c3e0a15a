"""Packed rows: every text whole and once, little padding, segments that tell texts apart."""

from collections import Counter

import numpy as np
import pytest

from rlhfjax.data.packing import best_fit, packed_batches
from rlhfjax.data.text import DataError
from rlhfjax.data.tokenized import Learned

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, 33, 200).tolist()
TEXTS = [Learned([1000 + i] * n, (RNG.random(n) < 0.5).tolist()) for i, n in enumerate(LENGTHS)]
PAD = 9


def epoch(**options):
    given = {"batch_size": 4, "length": 32, "pad_token": PAD, "seed": 0, "epoch": 0}
    return list(packed_batches(TEXTS, **given | options))


def texts_of(batch) -> list[tuple[list[int], list[bool]]]:
    found = []
    for tokens, learned, _, segments in zip(*batch, strict=True):
        for number in range(1, segments.max() + 1):
            found.append(
                (tokens[segments == number].tolist(), learned[segments == number].tolist())
            )
    return found


def test_best_fit_by_hand() -> None:
    # 6 opens a row with 4 left, 5 one with 5 left; 4 fits into the first to the last token, 3 into
    # the second, where 2 fills what is left.
    assert best_fit([2, 6, 3, 5, 4], length=10) == [[1, 4], [3, 2, 0]]
    assert best_fit([4, 4, 4], length=4) == [[0], [1], [2]]
    assert best_fit([], length=4) == []


def test_rows_are_not_too_full_and_nearly_as_few_as_can_be() -> None:
    rows = best_fit(LENGTHS, length=32)
    assert sorted(i for row in rows for i in row) == list(range(len(LENGTHS)))
    assert max(sum(LENGTHS[i] for i in row) for row in rows) <= 32
    assert len(rows) <= 11 / 9 * -(-sum(LENGTHS) // 32) + 1


def test_every_text_once_and_whole() -> None:
    batches = epoch()
    seen = [text for batch in batches for text in texts_of(batch)]
    assert sorted(seen) == sorted((text.tokens, text.learned) for text in TEXTS)
    assert sum(batch.attention_mask.sum() for batch in batches) == sum(LENGTHS)


def test_segments_are_numbered_from_1_and_0_is_padding() -> None:
    for tokens, loss_mask, attention_mask, segments in epoch():
        assert segments.dtype == np.int32
        np.testing.assert_array_equal(attention_mask, segments > 0)
        assert (tokens[segments == 0] == PAD).all()
        assert not loss_mask[segments == 0].any()
        for row in segments:
            # 1, 2, … in their order, padding behind them.
            steps = np.diff(np.concatenate([row, [0]]))
            assert set(steps[row > 0]) <= {0, 1, -row.max()}
            assert row[0] == (row.max() > 0)


def test_every_epoch_has_an_order_and_a_company_of_its_own() -> None:
    def company(batches) -> set[frozenset[int]]:
        return {frozenset(row[mask].tolist()) for b in batches for row, mask in zip(b[0], b[2])}  # noqa: B905

    assert [b.tokens.tolist() for b in epoch()] == [b.tokens.tolist() for b in epoch()]
    assert len(company(epoch()) & company(epoch(epoch=1))) < len(company(epoch())) / 2
    assert Counter(len(r) for r in company(epoch())) != {1: len(TEXTS)}


def test_from_any_batch_on_and_in_parts() -> None:
    whole, late = epoch(), epoch(start=3)
    halves = [epoch(part=(index, 2)) for index in range(2)]
    assert len(late) == len(whole) - 3
    for number, batch in enumerate(whole):
        for array, *both in zip(batch, *(half[number] for half in halves), strict=True):
            np.testing.assert_array_equal(array, np.concatenate(both))
        if number >= 3:
            for array, again in zip(batch, late[number - 3], strict=True):
                np.testing.assert_array_equal(array, again)


@pytest.mark.parametrize("size", [0, 33])
def test_a_text_that_is_empty_or_longer_than_a_row_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=rf"text 1 has {size} tokens, a row holds 1 to 32"):
        best_fit([3, size], length=32)
