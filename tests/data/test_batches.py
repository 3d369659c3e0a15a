from collections import Counter
from itertools import combinations
from typing import ClassVar

import numpy as np
import pytest

from rlhfjax.data import batches
from rlhfjax.data.batches import bucket_batches, bucket_pair_batches
from rlhfjax.data.text import DataError

RNG = np.random.default_rng(0)
# Distinct first tokens tell the records apart.
SEQUENCES = [
    np.concatenate([[1000 + i], RNG.integers(1, 99, n - 1)])
    for i, n in enumerate(RNG.integers(1, 33, 101))
]
PAIRS = list(zip(SEQUENCES[:50], SEQUENCES[50:100], strict=True))
LENGTHS = (8, 16, 32)


def epoch(*, seed: int = 0, epoch: int = 0) -> list[batches.Padded]:
    return list(
        batches.bucket_batches(
            SEQUENCES, batch_size=8, lengths=LENGTHS, pad_token=0, seed=seed, epoch=epoch
        )
    )


def pair_epoch() -> list[batches.PaddedPair]:
    return list(
        batches.bucket_pair_batches(
            PAIRS, batch_size=8, lengths=LENGTHS, pad_token=0, seed=0, epoch=0
        )
    )


def rows(batch: batches.Padded) -> list[tuple[int, ...]]:
    return [tuple(t[m].tolist()) for t, m in zip(*batch, strict=True) if m.any()]


def test_right_pad_by_hand() -> None:
    tokens, mask = batches.right_pad([[5, 6], [7]], num_rows=3, length=3, pad_token=9)
    assert tokens.tolist() == [[5, 6, 9], [7, 9, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, False], [True, False, False], [False] * 3]
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)


def test_left_pad_by_hand() -> None:
    tokens, mask = batches.left_pad([[5, 6], [7], [1, 2, 3]], length=3, pad_token=9)
    assert tokens.tolist() == [[9, 5, 6], [9, 9, 7], [1, 2, 3]]
    assert mask.tolist() == [[False, True, True], [False, False, True], [True] * 3]
    assert (tokens.dtype, mask.dtype) == (np.int32, np.bool_)


def test_the_mask_marks_tokens_that_equal_the_pad_token() -> None:
    assert batches.left_pad([[0, 0]], length=3, pad_token=0).mask.tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], [2, 3, 4]], "sequence 1 has 3 tokens, there is room for 2"),
        ([[1], []], "sequence 1 is empty"),
        ([[1.5]], "integer token ids"),
        ([[[1]]], "flat sequence"),
    ],
)
def test_left_pad_refuses(prompts: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches.left_pad(prompts, length=2, pad_token=0)


def test_more_sequences_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sequences do not fit into 1 rows"):
        batches.right_pad([[1], [2]], num_rows=1, length=2, pad_token=0)


def test_an_epoch_has_every_sequence_once_to_the_last_token() -> None:
    seen = Counter(row for batch in epoch() for row in rows(batch))
    assert seen == Counter(tuple(s.tolist()) for s in SEQUENCES)


def test_shapes_are_few_and_each_sequence_has_the_least_length_that_holds_it() -> None:
    for tokens, mask in epoch():
        assert tokens.shape == mask.shape == (8, tokens.shape[1])
        least = {1: 8, 9: 16, 17: 32}
        for n in mask.sum(axis=1)[mask.any(axis=1)]:
            assert tokens.shape[1] == max(L for above, L in least.items() if n >= above)


def test_padding_is_on_the_right_and_only_the_last_batch_of_a_length_has_empty_rows() -> None:
    incomplete = Counter()
    for tokens, mask in epoch():
        assert (np.diff(mask.astype(int), axis=1) <= 0).all()
        assert (tokens[~mask] == 0).all()
        incomplete[tokens.shape[1]] += not mask.any(axis=1).all()
    assert max(incomplete.values()) <= 1


def test_seed_and_epoch_decide_the_batches() -> None:
    def contents(**which: int) -> list[list[tuple[int, ...]]]:
        return [rows(batch) for batch in epoch(**which)]

    assert contents(seed=3, epoch=1) == contents(seed=3, epoch=1)
    assert contents(seed=3, epoch=1) != contents(seed=3, epoch=2)
    assert contents(seed=3, epoch=1) != contents(seed=1, epoch=3)
    first, second = ([{*b} for b in contents(epoch=e)] for e in (0, 1))
    assert not any(b in second for b in first), "the same records share a batch every epoch"


def test_lengths_are_mixed_over_the_epoch() -> None:
    order = [tokens.shape[1] for tokens, _ in epoch()]
    assert order != sorted(order)
    assert order != sorted(order, reverse=True)


def test_a_broken_epoch_continues_from_its_plan() -> None:
    sizes = [len(s) for s in SEQUENCES]
    slots = batches.plan(sizes, batch_size=8, lengths=LENGTHS, seed=0, epoch=0)
    for slot, batch in zip(slots[3:], epoch()[3:], strict=True):
        assert rows(batch) == [tuple(SEQUENCES[i].tolist()) for i in slot.indices]


def test_pairs_stay_together_and_share_a_length() -> None:
    seen = Counter()
    for chosen, rejected in pair_epoch():
        assert chosen.tokens.shape == rejected.tokens.shape
        seen.update(zip(rows(chosen), rows(rejected), strict=True))
        longest = np.maximum(chosen.mask.sum(1), rejected.mask.sum(1))
        assert (longest <= chosen.tokens.shape[1]).all()
    assert seen == Counter((tuple(c.tolist()), tuple(r.tolist())) for c, r in PAIRS)


def test_a_sequence_too_long_is_refused_not_cut() -> None:
    with pytest.raises(DataError, match="record 1 has 17 tokens, the longest batch holds 16"):
        batches.bucket_batches(
            [[1], [1] * 17], batch_size=2, lengths=(8, 16), pad_token=0, seed=0, epoch=0
        )


def test_an_empty_sequence_is_refused() -> None:
    where = {"batch_size": 2, "lengths": (8,), "pad_token": 0, "seed": 0, "epoch": 0}
    with pytest.raises(DataError, match="record 1 is empty"):
        batches.bucket_batches([[1], []], **where)
    with pytest.raises(DataError, match="record 0 has an empty side"):
        batches.bucket_pair_batches([([1], [])], **where)


def test_no_records_make_no_batches() -> None:
    assert (
        list(batches.bucket_batches([], batch_size=2, lengths=(8,), pad_token=0, seed=0, epoch=0))
        == []
    )


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 4])
def test_bucket_lengths_are_the_best_of_all(num_buckets: int) -> None:
    lengths = np.random.default_rng(num_buckets).geometric(0.05, 200).clip(1, 64)

    def total(buckets: tuple[int, ...]) -> int:
        return sum(min(b for b in buckets if b >= n) for n in lengths)

    sizes = range(8, 65, 8)
    top = int(-(-lengths.max() // 8) * 8)
    best = min(
        total((*rest, top))
        for k in range(num_buckets)
        for rest in combinations([s for s in sizes if s < top], k)
    )
    found = batches.bucket_lengths(lengths, num_buckets=num_buckets)
    assert len(found) <= num_buckets
    assert found == sorted(set(found))
    assert all(b % 8 == 0 for b in found)
    assert total(tuple(found)) == best


def test_bucket_lengths_by_hand() -> None:
    # One record of 40 cannot pay for a bucket of its own against 99 records of 3 and 99 of 14.
    lengths = [3] * 99 + [14] * 99 + [30] + [40]
    assert batches.bucket_lengths(lengths, num_buckets=3) == [8, 16, 40]
    assert batches.bucket_lengths(lengths, num_buckets=9) == [8, 16, 32, 40]
    assert batches.bucket_lengths([3, 5], num_buckets=2, multiple=1) == [3, 5]


@pytest.mark.parametrize(("lengths", "num_buckets"), [([], 2), ([3], 0)])
def test_bucket_lengths_needs_something_to_choose(lengths: list[int], num_buckets: int) -> None:
    with pytest.raises(ValueError, match="need lengths and a bucket"):
        batches.bucket_lengths(lengths, num_buckets=num_buckets)


class TestGoingOn:
    SEQUENCES: ClassVar = [list(range(1, 2 + i % 7)) for i in range(23)]
    SIZES: ClassVar = {"batch_size": 4, "lengths": [4, 8], "pad_token": 0, "seed": 5, "epoch": 2}

    def test_an_epoch_goes_on_at_any_batch(self) -> None:
        every = list(bucket_batches(self.SEQUENCES, **self.SIZES))
        for start in range(len(every) + 1):
            rest = list(bucket_batches(self.SEQUENCES, **self.SIZES, start=start))
            assert len(rest) == len(every) - start
            for batch, wanted in zip(rest, every[start:], strict=True):
                np.testing.assert_array_equal(batch.tokens, wanted.tokens)

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_parts_put_together_are_the_batch(self, count: int) -> None:
        every = bucket_batches(self.SEQUENCES, **self.SIZES)
        parts = [
            bucket_batches(self.SEQUENCES, **self.SIZES, part=(i, count)) for i in range(count)
        ]
        for batch, *of_batch in zip(every, *parts, strict=True):
            np.testing.assert_array_equal(
                batch.tokens, np.concatenate([p.tokens for p in of_batch])
            )
            np.testing.assert_array_equal(batch.mask, np.concatenate([p.mask for p in of_batch]))

    def test_pairs_go_on_and_part_likewise(self) -> None:
        pairs = [(s, [*s[::-1], 9]) for s in self.SEQUENCES]
        every = list(bucket_pair_batches(pairs, **self.SIZES))[2:]
        parts = [bucket_pair_batches(pairs, **self.SIZES, start=2, part=(i, 2)) for i in (0, 1)]
        for batch, *of_batch in zip(every, *parts, strict=True):
            for side in ("chosen", "rejected"):
                whole = np.concatenate([getattr(part, side).tokens for part in of_batch])
                np.testing.assert_array_equal(getattr(batch, side).tokens, whole)

    def test_parts_that_do_not_divide_a_batch_are_refused(self) -> None:
        with pytest.raises(ValueError, match="4 rows does not divide into 3 parts"):
            bucket_batches(self.SEQUENCES, **self.SIZES, part=(0, 3))


def test_prompts_come_once_before_any_comes_again() -> None:
    prompts = batches.Padded(np.arange(5)[:, None], np.ones((5, 1), bool))
    found = np.concatenate(
        [batches.draw(prompts, 3, iteration=i, seed=1).tokens[:, 0] for i in range(5)]
    )
    assert sorted(found) == sorted([*range(5)] * 3)
    for start in range(0, 15, 5):
        assert sorted(found[start : start + 5]) == list(range(5))
