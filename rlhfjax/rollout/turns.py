"""One turn of a batch: tokens one after the other until every row has ended its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import sampling, sharding
from rlhfjax.log_probs import token_log_probs
from rlhfjax.types import LanguageModel, Params

Columns = dict[str, Array]
Carry = tuple[Array, Columns, Array, Array, Any]
"""Next token, columns, rows that ended, whether all have, cache."""


@dataclass(frozen=True)
class Writer:
    """How tokens are drawn; see `generate` for each.

    Attributes:
      model: the policy.
      num_tokens: T.
      pad_token: fills a turn behind its end.
      end_token: one, several or None.
      sampler: from logits and uniform numbers to tokens.
      value_of: reads the states that tokens are sampled from.
    """

    model: LanguageModel
    num_tokens: int
    pad_token: int
    end_token: int | tuple[int, ...] | None = None
    sampler: Callable[[Array, Array], Array] = sampling.categorical
    value_of: Callable[[Array], Array] | None = None

    def uniforms(self, row_keys: Array) -> Array:
        """[B, T], the randomness of a turn."""
        return jax.vmap(lambda key: jax.random.uniform(key, (self.num_tokens,)))(row_keys)

    def write(
        self,
        params: Params,
        hidden: Array,
        cache: Any,
        uniforms: Array,
        waiting: Array,
        *,
        temperature: float | Array,
        feed: Callable[[Any, Array, Array], tuple[Array, Any]],
    ) -> tuple[Columns, Array, Any]:
        """A turn of each row that does not wait.

        Args:
          params: of the policy.
          hidden: [B, D], the state that the first token is sampled from.
          cache: behind that state.
          uniforms: [B, T].
          waiting: [B] bool, rows without a turn.
          temperature: the logits are divided by it.
          feed: `(cache, tokens [B], real [B]) -> (hidden [B, D], cache)`, one token further.

        Returns:
          columns [T, B]: `token`, padding where `real` is False; `real`; `log_prob`; `value`, where
          it is read. Then t, the number of tokens of the longest turn, the last of which is not yet
          in the cache; and the cache.
        """
        end_token, num_tokens, value_of = self.end_token, self.num_tokens, self.value_of
        uniforms = uniforms.T

        def sample(
            columns: Columns, t: Array | int, hidden: Array, done: Array
        ) -> tuple[Columns, Array]:
            logits = self.model.logits(params, hidden).astype(jnp.float32) / temperature
            token = self.sampler(logits, uniforms[t])
            new = {"real": ~done, "log_prob": token_log_probs(logits, token)}
            if value_of is not None:
                new["value"] = value_of(hidden).astype(jnp.float32)
            new["token"] = jnp.where(done, self.pad_token, token).astype(jnp.int32)
            columns = {name: columns[name].at[t].set(new[name]) for name in new}
            if end_token is not None:
                done = done | jnp.isin(new["token"], jnp.asarray(end_token))
            return columns, done

        def not_finished(carry: Carry) -> Array | bool:
            t, _, _, finished, _ = carry
            return t < num_tokens if end_token is None else (t < num_tokens) & ~finished

        def advance(carry: Carry) -> Carry:
            t, columns, done, _, cache = carry
            hidden, cache = feed(cache, columns["token"][t - 1], columns["real"][t - 1])
            columns, done = sample(columns, t, hidden, done)
            return t + 1, columns, done, sharding.in_step(done.all()), cache

        shape = num_tokens, len(hidden)
        columns = {"real": jnp.zeros(shape, bool), "log_prob": jnp.zeros(shape)}
        if value_of is not None:
            columns["value"] = jnp.zeros(shape)
        columns["token"] = jnp.full(shape, self.pad_token, jnp.int32)
        columns, done = sample(columns, 0, hidden, waiting)
        start = jnp.int32(1), columns, done, sharding.in_step(done.all()), cache
        t, columns, _, _, cache = jax.lax.while_loop(not_finished, advance, start)
        return columns, t, cache
