"""The data that flows between the functions, and the functions that stand for a model.

Sizes: B batch, P prompt length (left-padded), T response length, S = P + T, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import Array

Params = Any
"""A tree of arrays: the parameters of a model, of whatever structure the model likes."""

Loss = tuple[Array, dict[str, Array]]
"""A loss, and metrics without a gradient."""

Reduction = Callable[[Array, Array], Array]
"""`(x, mask) -> loss`: how a loss is averaged, `masked.mean` or one of `reductions`."""


class LanguageModel(NamedTuple):
    """A causal language model as pure functions; bring your own by filling in the fields.

    Attributes:
      init: `(key) -> params`.
      hidden: `(params, tokens [B, S], attention_mask [B, S], *, first=0) -> [B, S - first, D]`,
        the hidden states of whole sequences. `first` is static: the states before it are
        nobody's business and need not be computed.
      prefill: `(params, prompts [B, P], mask [B, P], *, length) -> (hidden [B, D], cache)`, the
        state of the last position and a cache with room for `length` positions.
      decode: `(params, cache, tokens [B]) -> (hidden [B, D], cache)`, one token further. The
        cache is a tree of arrays that nothing else looks into.
      logits: `(params, hidden [..., D]) -> [..., V]`, the LM head.
      vocab_size: V.
      context_length: the longest sequence, prompt and response together.
    """

    init: Callable[[Array], Params]
    hidden: Callable[..., Array]
    prefill: Callable[..., tuple[Array, Any]]
    decode: Callable[[Params, Any, Array], tuple[Array, Any]]
    logits: Callable[[Params, Array], Array]
    vocab_size: int
    context_length: int


class ScalarModel(NamedTuple):
    """A model that gives one number a position: a value function or a reward model.

    Attributes:
      init: `(key) -> params`.
      values: `(params, tokens [B, S], attention_mask [B, S], *, first=0) -> [B, S - first]`
        float32.
    """

    init: Callable[[Array], Params]
    values: Callable[..., Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Prompts with the responses that a policy sampled to them.

    Attributes:
      tokens: [B, S] int32, left-padded prompts followed by responses.
      attention_mask: [B, S] bool, True at real tokens.
      response_mask: [B, T] bool, True up to and including the end token.
      log_probs: [B, T] float32 of the response tokens under the sampling policy at the sampling
        temperature, before any filter; 0 where the mask is False.
      values: [B, T] float32 of a head that read the hidden states while decoding, or None.
    """

    tokens: Array
    attention_mask: Array
    response_mask: Array
    log_probs: Array
    values: Array | None = None

    @property
    def prompts(self) -> Array:
        """[B, P] int32."""
        return self.tokens[:, : -self.response_mask.shape[1]]

    @property
    def responses(self) -> Array:
        """[B, T] int32."""
        return self.tokens[:, -self.response_mask.shape[1] :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of texts of which the first was preferred.

    Attributes:
      chosen: [B, S] int32.
      chosen_mask: [B, S] bool, True at real tokens.
      rejected: [B, S] int32.
      rejected_mask: [B, S] bool; a row without any real token is no pair and counts nowhere.
    """

    chosen: Array
    chosen_mask: Array
    rejected: Array
    rejected_mask: Array
