"""A policy and its value function over one tree of parameters, with separate or shared trunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array

from rlhfjax.models.heads import ScalarHead, same_vocabulary
from rlhfjax.types import LanguageModel, Params, ScalarModel


class ActorCritic(NamedTuple):
    """What PPO trains.  The parameters of the policy are `params["policy"]`.

    Attributes:
      policy: the language model that samples.
      init: `(key) -> params`.
      outputs: `(params, tokens, attention_mask, *, first) -> (hidden [B, N, D], values [B, N])`,
        the policy's hidden states and the values at the same positions.
      value_of: `(params, hidden [..., D]) -> [...]` where one state serves both and values can
        be read while decoding; None where the value function has a trunk of its own.
    """

    policy: LanguageModel
    init: Callable[[Array], Params]
    outputs: Callable[..., tuple[Array, Array]]
    value_of: Callable[[Params, Array], Array] | None


def separate_trunks(policy: LanguageModel, value: ScalarModel) -> ActorCritic:
    """A policy and a value function without a common parameter.

    Args:
      policy: any language model.
      value: any scalar model over the same tokens.

    Returns:
      an `ActorCritic` with parameters `{"policy", "value"}`; its context is the shorter one.

    Raises:
      ValueError: their vocabularies differ.
    """
    same_vocabulary(policy, value)
    if value.context_length is not None:
        shorter = min(policy.context_length, value.context_length)
        policy = policy._replace(context_length=shorter)

    def init(key: Array) -> Params:
        policy_key, value_key = jax.random.split(key)
        return {"policy": policy.init(policy_key), "value": value.init(value_key)}

    def outputs(
        params: Params, tokens: Array, attention_mask: Array, *, first: int = 0
    ) -> tuple[Array, Array]:
        hidden = policy.hidden(params["policy"], tokens, attention_mask, first=first)
        return hidden, value.values(params["value"], tokens, attention_mask, first=first)

    return ActorCritic(policy, init, outputs, None)


def shared_trunk(policy: LanguageModel, head: ScalarHead) -> ActorCritic:
    """A value head on the policy's own hidden states.

    Args:
      policy: any language model.
      head: reads its hidden states.

    Returns:
      an `ActorCritic` with parameters `{"policy", "head"}`.
    """

    def init(key: Array) -> Params:
        policy_key, head_key = jax.random.split(key)
        return {"policy": policy.init(policy_key), "head": head.init(head_key)}

    def value_of(params: Params, hidden: Array) -> Array:
        return head.apply(params["head"], hidden)

    def outputs(
        params: Params, tokens: Array, attention_mask: Array, *, first: int = 0
    ) -> tuple[Array, Array]:
        hidden = policy.hidden(params["policy"], tokens, attention_mask, first=first)
        return hidden, value_of(params, hidden)

    return ActorCritic(policy, init, outputs, value_of)
