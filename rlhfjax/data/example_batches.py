"""Tokenised examples to the batches that the algorithms take, in an order of every epoch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from rlhfjax.data.batches import left_pad, plan, right_pad, rows_of_part
from rlhfjax.data.formats import Prompt
from rlhfjax.data.text import DataError
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
        """Of examples that are `formats.Pair`, their labels taken for certain."""
        sides: list[Any] = [
            x[:, side] for side in range(2) for x in (self.responses, self.response_mask)
        ]
        prompts: list[Any] = [self.prompts, self.prompt_mask]
        return PreferenceBatch(*prompts, *sides)

    @property
    def soft_pairs(self) -> PreferenceBatch:
        """Of examples that are `formats.Pair`, each with its probability, or 1 if it has none."""
        chosen_probs = np.ones(len(self.prompts), np.float32)
        given = [example.chosen_prob for example in self.examples]
        chosen_probs[: len(given)] = [1.0 if prob is None else prob for prob in given]
        probs: Any = chosen_probs
        return replace(self.pairs, chosen_probs=probs)

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


QUANTILES = np.linspace(0, 1, 33)


class Shape(NamedTuple):
    """What a batch has room for."""

    prompt: int
    response: int


def pairs_of(items: Sequence[Tokenized]) -> Callable[[ResponseBatch], PreferenceBatch]:
    """How batches of pairs are read: with soft labels if any example has one, so all alike.

    Args:
      items: all of which there will be batches; their examples are `formats.Pair`.

    Returns:
      `soft_pairs` or `pairs` of a batch.
    """
    soft = any(item.example.chosen_prob is not None for item in items)
    return lambda batch: batch.soft_pairs if soft else batch.pairs


def shapes(
    items: Sequence[Tokenized],
    *,
    num_buckets: int,
    max_length: int | None = None,
    multiple: int = 8,
) -> list[Shape]:
    """Few shapes for examples of many lengths: some that hold all, others that save padding.

    A shape (P, L - P) of L tokens holds an example of p + r if p ≤ P ≤ L - r: the fewest points
    that meet all of these intervals are the shapes that hold all. There is one without
    `max_length`; with it, examples of just that length need one for each length of their prompts,
    unless `tokenized.responses` was told of a `multiple`. To these come `num_buckets` - 1 more,
    each the one that saves the most padding of those that are left.

    Args:
      items: all of which there will be batches.
      num_buckets: how many shapes there may be, if one of them holds all; a step is compiled for
        each.
      max_length: of a shape, prompt and response together; None for no limit.
      multiple: what lengths are rounded up to, where `max_length` leaves room.

    Returns:
      The shapes, the shortest first.

    Raises:
      DataError: an example that is longer than `max_length`.
      ValueError: no items, or `num_buckets` below 1.

    References:
      Greedy choice saves at least 1 - 1/e of what can be: Nemhauser, Wolsey and Fisher 1978,
      "An analysis of approximations for maximizing submodular set functions".
    """
    if not items or num_buckets < 1:
        raise ValueError(f"need items and a bucket, got {len(items)} and {num_buckets}")
    sizes, counts = np.unique(_sizes(items), axis=0, return_counts=True)
    length = int(_rounded(sizes, multiple).max(0).sum()) if max_length is None else max_length
    if (longest := sizes.sum(1).max()) > length:
        raise DataError(f"an example has {longest} tokens, and max_length is {length}")
    whole = [Shape(prompt, length - prompt) for prompt in _meeting(sizes, length)]
    found = _fitting(whole, sizes, length, multiple)

    # A few of all lengths are enough to choose from, and examples count as so long.
    levels = [np.unique(_rounded(np.quantile(x, QUANTILES), multiple)) for x in sizes.T]
    rough = np.stack([of[np.searchsorted(of, x)] for of, x in zip(levels, sizes.T, strict=True)], 1)
    rough, which = np.unique(rough, axis=0, return_inverse=True)
    counts = np.bincount(which.ravel(), counts)
    pairs = np.stack(np.meshgrid(*levels), 2).reshape(-1, 2)
    pairs = pairs[pairs.sum(1) <= length]
    cost = _costs(rough, np.array(found)).min(1, initial=length)
    costs = _costs(rough, pairs)
    for _ in range(num_buckets - 1 if len(pairs) else 0):
        best = np.argmin(counts @ np.minimum(cost[:, None], costs))
        cost = np.minimum(cost, costs[:, best])
        found.append(Shape(*map(int, pairs[best])))
    return _fitting(found, sizes, length, multiple)


def _sizes(items: Sequence[Tokenized]) -> np.ndarray:
    """[N, 2] lengths of the prompt and of the longest response."""
    return np.array([(len(x.prompt), x.num_tokens - len(x.prompt)) for x in items])


def _rounded(lengths: np.ndarray, multiple: int) -> np.ndarray:
    return (-(-lengths // multiple) * multiple).astype(int)


def _holds(sizes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """[N, K] bool, which examples fit into which shapes."""
    return np.all(sizes[:, None] <= shapes, axis=2)


def _costs(sizes: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """[N, K] tokens that each example takes in each shape."""
    return np.where(_holds(sizes, shapes), shapes.sum(1), np.inf)


def _fitting(shapes: list[Shape], sizes: np.ndarray, length: int, multiple: int) -> list[Shape]:
    """The shapes no larger than the examples for which each is the shortest; unused ones go."""
    chosen = _costs(sizes, np.array(shapes)).argmin(1)
    found = set()
    for number in np.unique(chosen):
        longest = sizes[chosen == number].max(0)
        prompt, response = map(int, _rounded(longest, multiple))
        prompt = min(prompt, length - int(longest[1]))
        found.add(Shape(prompt, min(response, length - prompt)))
    return sorted(found, key=lambda shape: (sum(shape), shape))


def _meeting(sizes: np.ndarray, length: int) -> list[int]:
    """The fewest P such that each example has one with p ≤ P ≤ length - r."""
    found = [-1]
    for prompt, response in sizes[np.argsort(-sizes[:, 1], kind="stable")]:
        if prompt > found[-1]:
            found.append(length - int(response))
    return found[1:]


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
    shapes: Sequence[Shape],
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
      shapes: what batches have room for, see `shapes`: an item goes into the shortest that holds
        it. K is the most responses that an item has.
      pad_token: the id at padded positions.
      seed: with `epoch`, decides the order.
      epoch: counts the passes over the items.
      start: the batch to begin with, to go on with an epoch that was broken off.
      part: `(index, count)`: of every batch only this one of so many equal parts of its rows.

    Returns:
      An iterator over batches.

    Raises:
      DataError: an example that no shape holds.
      ValueError: the parts do not divide the batch.
    """
    shapes = sorted(shapes, key=sum)
    sizes = _sizes(items)
    holds = _holds(sizes, np.array(shapes))
    for index in np.flatnonzero(~holds.any(1))[:1]:
        prompt, response = sizes[index]
        raise DataError(
            f"example {index} has a prompt of {prompt} tokens and a response of {response}, which "
            f"none of {', '.join(f'{p} + {r}' for p, r in shapes)} holds: shorten it, leave it "
            "out, or give a larger shape"
        )
    slots = plan(
        holds.argmax(1) + 1,
        batch_size=batch_size,
        lengths=range(1, len(shapes) + 1),
        seed=seed,
        epoch=epoch,
    )
    rows = rows_of_part(batch_size, part)
    num_rows, most = rows.stop - rows.start, max(len(item.responses) for item in items)
    pad = partial(right_pad, pad_token=pad_token)

    def batch(slot: int, indices: np.ndarray) -> ResponseBatch:
        mine, shape = [items[i] for i in indices[rows]], shapes[slot - 1]
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
