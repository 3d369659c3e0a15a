"""Scalar heads: value functions and reward models as a head on a language model's states."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax.types import LanguageModel, Params, ScalarModel


class ScalarHead(NamedTuple):
    """One number from a hidden state.

    Attributes:
      init: `(key) -> params`.
      apply: `(params, hidden [..., D]) -> [...]` float32.
    """

    init: Callable[[Array], Params]
    apply: Callable[[Params, Array], Array]


def linear_head(width: int, *, stddev: float) -> ScalarHead:
    """w·h + b, with w ~ Normal(0, stddev²) and b = 0.

    Args:
      width: D.
      stddev: 1/√(D + 1) for a reward model, 0 for a value function (Ziegler et al. 2019).

    Returns:
      a `ScalarHead` with parameters `{"kernel": [D], "bias": []}`.
    """

    def init(key: Array) -> Params:
        return {"kernel": stddev * jax.random.normal(key, (width,)), "bias": jnp.zeros(())}

    def apply(params: Params, hidden: Array) -> Array:
        return hidden.astype(jnp.float32) @ params["kernel"] + params["bias"]

    return ScalarHead(init, apply)


def rescale(params: Params, *, mean: float | Array, std: float | Array) -> Params:
    """The linear head that gives (w·h + b - mean) / std.

    Args:
      params: `{"kernel", "bias"}` of a `linear_head`.
      mean: what the new head subtracts.
      std: what it divides by.

    Returns:
      parameters of the same structure.

    References:
      Ziegler et al. 2019 normalise reward models so before and after training.
    """
    return {"kernel": params["kernel"] / std, "bias": (params["bias"] - mean) / std}


def scalar_model(model: LanguageModel, head: ScalarHead) -> ScalarModel:
    """A head on top of a language model's hidden states.

    Args:
      model: the backbone.
      head: the head.

    Returns:
      a `ScalarModel` with parameters `{"backbone", "head"}`.
    """

    def init(key: Array) -> Params:
        backbone_key, head_key = jax.random.split(key)
        return {"backbone": model.init(backbone_key), "head": head.init(head_key)}

    def values(params: Params, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        hidden = model.hidden(params["backbone"], tokens, attention_mask, first=first)
        return head.apply(params["head"], hidden)

    return ScalarModel(init, values, model.vocab_size, model.context_length)


def same_vocabulary(policy: LanguageModel, scalar: ScalarModel) -> None:
    """Refuses a scalar model that reads the policy's tokens as other ones.

    Args:
      policy: what writes the tokens.
      scalar: what reads them.

    Raises:
      ValueError: with the size of both vocabularies.
    """
    if scalar.vocab_size not in (None, policy.vocab_size):
        raise ValueError(
            f"the policy has a vocabulary of {policy.vocab_size} tokens and the reward or value "
            f"model one of {scalar.vocab_size}: the same number would mean another token to it; "
            "use models with the same tokenizer, or score texts (`rewards.call`)"
        )


def last_value(values: Array, attention_mask: Array) -> Array:
    """What a scalar model says at the last real token: the score of a whole sequence.

    Args:
      values: [B, S].
      attention_mask: [B, S] bool, padded on either side.

    Returns:
      [B]; 0 for a row without real tokens.
    """
    length = attention_mask.shape[1]
    last = length - 1 - jnp.argmax(attention_mask[:, ::-1], axis=1)
    scores = jnp.take_along_axis(values, last[:, None], axis=1)[:, 0]
    return jnp.where(attention_mask.any(1), scores, 0.0)
