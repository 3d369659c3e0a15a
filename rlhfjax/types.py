"""The data that flows between the functions, and the functions that stand for a model.

Sizes: B batch, P prompt length (left-padded), T response length, S = P + T, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
        nobody's business and need not be computed. The built-in models also take
        `segment_ids=None` [B, S] int32, 0 at padding, for several texts in a row: a token sees
        its own segment only, in which positions begin at 0.
      prefill: `(params, prompts [B, P], mask [B, P], *, length) -> (hidden [B, D], cache)`, the
        state of the last position and a cache with room for `length` positions.
      decode: `(params, cache, tokens [B]) -> (hidden [B, D], cache)`, one token further. The
        cache is a tree of arrays that nothing else looks into.
      logits: `(params, hidden [..., D]) -> [..., V]`, the LM head.
      vocab_size: V.
      context_length: the longest sequence, prompt and response together.
      extend: `(params, cache, tokens [B, L], mask [B, L]) -> (hidden [B, D], cache)`, L positions
        further, any of which may be no token, such as the padding before an observation; the state
        of the last one, which is arbitrary where that is no token. `decode` is the case of L = 1
        without padding. None where a model has none: it cannot act over several turns.
    """

    init: Callable[[Array], Params]
    hidden: Callable[..., Array]
    prefill: Callable[..., tuple[Array, Any]]
    decode: Callable[[Params, Any, Array], tuple[Array, Any]]
    logits: Callable[[Params, Array], Array]
    vocab_size: int
    context_length: int
    extend: Callable[[Params, Any, Array, Array], tuple[Array, Any]] | None = None


class ScalarModel(NamedTuple):
    """A model that gives one number a position: a value function or a reward model.

    Attributes:
      init: `(key) -> params`.
      values: `(params, tokens [B, S], attention_mask [B, S], *, first=0) -> [B, S - first]`
        float32.
      vocab_size: V, None where nobody knows.
      context_length: the longest sequence, None where there is no limit.
    """

    init: Callable[[Array], Params]
    values: Callable[..., Array]
    vocab_size: int | None = None
    context_length: int | None = None


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
class LabelledBatch:
    """K responses to each prompt, with what people said of each.

    A response without a token is none and counts nowhere.

    Attributes:
      prompts: [B, P] int32, left-padded; P = 0 where there are none.
      prompt_mask: [B, P] bool, True at real tokens.
      responses: [B, K, T] int32, right-padded.
      response_mask: [B, K, T] bool.
      labels: [B, K], the greater the better: whether a response is desirable, or with which
        probability; its rating; its level, from 0 on; minus its rank among the K.
    """

    prompts: Array
    prompt_mask: Array
    responses: Array
    response_mask: Array
    labels: Array

    @property
    def real(self) -> Array:
        """[B, K] bool, the responses that are."""
        return self.response_mask.any(2)

    @property
    def sequences(self) -> tuple[Array, Array]:
        """[B·K, P + T] tokens and mask of prompts with responses, those of a prompt in a row."""

        def whole(prompts: Array, responses: Array) -> Array:
            each = jnp.repeat(prompts, responses.shape[1], axis=0)
            flat = responses.reshape(len(each), responses.shape[2])
            return jnp.concatenate([each, flat], axis=1)

        return whole(self.prompts, self.responses), whole(self.prompt_mask, self.response_mask)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreferenceBatch:
    """Pairs of responses to prompts, of which the first was preferred.

    A row without a token in either response is no pair and counts nowhere.

    Attributes:
      prompts: [B, P] int32, left-padded; P = 0 where there are none.
      prompt_mask: [B, P] bool, True at real tokens.
      chosen: [B, T] int32, right-padded, as long as `rejected`.
      chosen_mask: [B, T] bool.
      rejected: [B, T] int32, right-padded.
      rejected_mask: [B, T] bool.
      chosen_probs: [B] float32, the probability that the chosen response is the better one; None
        where the labels are taken for certain.
    """

    prompts: Array
    prompt_mask: Array
    chosen: Array
    chosen_mask: Array
    rejected: Array
    rejected_mask: Array
    chosen_probs: Array | None = None

    @property
    def pairs(self) -> Array:
        """[B] bool, the rows that are pairs."""
        return self.chosen_mask.any(-1) & self.rejected_mask.any(-1)

    @property
    def real(self) -> Array:
        """[2, B] bool, the chosen responses of pairs and the rejected ones."""
        return jnp.stack([self.pairs, self.pairs])

    @property
    def labelled(self) -> LabelledBatch:
        """The responses of pairs, each with the probability that it is the better one."""
        mask = jnp.stack([self.chosen_mask, self.rejected_mask], axis=1)
        chosen = jnp.ones(len(mask)) if self.chosen_probs is None else self.chosen_probs
        return LabelledBatch(
            self.prompts,
            self.prompt_mask,
            jnp.stack([self.chosen, self.rejected], axis=1),
            mask & self.pairs[:, None, None],
            jnp.stack([chosen, 1.0 - chosen], axis=1),
        )

    @property
    def sequences(self) -> tuple[Array, Array]:
        """[2·B, P + T] tokens and mask of prompts with responses, those with the chosen first."""

        def whole(prompts: Array, chosen: Array, rejected: Array) -> Array:
            responses = jnp.concatenate([chosen, rejected])
            return jnp.concatenate([jnp.tile(prompts, (2, 1)), responses], axis=1)

        return (
            whole(self.prompts, self.chosen, self.rejected),
            whole(self.prompt_mask, self.chosen_mask, self.rejected_mask),
        )
