"""Several sources of records as one endless stream, by weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import count
from math import gcd, lcm
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def stream(
    sources: Sequence[Sequence[T]],
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    start: int = 0,
) -> Iterator[T]:
    """The records of a mixture from a position on; see `places` for which they are.

    `islice(stream(…, start=epoch * size), size)` is one epoch of such a size, to be put into
    batches by length; of one source and its own size each epoch has every record once.

    Args:
      sources: the records of each.
      seed: decides the order.
      weights: of each source; None for as many of each as it has.
      start: the position to begin with.

    Returns:
      An iterator without end.

    Raises:
      ValueError: as `places`.
    """
    sizes = [len(source) for source in sources]
    found = places(sizes, weights=weights, seed=seed, start=start)
    return (sources[source][index] for source, index in found)


def places(
    sizes: Sequence[int], *, seed: int, weights: Sequence[float] | None = None, start: int = 0
) -> Iterator[tuple[int, int]]:
    """Source and index of the records of a mixture from a position on.

    The record at a position depends on the arguments and on nothing that was drawn before. Among
    the first n there are n·wᵢ of source i, rounded up or down. A source is passed over in an order
    that is another one each time.

    Args:
      sizes: how many records each source has.
      seed: decides the orders.
      weights: wᵢ before they are divided by their sum; None for the sizes.
      start: the position to begin with.

    Returns:
      An iterator without end.

    Raises:
      ValueError: weights and sizes that differ in number, are not positive, or no source.

    References:
      Tijdeman 1980, The chairman assignment problem.
    """
    given = list(sizes if weights is None else weights)
    if len(given) != len(sizes) or not given or min(*sizes, *given) <= 0:
        raise ValueError(
            "a mixture needs sources with records, and a positive weight of each; got sources of "
            f"{list(sizes)} records and the weights {given}"
        )
    return _places(sizes, _whole(given), seed, start)


def _whole(weights: Sequence[float]) -> list[int]:
    """The weights in whole numbers, as small as they can be: 0.7 and 0.3 are 7 and 3."""
    exact = [Fraction(str(weight)) for weight in weights]
    multiple = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * multiple) for weight in exact]
    return [weight // gcd(*whole) for weight in whole]


def _places(
    sizes: Sequence[int], weights: Sequence[int], seed: int, start: int
) -> Iterator[tuple[int, int]]:
    # Sources take turns in a cycle of Σ weights positions, which is exact at its end.
    cycles, within = divmod(start, sum(weights))
    taken = [cycles * weight for weight in weights]
    orders: dict[tuple[int, int], np.ndarray] = {}
    for position, source in enumerate(_turns(weights)):
        if position >= within:
            epoch, index = divmod(taken[source], sizes[source])
            if (source, epoch) not in orders:
                orders = {key: x for key, x in orders.items() if key[0] != source}
                rng = np.random.default_rng([seed, source, epoch])
                orders[source, epoch] = rng.permutation(sizes[source])
            yield source, int(orders[source, epoch][index])
        taken[source] += 1


def _turns(weights: Sequence[int]) -> Iterator[int]:
    """Whose turn it is: of those that may come without being early, the one due first."""
    total, taken = sum(weights), [0] * len(weights)
    for position in count(1):
        may = [i for i, w in enumerate(weights) if taken[i] * total < position * w]
        source = min(may, key=lambda i: Fraction(taken[i] + 1, weights[i]))
        taken[source] += 1
        yield source
