"""What is refused before anything is compiled, because it would be computed without a word.

A lookup of a token that is not in the table gives another row or NaN, and no error.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax import Array

from rlhfjax.types import LabelledBatch, PreferenceBatch, Rollout

_COLUMNS: dict[type, tuple[str, ...]] = {
    Rollout: ("tokens",),
    PreferenceBatch: ("prompts", "chosen", "rejected"),
    LabelledBatch: ("prompts", "responses"),
}


class SpecialTokens(Protocol):
    """The part of a config that names tokens."""

    @property
    def pad_token(self) -> int:
        """Fills responses behind the end token."""

    @property
    def end_token(self) -> int | tuple[int, ...] | None:
        """Ends a response, or several of which any does."""


def special_tokens(config: SpecialTokens, *, vocab_size: int) -> None:
    """Refuses a pad or end token that the model does not know.

    Args:
      config: of an algorithm.
      vocab_size: V.

    Raises:
      ValueError: with the token.
    """
    for name in ("pad_token", "end_token"):
        tokens = getattr(config, name)
        for token in () if tokens is None else np.ravel(tokens):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name}={token} is not in the model's vocabulary of {vocab_size} tokens, "
                    f"0 to {vocab_size - 1}: give the number that the model's tokenizer has for it"
                )


def context(tokens: Array, context_length: int | None) -> None:
    """Refuses sequences that are longer than a model can read; looks at the shape alone.

    Args:
      tokens: [B, S] prompts and responses.
      context_length: the longest sequence, None where there is no limit.

    Raises:
      ValueError: with both lengths.
    """
    if context_length is not None and tokens.shape[1] > context_length:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens, prompt and response together, are longer than "
            f"the model's context of {context_length}: shorten either or build the model with a "
            "longer context_length"
        )


def known_tokens(tokens: Any, *, vocab_size: int, name: str = "tokens") -> None:
    """Refuses tokens that a model does not know, at padding too: it is looked up like all else.

    Of an array that is spread over several processes, each looks at its own part. Inside jit, vmap
    or scan a tracer has no values yet, and nothing is refused.

    Args:
      tokens: [..., S] int, of NumPy or JAX.
      vocab_size: V.
      name: what to call them.

    Raises:
      ValueError: with the first of them and its place.
    """
    for corner, part in _parts(tokens):
        unknown = (part < 0) | (part >= vocab_size)
        if unknown.any():
            place = np.argwhere(unknown)[0]
            *rows, position = place + corner
            raise ValueError(
                f"{name}: row {', '.join(map(str, rows))} has token {part[tuple(place)]} at "
                f"position {position}, but the model's vocabulary has {vocab_size} tokens, 0 to "
                f"{vocab_size - 1}: encode texts with the model's own tokenizer, and pad with one "
                "of its tokens, not with -100"
            )


def _parts(x: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What this process can see of an array, and where in the whole each part begins."""
    if isinstance(x, jax.core.Tracer):
        return
    if isinstance(x, Array) and not x.is_fully_addressable:
        for shard in x.addressable_shards:
            yield np.array([s.start or 0 for s in shard.index]), np.asarray(shard.data)
    else:
        yield np.zeros(np.ndim(x), int), np.asarray(x)


class Checked:
    """A compiled function that looks at the tokens of its arguments before it is traced or run.

    In all else it is that function, and has its `lower`, `trace` and `eval_shape`.

    Args:
      function: what `jax.jit` gave.
      names: of the arguments that hold tokens: arrays, or a batch of `types`.
      vocab_size: V; None where nobody knows, and then nothing is looked at.
    """

    def __init__(self, function: Callable[..., Any], *names: str, vocab_size: int | None) -> None:
        self._function, self._names, self._vocab_size = function, names, vocab_size
        self._signature = inspect.signature(function)
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, or a `ValueError`."""
        if self._vocab_size is not None:
            given = self._signature.bind(*args, **kwargs).arguments
            for argument in self._names:
                for name, tokens in _tokens(argument, given[argument]):
                    known_tokens(tokens, vocab_size=self._vocab_size, name=name)
        return self._function(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)


def _tokens(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if type(value) not in _COLUMNS:
        yield name, value
    for column in _COLUMNS.get(type(value), ()):
        yield f"{name}.{column}", getattr(value, column)
