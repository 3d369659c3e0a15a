"""Sampling responses: prefill, then decoding with a cache inside one compiled loop."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import sampling, sharding
from rlhfjax.rollout.turns import Writer
from rlhfjax.types import LanguageModel, Params, Rollout


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Array,
    prompt_mask: Array,
    key: Array,
    *,
    num_tokens: int,
    pad_token: int,
    end_token: int | tuple[int, ...] | None = None,
    temperature: float | Array = 1.0,
    sampler: Callable[[Array, Array], Array] = sampling.categorical,
    value_of: Callable[[Array], Array] | None = None,
) -> Rollout:
    """Samples a response of at most T tokens to each prompt.

    Token t is `sampler(logits / temperature, u[t])` with one uniform number for each row and
    token, drawn from the row's own key `fold_in(key, row)`: a row's response does not depend on
    the rest of the batch. The loop ends when every row has emitted an end token. On a mesh each
    device decodes its own rows, see `sharding.per_device`; the tokens are the same.

    Args:
      model: the policy.
      params: its parameters.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool, True at real tokens.
      key: a typed key; consumed.
      num_tokens: T, static.
      pad_token: fills responses behind the end token.
      end_token: the token that ends a response and belongs to it, or several of which any does;
        None: all have T tokens.
      temperature: the logits are divided by it.
      sampler: `(logits [B, V], uniform [B]) -> tokens [B]`, such as `sampling.greedy` or
        `lambda logits, u: sampling.categorical(sampling.top_p(logits, p=0.9), u)`. On a mesh B
        are the rows of one device, `sharding.row_numbers(B)` in the batch.
      value_of: `(hidden [B, D]) -> [B]`, read from the states that the tokens are sampled from.

    Returns:
      a `Rollout`; its `log_probs` are those before any filter of the sampler.

    Raises:
      ValueError: prompt and response are longer than the model's context.
      AssertionError: shapes or dtypes are off.
    """
    chex.assert_rank([prompts, prompt_mask], 2)
    chex.assert_equal_shape([prompts, prompt_mask])
    chex.assert_type([prompts, prompt_mask], [int, bool])
    prompt_length = prompts.shape[1]
    length = prompt_length + num_tokens
    if num_tokens < 1 or length > model.context_length:
        raise ValueError(
            f"prompts of {prompt_length} tokens leave no room for responses of {num_tokens} in a "
            f"context of {model.context_length}: shorten either or build the model with a longer "
            "context_length"
        )
    writer = Writer(model, num_tokens, pad_token, end_token, sampler, value_of)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(prompts)))

    def respond(
        shared: tuple[Params, float | Array], prompts: Array, prompt_mask: Array, uniforms: Array
    ) -> Rollout:
        params, temperature = shared
        hidden, cache = model.prefill(params, prompts, prompt_mask, length=length)
        columns, _, _ = writer.write(
            params,
            hidden,
            cache,
            uniforms,
            jnp.zeros(len(prompts), bool),
            temperature=temperature,
            feed=lambda cache, tokens, _: model.decode(params, cache, tokens),
        )
        mask = columns["real"].T
        return Rollout(
            tokens=jnp.concatenate([prompts.astype(jnp.int32), columns["token"].T], 1),
            attention_mask=jnp.concatenate([prompt_mask, mask], 1),
            response_mask=mask,
            log_probs=jnp.where(mask, columns["log_prob"].T, 0.0),
            values=None if value_of is None else columns["value"].T,
        )

    shared = params, temperature
    return sharding.per_device(respond)(shared, prompts, prompt_mask, writer.uniforms(row_keys))
