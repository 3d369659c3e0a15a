"""Token sequences to batches of few, fixed shapes.

`plan` decides which records share a batch and how long it is; it knows nothing but their
lengths. `right_pad` and `left_pad` lay sequences into arrays. `bucket_batches` and
`bucket_pair_batches` compose the two; batches of other records are composed in the same way.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from rlhfjax.data.text import DataError

Tokens = Sequence[int] | np.ndarray


class Padded(NamedTuple):
    """Sequences in one array; `mask` is True at their tokens and False at padding."""

    tokens: np.ndarray  # [B, L] int32
    mask: np.ndarray  # [B, L] bool


class PaddedPair(NamedTuple):
    """Row i of `chosen` is preferred to row i of `rejected`; both have the same L."""

    chosen: Padded
    rejected: Padded


class Slot(NamedTuple):
    """One batch to be: its length and the indices of its records."""

    length: int
    indices: np.ndarray  # [at most the batch size] int


def bucket_lengths(lengths: Sequence[int], *, num_buckets: int, multiple: int = 8) -> list[int]:
    """The bucket lengths that need the least padding.

    Minimises Σᵢ min{L ∈ buckets : L ≥ lengthᵢ} over all sets of at most `num_buckets` multiples
    of `multiple`, exactly, by dynamic programming over the distinct rounded lengths.

    Args:
      lengths: one length a record.
      num_buckets: how many shapes there may be.
      multiple: what bucket lengths are rounded up to.

    Returns:
      The lengths, ascending; the last holds the longest record.

    Raises:
      ValueError: no lengths, or `num_buckets` below 1.
    """
    if len(lengths) == 0 or num_buckets < 1:
        raise ValueError(f"need lengths and a bucket, got {len(lengths)} and {num_buckets}")
    rounded = -(-np.asarray(lengths) // multiple) * multiple
    sizes, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # best[i]: least total of the records in the i smallest sizes, with the buckets used so far.
    best = np.where(below == 0, 0.0, np.inf)
    choices = []
    for _ in range(min(num_buckets, len(sizes))):
        # total[i, j]: size i closes a bucket that opens above the j smallest sizes.
        total = best[None, :-1] + sizes[:, None] * (below[1:, None] - below[None, :-1])
        total[np.triu_indices(len(sizes), 1)] = np.inf
        choices.append(total.argmin(axis=1))
        best = np.concatenate([[0.0], total.min(axis=1)])
    chosen: list[int] = []
    end = len(sizes)
    for choice in reversed(choices):
        if end == 0:
            break
        chosen.append(int(sizes[end - 1]))
        end = int(choice[end - 1])
    return chosen[::-1]


def plan(
    record_lengths: Sequence[int],
    *,
    batch_size: int,
    lengths: Sequence[int],
    seed: int,
    epoch: int,
) -> list[Slot]:
    """Which records share a batch in one epoch: every record once, in shuffled batches.

    A record goes to the smallest length that holds it. The same seed and epoch give the same
    plan, so `plan(...)[done:]` continues an epoch that was broken off.

    Args:
      record_lengths: one length a record, at least 1.
      batch_size: records a batch; the last batch of each length may have fewer.
      lengths: the lengths a batch may have.
      seed: with `epoch`, decides the order.
      epoch: counts the passes over the records.

    Returns:
      The batches in their order.

    Raises:
      DataError: a record that is empty or longer than every length.
    """
    limits = np.sort(np.asarray(lengths))
    sizes = np.asarray(record_lengths, dtype=np.int64)
    for index in np.flatnonzero((sizes < 1) | (sizes > limits[-1]))[:1]:
        if sizes[index] < 1:
            raise DataError(f"record {index} is empty; leave it out")
        raise DataError(
            f"record {index} has {sizes[index]} tokens, the longest batch holds {limits[-1]}; "
            "shorten it, leave it out, or allow a greater length"
        )
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))
    buckets = np.searchsorted(limits, sizes[order])
    slots = []
    for bucket, length in enumerate(limits):
        members = order[buckets == bucket]
        slots += [
            Slot(int(length), members[start : start + batch_size])
            for start in range(0, len(members), batch_size)
        ]
    return [slots[i] for i in rng.permutation(len(slots))]


def right_pad(sequences: Sequence[Tokens], *, num_rows: int, length: int, pad_token: int) -> Padded:
    """Sequences at the left of an array, padding behind them and in the rows left over.

    Args:
      sequences: at most `num_rows` sequences of at most `length` token ids.
      num_rows: B; rows without a sequence are padding throughout.
      length: L.
      pad_token: the id at padded positions.

    Returns:
      tokens [B, L] int32 and mask [B, L] bool.

    Raises:
      DataError: a sequence that is too long, not one row of ids, or not of integers.
      ValueError: more sequences than rows.
    """
    if len(sequences) > num_rows:
        raise ValueError(f"{len(sequences)} sequences do not fit into {num_rows} rows")
    tokens = np.full((num_rows, length), pad_token, dtype=np.int32)
    mask = np.zeros((num_rows, length), dtype=bool)
    for row, sequence in enumerate(sequences):
        ids = np.asarray(sequence)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise DataError(
                f"sequence {row} has shape {ids.shape} and dtype {ids.dtype}; "
                "give a flat sequence of integer token ids"
            )
        if ids.size > length:
            raise DataError(
                f"sequence {row} has {ids.size} tokens, there is room for {length}; "
                "shorten it or allow a greater length"
            )
        tokens[row, : ids.size] = ids
        mask[row, : ids.size] = True
    return Padded(tokens, mask)


def left_pad(prompts: Sequence[Tokens], *, length: int, pad_token: int) -> Padded:
    """Prompts at the right of an array, padding before them, ready to be continued.

    Args:
      prompts: sequences of 1 to `length` token ids.
      length: P.
      pad_token: the id at padded positions.

    Returns:
      tokens [B, P] int32 and mask [B, P] bool.

    Raises:
      DataError: a prompt that is empty or too long, or not a flat sequence of integers.
    """
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise DataError(f"sequence {row} is empty; a prompt needs at least one token")
    backwards = right_pad(
        [np.asarray(prompt)[::-1] for prompt in prompts],
        num_rows=len(prompts),
        length=length,
        pad_token=pad_token,
    )
    return Padded(*(np.ascontiguousarray(x[:, ::-1]) for x in backwards))


def bucket_batches(
    sequences: Sequence[Tokens],
    *,
    batch_size: int,
    lengths: Sequence[int],
    pad_token: int,
    seed: int,
    epoch: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Padded]:
    """One epoch of right-padded batches; see `plan` for their order.

    Args:
      sequences: token ids, one sequence a record.
      batch_size: B, the same for every batch: rows left over are padding throughout.
      lengths: the L that batches may have.
      pad_token: the id at padded positions.
      seed: with `epoch`, decides the order.
      epoch: counts the passes over the records.
      start: the batch to begin with, to go on with an epoch that was broken off.
      part: `(index, count)`: of every batch only this one of so many equal parts of its rows, as
        each of several processes reads it.

    Returns:
      An iterator over tokens [B / count, L] int32 and mask [B / count, L] bool.

    Raises:
      DataError: a sequence that is empty or longer than every length.
      ValueError: the parts do not divide the batch.
    """
    slots = plan(
        [len(s) for s in sequences], batch_size=batch_size, lengths=lengths, seed=seed, epoch=epoch
    )
    fill = partial(_fill, rows=rows_of_part(batch_size, part), pad_token=pad_token)
    return (fill(sequences, slot) for slot in slots[start:])


def bucket_pair_batches(
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    batch_size: int,
    lengths: Sequence[int],
    pad_token: int,
    seed: int,
    epoch: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
) -> Iterator[PaddedPair]:
    """One epoch of right-padded preference pairs; the two of a pair share a batch's length.

    Args:
      pairs: (chosen, rejected) token ids, one pair a record.
      batch_size: B, the same for every batch: rows left over are padding throughout.
      lengths: the L that batches may have; the longer of a pair decides.
      pad_token: the id at padded positions.
      seed: with `epoch`, decides the order.
      epoch: counts the passes over the records.
      start: the batch to begin with, as in `bucket_batches`.
      part: of every batch, likewise.

    Returns:
      An iterator over two of tokens [B / count, L] int32 and mask [B / count, L] bool.

    Raises:
      DataError: a sequence that is empty or longer than every length.
      ValueError: the parts do not divide the batch.
    """
    for index, pair in enumerate(pairs):
        if min(map(len, pair)) == 0:
            raise DataError(f"record {index} has an empty side; leave it out")
    slots = plan(
        [max(map(len, pair)) for pair in pairs],
        batch_size=batch_size,
        lengths=lengths,
        seed=seed,
        epoch=epoch,
    )
    chosen, rejected = [c for c, _ in pairs], [r for _, r in pairs]
    fill = partial(_fill, rows=rows_of_part(batch_size, part), pad_token=pad_token)
    return (PaddedPair(fill(chosen, slot), fill(rejected, slot)) for slot in slots[start:])


def draw(prompts: Padded, num_rows: int, *, iteration: int, seed: int) -> Padded:
    """The prompts of an iteration: all of them once, in random order, then again in another.

    Args:
      prompts: N of them.
      num_rows: of an iteration; more than N take some twice.
      iteration: from 0; a resumed run asks for any.
      seed: decides the orders.

    Returns:
      `num_rows` rows.
    """
    total = len(prompts.tokens)
    places = range(iteration * num_rows, (iteration + 1) * num_rows)
    orders = {
        number: np.random.default_rng([seed, number]).permutation(total)
        for number in {place // total for place in places}
    }
    rows = np.array([orders[place // total][place % total] for place in places])
    return Padded(prompts.tokens[rows], prompts.mask[rows])


def rows_of_part(batch_size: int, part: tuple[int, int]) -> slice:
    """The rows of a batch that are one of several equal parts.

    Args:
      batch_size: of the whole.
      part: `(index, count)`.

    Returns:
      which rows.

    Raises:
      ValueError: the parts do not divide the batch.
    """
    index, count = part
    if batch_size % count:
        raise ValueError(
            f"a batch of {batch_size} rows does not divide into {count} parts: choose a multiple"
        )
    size = batch_size // count
    return slice(index * size, (index + 1) * size)


def _fill(sequences: Sequence[Tokens], slot: Slot, *, rows: slice, pad_token: int) -> Padded:
    return right_pad(
        [sequences[i] for i in slot.indices[rows]],
        num_rows=rows.stop - rows.start,
        length=slot.length,
        pad_token=pad_token,
    )
