"""Tokenised examples to the batches that the algorithms take, in an order of every epoch's own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.data.batches import bucket_lengths, left_pad, plan, right_pad, rows_of_part
from rlhfjax.data.formats import Prompt
from rlhfjax.data.tokenized import Learned, Tokenized
from rlhfjax.types import LabelledBatch, PreferenceBatch


class SupervisedBatch(NamedTuple):
    """The arguments of the step of `algorithms.sft` in their order."""

    tokens: np.ndarray  # [B, S] int32
    loss_mask: np.ndarray  # [B, S] bool, to be learned
    attention_mask: np.ndarray  # [B, S] bool


class PromptBatch(NamedTuple):
    """Prompts to sample responses to, and what else a reward may want to know of them."""

    tokens: np.ndarray  # [B, P] int32, left-padded
    mask: np.ndarray  # [B, P] bool
    examples: tuple[Prompt, ...]  # B


class ResponseBatch(NamedTuple):
    """K responses to each prompt; one without a token is none.

    Attributes:
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool.
      responses: [B, K, T] int32, right-padded.
      response_mask: [B, K, T] bool.
      examples: at most B, in the order of the rows; the rows left over are padding throughout.
    """

    prompts: np.ndarray
    prompt_mask: np.ndarray
    responses: np.ndarray
    response_mask: np.ndarray
    examples: tuple[Any, ...]

    @property
    def pairs(self) -> PreferenceBatch:
        """Of examples that are `formats.Pair`."""
        sides: list[Any] = [
            x[:, side] for side in range(2) for x in (self.responses, self.response_mask)
        ]
        prompts: list[Any] = [self.prompts, self.prompt_mask]
        return PreferenceBatch(*prompts, *sides)

    def labelled(self, labels: np.ndarray) -> LabelledBatch:
        """With labels [B, K], such as `labels[:, None]` or `-ranks`."""
        arrays: list[Any] = [*self[:4], labels]
        return LabelledBatch(*arrays)

    @property
    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """[B·K, P + T] tokens and mask of prompts with responses, as reward models read them."""
        num_responses = self.responses.shape[1]

        def whole(prompts: np.ndarray, responses: np.ndarray) -> np.ndarray:
            each = np.repeat(prompts[:, None], num_responses, axis=1)
            joined = np.concatenate([each, responses], axis=2)
            return joined.reshape(-1, joined.shape[2])

        return whole(self.prompts, self.responses), whole(self.prompt_mask, self.response_mask)

    @property
    def real(self) -> np.ndarray:
        """[B, K] bool, the responses that are."""
        return np.any(self.response_mask, axis=2)

    @property
    def labels(self) -> np.ndarray:
        """[B] float32, of examples that are `formats.Unpaired`, `Rating` or `Class`."""
        labels = np.zeros(len(self.prompts), np.float32)
        labels[: len(self.examples)] = [example.label for example in self.examples]
        return labels

    @property
    def ranks(self) -> np.ndarray:
        """[B, K] int32, of examples that are `formats.Ranking`: how many responses are better.

        Responses are in this order; with ties the pairs that count are those for which
        `losses.ranking.ranked_pairs` of the ranks gives two that differ.
        """
        ranks = np.zeros(self.responses.shape[:2], np.int32)
        for row, example in enumerate(self.examples):
            ranks[row, : len(example.ranks)] = example.ranks
        return ranks


class Shape(NamedTuple):
    """What a batch has room for."""

    prompt: int
    response: int


def shapes(items: Sequence[Tokenized], *, num_buckets: int, multiple: int = 8) -> dict[int, Shape]:
    """Few shapes for examples of many lengths: by the length of prompt and response together.

    Args:
      items: all of which there will be batches.
      num_buckets: how many shapes there may be; a step is compiled for each.
      multiple: what lengths are rounded up to.

    Returns:
      The length up to which an example goes into a shape → the shape.
    """
    totals = [item.num_tokens for item in items]
    limits = bucket_lengths(totals, num_buckets=num_buckets, multiple=multiple)
    longest = {limit: Shape(0, 0) for limit in limits}
    for item, total in zip(items, totals, strict=True):
        limit = limits[bisect_left(limits, total)]
        prompt, response = longest[limit]
        length = len(item.prompt)
        longest[limit] = Shape(max(prompt, length), max(response, total - length))
    return {
        limit: Shape(*(-(-length // multiple) * multiple for length in shape))
        for limit, shape in longest.items()
    }


def supervised_batches(
    texts: Sequence[Learned],
    *,
    batch_size: int,
    lengths: Sequence[int],
    pad_token: int,
    seed: int,
    epoch: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[SupervisedBatch]:
    """One epoch of right-padded texts, as `batches.bucket_batches`.

    Args:
      texts: those of the epoch.
      batch_size: B; rows left over are padding throughout.
      lengths: the S that batches may have, such as `batches.bucket_lengths` gives them.
      pad_token: the id at padded positions.
      seed: with `epoch`, decides the order.
      epoch: counts the passes over the texts.
      start: the batch to begin with, to go on with an epoch that was broken off.
      part: `(index, count)`: of every batch only this one of so many equal parts of its rows.

    Returns:
      An iterator over batches.

    Raises:
      DataError: a text that is empty or longer than every length.
      ValueError: the parts do not divide the batch.
    """
    slots = plan(
        [len(text.tokens) for text in texts],
        batch_size=batch_size,
        lengths=lengths,
        seed=seed,
        epoch=epoch,
    )
    rows = rows_of_part(batch_size, part)

    def batch(length: int, indices: np.ndarray) -> SupervisedBatch:
        mine = [texts[i] for i in indices[rows]]
        pad = partial(right_pad, num_rows=rows.stop - rows.start, length=length)
        tokens, mask = pad([text.tokens for text in mine], pad_token=pad_token)
        learned = pad([np.asarray(text.learned, int) for text in mine], pad_token=0)
        return SupervisedBatch(tokens, learned.tokens.astype(bool), mask)

    return (batch(*slot) for slot in slots[start:])


def prompt_batches(
    items: Iterable[Tokenized],
    *,
    batch_size: int,
    length: int,
    pad_token: int,
    part: tuple[int, int] = (0, 1),
) -> Iterator[PromptBatch]:
    """Left-padded prompts in the order in which they come, every row of a batch one of them.

    `mixture.stream(…, start=k * batch_size)` begins with batch k, and goes on for ever: a batch may
    have more rows than there are prompts.

    Args:
      items: prompts; responses that they have are not looked at.
      batch_size: B.
      length: P.
      pad_token: the id at padded positions.
      part: `(index, count)`: of every batch only this one of so many equal parts of its rows.

    Yields:
      batches; prompts that do not fill one any more are left out.

    Raises:
      DataError: a prompt that is empty or too long.
      ValueError: the parts do not divide the batch.
    """
    rows, items = rows_of_part(batch_size, part), iter(items)
    while len(batch := list(islice(items, batch_size))) == batch_size:
        mine = batch[rows]
        padded = left_pad([item.prompt for item in mine], length=length, pad_token=pad_token)
        yield PromptBatch(*padded, tuple(item.example for item in mine))


def response_batches(
    items: Sequence[Tokenized],
    *,
    batch_size: int,
    shapes: Mapping[int, Shape],
    pad_token: int,
    seed: int,
    epoch: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[ResponseBatch]:
    """One epoch of pairs, rankings, or responses with labels.

    Args:
      items: those of the epoch, of one format.
      batch_size: B; rows left over are padding throughout.
      shapes: what batches have room for, see `shapes`; K is the most responses that an item has.
      pad_token: the id at padded positions.
      seed: with `epoch`, decides the order.
      epoch: counts the passes over the items.
      start: the batch to begin with, to go on with an epoch that was broken off.
      part: `(index, count)`: of every batch only this one of so many equal parts of its rows.

    Returns:
      An iterator over batches.

    Raises:
      DataError: an example that is longer than every shape.
      ValueError: the parts do not divide the batch.
    """
    slots = plan(
        [item.num_tokens for item in items],
        batch_size=batch_size,
        lengths=list(shapes),
        seed=seed,
        epoch=epoch,
    )
    rows = rows_of_part(batch_size, part)
    num_rows, most = rows.stop - rows.start, max(len(item.responses) for item in items)
    pad = partial(right_pad, pad_token=pad_token)

    def batch(slot: int, indices: np.ndarray) -> ResponseBatch:
        mine, shape = [items[i] for i in indices[rows]], shapes[slot]
        backwards = pad(
            [item.prompt[::-1] for item in mine], num_rows=num_rows, length=shape.prompt
        )
        # Responses that are missing are rows without a token.
        listed = [[*item.responses, *[[]] * (most - len(item.responses))] for item in mine]
        flat = pad(
            [ids for responses in listed for ids in responses],
            num_rows=num_rows * most,
            length=shape.response,
        )
        return ResponseBatch(
            prompts=np.ascontiguousarray(backwards.tokens[:, ::-1]),
            prompt_mask=np.ascontiguousarray(backwards.mask[:, ::-1]),
            responses=flat.tokens.reshape(num_rows, most, -1),
            response_mask=flat.mask.reshape(num_rows, most, -1),
            examples=tuple(item.example for item in mine),
        )

    return (batch(*slot) for slot in slots[start:])
