"""Batches by hand, every example once an epoch, and the same batches from any of them on."""

from collections import Counter
from functools import partial
from itertools import islice

import numpy as np
import pytest

from rlhfjax.data import example_batches, mixture
from rlhfjax.data.example_batches import Shape, prompt_batches, response_batches, supervised_batches
from rlhfjax.data.formats import Pair, Prompt, Ranking, Rating, Unpaired
from rlhfjax.data.text import DataError
from rlhfjax.data.tokenized import Learned, Tokenized

PAD = 9
RNG = np.random.default_rng(0)


def pair(prompt: list[int], chosen: list[int], rejected: list[int]) -> Tokenized:
    return Tokenized(Pair(prompt="", chosen="", rejected="x"), prompt, (chosen, rejected))


PAIRS = [
    pair([1000 + i] * p, [1] * c, [2] * r)
    for i, (p, c, r) in enumerate(RNG.integers(1, 20, (50, 3)))
]
SHAPES = example_batches.shapes(PAIRS, num_buckets=3, multiple=4)


def epoch(**options):
    given = {"batch_size": 4, "shapes": SHAPES, "pad_token": PAD, "seed": 0, "epoch": 0}
    return list(response_batches(PAIRS, **given | options))


def single(items: list[Tokenized], shape: Shape, batch_size: int):
    (batch,) = response_batches(
        items, batch_size=batch_size, shapes=[shape], pad_token=PAD, seed=0, epoch=0
    )
    return batch


class TestResponses:
    def test_pairs_by_hand(self) -> None:
        batch = single([pair([5, 6], [1], [2, 3])], Shape(3, 2), 2).pairs
        assert batch.prompts.tolist() == [[PAD, 5, 6], [PAD] * 3]
        assert batch.prompt_mask.tolist() == [[False, True, True], [False] * 3]
        assert batch.chosen.tolist() == [[1, PAD], [PAD] * 2]
        assert batch.chosen_mask.tolist() == [[True, False], [False] * 2]
        assert batch.rejected.tolist() == [[2, 3], [PAD] * 2]
        assert batch.rejected_mask.tolist() == [[True, True], [False] * 2]
        assert batch.pairs.tolist() == [True, False]

    def test_rankings_by_hand(self) -> None:
        three = Ranking(prompt="", completions=("a", "b", "c"), ranks=(0, 1, 1))
        two = Ranking(prompt="", completions=("a", "b"), ranks=(0, 1))
        items = [Tokenized(three, [5], ([1], [2], [3, 3])), Tokenized(two, [6, 6], ([1], [2]))]
        batch = single(items, Shape(2, 2), 3)
        rows = {int(row.max()): i for i, row in enumerate(batch.prompts * batch.prompt_mask)}
        assert batch.responses.shape == (3, 3, 2)
        assert batch.responses[rows[5]].tolist() == [[1, PAD], [2, PAD], [3, 3]]
        assert batch.real[[rows[5], rows[6], 2]].tolist() == [
            [True, True, True], [True, True, False], [False] * 3
        ]  # fmt: skip
        assert batch.ranks[[rows[5], rows[6], 2]].tolist() == [[0, 1, 1], [0, 1, 0], [0, 0, 0]]
        tokens, mask = batch.sequences
        assert tokens.shape == mask.shape == (9, 4)
        assert tokens[3 * rows[5] + 2].tolist() == [PAD, 5, 3, 3]
        assert mask[3 * rows[5] + 2].tolist() == [False, True, True, True]

    def test_labels_by_hand(self) -> None:
        items = [
            Tokenized(Rating(prompt="", completion="", label=2.5), [5], ([1],)),
            Tokenized(Unpaired(prompt="", completion="", label=True), [6], ([1],)),
        ]
        batch = single(items, Shape(1, 1), 3)
        labels = dict(zip(batch.prompts[:, 0].tolist(), batch.labels.tolist(), strict=True))
        assert labels == {5: 2.5, 6: 1.0, PAD: 0.0}
        assert batch.labels.dtype == np.float32
        assert batch.real[:, 0].tolist() == [True, True, False]

    def test_a_prompt_may_be_missing(self) -> None:
        batch = single([pair([], [1], [2])], Shape(0, 1), 1)
        assert batch.prompts.shape == (1, 0)
        assert batch.sequences[0].tolist() == [[1], [2]]

    def test_an_epoch_has_every_pair_once_to_the_last_token(self) -> None:
        seen = Counter()
        for batch in epoch():
            for row in range(len(batch.examples)):
                prompt = batch.prompts[row][batch.prompt_mask[row]].tolist()
                responses = batch.response_mask[row].sum(1).tolist()
                seen[prompt[0], len(prompt), *responses] += 1
        assert seen == Counter((p[0], len(p), len(c), len(r)) for _, p, (c, r) in PAIRS)

    def test_each_goes_into_the_shortest_shape_that_holds_it(self) -> None:
        shapes = [Shape(19, 19), Shape(8, 4), Shape(4, 12)]
        for batch in epoch(shapes=shapes):
            shape = batch.prompts.shape[1], batch.responses.shape[2]
            sizes = zip(batch.prompt_mask.sum(1), batch.response_mask.sum(2).max(1), strict=True)
            for prompt, response in sizes:
                fitting = [s for s in shapes if prompt <= s.prompt and response <= s.response]
                assert shape == min(fitting, key=sum) or prompt == 0

    def test_every_epoch_and_seed_has_an_order_of_its_own(self) -> None:
        orders = [
            [item.prompts[0, -1] for item in epoch(**options)]
            for options in ({}, {}, {"epoch": 1}, {"seed": 1})
        ]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2]
        assert orders[0] != orders[3]

    def test_from_any_batch_on_and_in_parts(self) -> None:
        whole, late = epoch(), epoch(start=5)
        halves = [epoch(part=(index, 2)) for index in range(2)]
        for number, batch in enumerate(whole):
            arrays = batch[:4]
            for array, *both in zip(arrays, *(half[number][:4] for half in halves), strict=True):
                np.testing.assert_array_equal(array, np.concatenate(both))
            assert batch.examples == halves[0][number].examples + halves[1][number].examples
            if number >= 5:
                for array, again in zip(arrays, late[number - 5][:4], strict=True):
                    np.testing.assert_array_equal(array, again)
        assert len(late) == len(whole) - 5

    def test_an_example_that_no_shape_holds_is_refused(self) -> None:
        items = [pair([1], [2], [3]), pair([1, 1, 1], [2], [3, 3])]
        message = "example 1 has a prompt of 3 .* a response of 2, which none of 9 . 1, 2 . 9 holds"
        with pytest.raises(DataError, match=message):
            response_batches(
                items, batch_size=1, shapes=[Shape(2, 9), Shape(9, 1)], pad_token=PAD, seed=0,
                epoch=0,
            )  # fmt: skip


def of_lengths(*sizes: tuple[int, int]) -> list[Tokenized]:
    return [pair([0] * p, [0] * r, [0]) for p, r in sizes]


class TestShapes:
    def test_one_holds_all_and_is_no_larger(self) -> None:
        items = of_lengths((3, 9), (14, 2))
        assert example_batches.shapes(items, num_buckets=1, multiple=4) == [Shape(16, 12)]

    def test_others_save_the_most_padding(self) -> None:
        # One of 64 tokens a row for all; a second saves 7 times 48, or 3 times 52.
        items = of_lengths((32, 32), *[(8, 8)] * 7, *[(4, 8)] * 3, (16, 8))
        shapes = partial(example_batches.shapes, items, multiple=4)
        assert shapes(num_buckets=2) == [Shape(8, 8), Shape(32, 32)]
        assert shapes(num_buckets=3) == [Shape(8, 8), Shape(16, 8), Shape(32, 32)]
        assert len(shapes(num_buckets=9)) == 4

    @pytest.mark.parametrize("multiple", [1, 8])
    @pytest.mark.parametrize("max_length", [61, 64])
    def test_none_is_longer_than_allowed_and_they_hold_all(
        self, max_length: int, multiple: int
    ) -> None:
        sizes = [(p, min(r, max_length - p)) for p, r in RNG.integers(1, 60, (200, 2))]
        items = of_lengths(*sizes)
        shapes = example_batches.shapes(
            items, num_buckets=4, max_length=max_length, multiple=multiple
        )
        assert max(map(sum, shapes)) <= max_length
        assert all(any(p <= s.prompt and r <= s.response for s in shapes) for p, r in sizes)

    def test_what_is_long_on_one_side_only_shares_no_shape_with_the_other_side(self) -> None:
        # One shape would have 500 + 476 tokens in a context of 512.
        items = of_lengths((500, 8), (30, 476), (200, 200))
        shapes = example_batches.shapes(items, num_buckets=4, max_length=512)
        assert shapes == [Shape(200, 200), Shape(32, 480), Shape(504, 8)]

    def test_they_are_the_fewest_that_the_limit_allows(self) -> None:
        # Prompts of 1 to 48 whose responses fill 64 tokens, 16 that go together at a time.
        sizes = [(p, 64 - -(-p // 16) * 16) for p in range(1, 49)]
        shapes = example_batches.shapes(of_lengths(*sizes), num_buckets=1, max_length=64)
        assert shapes == [Shape(16, 48), Shape(32, 32), Shape(48, 16)]
        exact = [(p, 64 - p) for p in range(1, 49)]
        assert len(example_batches.shapes(of_lengths(*exact), num_buckets=1, max_length=64)) == 48

    def test_lengths_are_rounded_up_where_there_is_room(self) -> None:
        shapes = partial(example_batches.shapes, of_lengths((3, 9)), num_buckets=1)
        assert [shapes(max_length=n) for n in (99, 13, 12)] == [
            [Shape(8, 16)], [Shape(4, 9)], [Shape(3, 9)]
        ]  # fmt: skip

    def test_what_cannot_be_is_refused(self) -> None:
        with pytest.raises(DataError, match="an example has 12 tokens, and max_length is 11"):
            example_batches.shapes(of_lengths((3, 9)), num_buckets=1, max_length=11)
        with pytest.raises(ValueError, match="need items and a bucket, got 0 and 1"):
            example_batches.shapes([], num_buckets=1)


class TestSupervised:
    TEXTS = tuple(
        Learned([1000 + i] * n, (RNG.random(n) < 0.5).tolist())
        for i, n in enumerate(RNG.integers(1, 17, 23))
    )

    def epoch(self, **options):
        given = {"batch_size": 4, "lengths": (8, 16), "pad_token": PAD, "seed": 0, "epoch": 0}
        return list(supervised_batches(self.TEXTS, **given | options))

    def test_every_text_once_with_what_is_to_be_learned(self) -> None:
        seen = []
        for tokens, loss_mask, attention_mask in self.epoch():
            assert (tokens[~attention_mask] == PAD).all()
            assert not loss_mask[~attention_mask].any()
            for row in np.flatnonzero(attention_mask.any(1)):
                real = attention_mask[row]
                seen.append((tokens[row][real].tolist(), loss_mask[row][real].tolist()))
        assert sorted(seen) == sorted((text.tokens, text.learned) for text in self.TEXTS)

    def test_from_any_batch_on_and_in_parts(self) -> None:
        whole, late = self.epoch(), self.epoch(start=3)
        halves = [self.epoch(part=(index, 2)) for index in range(2)]
        assert len(late) == len(whole) - 3
        for number, batch in enumerate(whole):
            for array, *both in zip(batch, *(half[number] for half in halves), strict=True):
                np.testing.assert_array_equal(array, np.concatenate(both))
        for batch, again in zip(whole[3:], late, strict=True):
            for array, same in zip(batch, again, strict=True):
                np.testing.assert_array_equal(array, same)


class TestPrompts:
    ITEMS = tuple(Tokenized(Prompt(prompt=str(i)), [i] * (i + 1), ()) for i in range(3))

    def batches(self, start: int, **options):
        stream = mixture.stream([self.ITEMS], seed=0, start=start)
        return prompt_batches(stream, batch_size=4, length=5, pad_token=PAD, **options)

    def test_a_batch_may_have_more_rows_than_there_are_prompts(self) -> None:
        for batch in islice(self.batches(0), 3):
            for row, example in enumerate(batch.examples):
                prompt = int(example.prompt)
                expected = [PAD] * (4 - prompt) + [prompt] * (prompt + 1)
                assert batch.tokens[row].tolist() == expected
                assert batch.mask[row].tolist() == [False] * (4 - prompt) + [True] * (prompt + 1)
        seen = [e.prompt for batch in islice(self.batches(0), 3) for e in batch.examples]
        assert Counter(seen) == {"0": 4, "1": 4, "2": 4}

    def test_from_any_batch_on_and_in_parts(self) -> None:
        whole = list(islice(self.batches(0), 5))
        for batch, late in zip(whole[2:], self.batches(2 * 4), strict=False):
            np.testing.assert_array_equal(batch.tokens, late.tokens)
            assert batch.examples == late.examples
        for batch, half in zip(whole, self.batches(0, part=(1, 2)), strict=False):
            np.testing.assert_array_equal(batch.tokens[2:], half.tokens)
            assert batch.examples[2:] == half.examples

    def test_prompts_that_do_not_fill_a_batch_are_left_out(self) -> None:
        batches = prompt_batches(self.ITEMS, batch_size=2, length=5, pad_token=PAD)
        assert [len(batch.tokens) for batch in batches] == [2]
