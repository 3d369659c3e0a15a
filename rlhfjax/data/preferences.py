"""Preference pairs made from labelled text."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from rlhfjax.data.text import DataError, LabelledText


class Preference(NamedTuple):
    """`chosen` is preferred to `rejected`."""

    chosen: str
    rejected: str


def pair_by_label(texts: Iterable[LabelledText], *, seed: int) -> list[Preference]:
    """Pairs each preferred text with a rejected one.

    With n preferred and m rejected texts there are max(n, m) pairs. The longer side occurs once
    each; the shorter is passed over again, in a new order, until the pairs are full, so that no
    text occurs twice before all of its side have occurred.

    Args:
      texts: texts of both labels.
      seed: decides the pairing, together with the order of `texts`.

    Returns:
      The pairs, shuffled.

    Raises:
      DataError: one of the labels does not occur.
    """
    texts = list(texts)
    chosen = [t.text for t in texts if t.label]
    rejected = [t.text for t in texts if not t.label]
    if not chosen or not rejected:
        raise DataError(
            f"pairs need texts of both labels, got {len(chosen)} preferred and "
            f"{len(rejected)} rejected; give more text"
        )
    rng = np.random.default_rng(seed)
    num_pairs = max(len(chosen), len(rejected))
    return [
        Preference(chosen[i], rejected[j])
        for i, j in zip(
            _passes(rng, len(chosen), num_pairs),
            _passes(rng, len(rejected), num_pairs),
            strict=True,
        )
    ]


def _passes(rng: np.random.Generator, num_texts: int, num_draws: int) -> np.ndarray:
    num_passes = -(-num_draws // num_texts)
    return np.concatenate([rng.permutation(num_texts) for _ in range(num_passes)])[:num_draws]
