"""How a parameter of the decoder is stored in a directory in the Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """A parameter of ours and the tensors of a directory that hold it.

    Attributes:
      path: in the parameter tree, as `("layers_0", "qkv", "kernel")`.
      shape: of ours.
      names: of theirs, in order; several are joined.
      shapes: of theirs, as stored.
      join: theirs → ours.
      split: ours → theirs, the inverse.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]
