"""Episodes of several turns: the policy writes, the environment answers, and so on.

A row is `prompt | turn 1 | observation 1 | turn 2 | … | turn K`. Prompt and observations are
left-padded, turns right-padded, so that every token of the policy follows a real one: with an
`attention_mask` that is True at observations and a `response_mask` that is not, an episode is a
`Rollout` like any other. Observations are in the context, and in no loss, statistic or
log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import advantages, masked, sampling, sequences, sharding
from rlhfjax.rollout.environments import (
    Environment,
    PythonEnvironment,
    ask_reset,
    ask_step,
    check,
)
from rlhfjax.rollout.turns import Columns, Writer
from rlhfjax.tools import NO_TOKEN
from rlhfjax.types import LanguageModel, Params, Rollout

History = dict[str, Array]
"""[K, …], what happened in each turn."""
Written = tuple[Columns, Array, Any]
"""Columns, number of tokens, and cache; see `Writer.write`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Episodes:
    """Episodes as a rollout, with what the environment said of them.

    PPO and the algorithms without a critic learn from `rollout` as it is, except ReMax, of whose
    rows every second one is greedy. Functions that take the response mask for all that is real
    behind the prompt would lose the observations and are given `with_observations`:
    `feedback.stages.soft_pairs`, `feedback.people.compared`, `feedback.templates.fields_of`.

    An episode that is cut off counts as ended: no value stands for what might have followed.

    `ppo.learn` skips observations in its advantages; other conventions are compositions with
    `advantages.gae`, whose mask is then that of `with_observations`. One that reads values at
    observations cannot take `rollout.values`, which are 0 there: it needs those of a pass over the
    tokens.

    The length that Dr. GRPO divides by, and up to which DAPO's overlong penalty grows, is L: the
    room for observations counts in it too.

    Attributes:
      rollout: responses are all that follows the prompt, L = K·T + (K - 1)·O positions; the mask is
        True where the policy wrote.
      rewards: [B, K] float32 of each turn, 0 where there was none; NaN where what the environment
        said next has a token outside of the vocabulary, and where the reward is.
      turns: [B, K] bool, the turns that were taken.
      done: [B] bool, the episode ended by itself; else the limit of turns cut it off, or a token.
      outside: [B] bool, the environment wrote a token outside of the vocabulary. The episode ends
        there, and `learn` leaves it out, as it does every sample without a finite score.
      turn_ids: [B, L] int32, the turn that a position belongs to, its observation with it.
      state: of the environment at the end: a tree of arrays [B, …], or in Python None.
    """

    rollout: Rollout
    rewards: Array
    turns: Array
    done: Array
    outside: Array
    turn_ids: Array
    state: Any = None

    @property
    def with_observations(self) -> Rollout:
        """The rollout with observations as a part of the response, for who judges or scores it.

        Not for a loss of the policy, which has not written them; pairs of such responses are for
        `reward_model`, not for `dpo`. Its mask is also that of `advantages.gae` where observations
        count as time: a mask of ones would count the padding behind turns and before observations.
        """
        size = self.rollout.response_mask.shape[1]
        return replace(self.rollout, response_mask=self.rollout.attention_mask[:, -size:])

    @property
    def returns(self) -> Array:
        """[B], Σ rewards: the score of an episode."""
        return jnp.where(self.outside, jnp.nan, self.rewards.sum(-1))

    @property
    def token_rewards(self) -> Array:
        """[B, L], the reward of each turn at its last token: scores for every `learn`."""
        mask = self.rollout.response_mask
        return advantages.at_ends_of_turns(self.rewards, self.turn_ids, mask)

    @property
    def metrics(self) -> dict[str, Array]:
        """`episodes/turns`, `episodes/return`: means; `…/truncated`, `…/outside`: numbers of them.

        Those with a token outside of the vocabulary, or another return that is no number, count in
        the last two only.
        """
        finite = jnp.isfinite(self.returns)
        return {
            "episodes/turns": masked.mean(self.turns.sum(-1), finite),
            "episodes/return": masked.mean(self.returns, finite),
            "episodes/truncated": (~self.done & ~self.outside).sum(),
            "episodes/outside": self.outside.sum(),
        }


def act(
    model: LanguageModel,
    params: Params,
    environment: Environment,
    reset_keys: Array,
    key: Array,
    *,
    num_turns: int,
    num_tokens: int,
    pad_token: int,
    end_token: int | tuple[int, ...] | None = None,
    temperature: float | Array = 1.0,
    sampler: Callable[[Array, Array], Array] = sampling.categorical,
    value_of: Callable[[Array], Array] | None = None,
) -> Episodes:
    """Samples an episode of at most K turns in each environment, all in the graph.

    The first turn draws what `generate` draws from the same key, later ones from
    `fold_in(row's key, turn)`. Rows whose turn or episode is over wait for the others, and no row
    depends on another. When all are over, no further turn is computed.

    Args:
      model: the policy; it needs `LanguageModel.extend`.
      params: its parameters.
      environment: pure functions of one episode.
      reset_keys: [B] typed keys, one an episode, not split from `key`. The G rows of a group have
        the same one: `jnp.repeat(jax.random.split(reset_key, N), G)`.
      key: a typed key for sampling; consumed. The rows' keys may be those of
        `jax.random.split(key, B)`.
      num_turns: K, static.
      num_tokens: T of a turn, static.
      pad_token: fills what is no token.
      end_token: ends a turn and belongs to it, or several of which any does, such as the end of an
        answer and that of a call; None: all have T tokens.
      temperature: as in `generate`.
      sampler: as in `generate`.
      value_of: as in `generate`; at observations `values` are 0, see `Episodes`.

    Returns:
      `Episodes`.

    Raises:
      ValueError: the model has no `extend`; the environment returns another shape or dtype than it
        must; an episode can be longer than the context, or has no turn or turns of no token;
        `pad_token` or `end_token` is outside of the vocabulary.
    """
    chex.assert_rank(reset_keys, 1)
    _check_settings(model, pad_token, end_token, num_turns=num_turns, num_tokens=num_tokens)
    prompt_tokens, observation_tokens = check(environment, num_tokens=num_tokens)
    length = _length(model, num_turns, num_tokens, prompt_tokens, observation_tokens)
    # None would have rows whose episode is over wait for T tokens of nobody.
    end_token = () if end_token is None else end_token
    writer = Writer(model, num_tokens, pad_token, end_token, sampler, value_of)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(reset_keys)))
    read = partial(_read, pad_token=pad_token, vocab_size=model.vocab_size)

    def play(shared: tuple[Params, float | Array], reset_keys: Array, row_keys: Array) -> Episodes:
        params, temperature = shared

        def take_turn(
            k: Array | int, hidden: Array, cache: Any, uniforms: Array, state: Any, over: Array
        ) -> tuple[History, Array, Any, Any, Array]:
            columns, t, cache = writer.write(
                params,
                hidden,
                cache,
                uniforms,
                over,
                temperature=temperature,
                feed=_feed(model, params),
            )
            turn = jnp.where(columns["real"], columns["token"], NO_TOKEN).T
            after, said, reward, done = jax.vmap(environment.step)(state, turn)
            state = jax.tree.map(partial(_keep, over), state, after)
            goes_on = ~over & ~done & (k + 1 < num_turns)
            said, observed, outside = read(said, goes_on)
            observed &= ~outside[:, None]
            reward = jnp.where(outside, jnp.nan, reward.astype(jnp.float32))
            new = columns | {
                "said": jnp.where(observed, said, pad_token),
                "observed": observed,
                "reward": jnp.where(over, 0.0, reward),
                "taken": ~over,
                "done": done & ~over,
                "outside": outside,
            }
            return new, t, cache, state, over | done | outside

        def not_finished(carry: tuple[Any, ...]) -> Array:
            k, *_, over = carry
            return (k < num_turns) & ~sharding.in_step(over.all())

        def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            k, history, t, cache, state, over = carry
            last = {name: history[name][k - 1, t - 1] for name in ("token", "real")}
            observation = history["said"][k - 1], history["observed"][k - 1]
            hidden, cache = _go_on(model, params, cache, last, observation)
            uniforms = writer.uniforms(jax.vmap(jax.random.fold_in, (0, None))(row_keys, k))
            new, *rest = take_turn(k, hidden, cache, uniforms, state, over)
            history = {name: x.at[k].set(new[name]) for name, x in history.items()}
            return k + 1, history, *rest

        state, said = jax.vmap(environment.reset)(reset_keys)
        prompts, prompt_mask, outside = read(said, jnp.ones(len(reset_keys), bool))
        hidden, cache = model.prefill(params, prompts, prompt_mask, length=length)
        first, *rest = take_turn(0, hidden, cache, writer.uniforms(row_keys), state, outside)
        history = _history(first, num_turns, pad_token)
        if num_turns > 1:
            start = jnp.int32(1), history, *rest
            _, history, *rest = jax.lax.while_loop(not_finished, advance, start)
        episodes = _episodes(prompts, prompt_mask, history)
        return replace(episodes, outside=episodes.outside | outside, state=rest[2])

    return sharding.per_device(play)((params, temperature), reset_keys, row_keys)


def make_act(
    model: LanguageModel,
    environment: PythonEnvironment,
    *,
    num_turns: int,
    num_tokens: int,
    prompt_tokens: int,
    observation_tokens: int,
    pad_token: int,
    end_token: int | tuple[int, ...] | None = None,
    sampler: Callable[[Array, Array], Array] = sampling.categorical,
    value_of: Callable[[Params, Array], Array] | None = None,
) -> Callable[..., Episodes]:
    """`act` in an environment that is Python, which runs between two compiled halves.

    One half begins episodes, the other goes on with them by a turn; both are compiled once. Same
    keys, same tokens as in the graph.

    Args:
      model: the policy; it needs `LanguageModel.extend`.
      environment: of many episodes at once.
      num_turns: K.
      num_tokens: T of a turn.
      prompt_tokens: P, room for a prompt.
      observation_tokens: O, room for an observation.
      pad_token: as in `act`.
      end_token: as in `act`.
      sampler: as in `act`.
      value_of: `(params, hidden [B, D]) -> [B]`; at observations `values` are 0, see `Episodes`.

    Returns:
      `act(params, seeds, key, *, temperature=1.0) -> Episodes`, with a list of B seeds; the rows of
      a group have the same one.

    Raises:
      ValueError: there are several processes, the model has no `extend`, the environment is one in
        the graph, an episode can be longer than the context, a size is 0, or `pad_token` or
        `end_token` is outside of the vocabulary. When called: with the row for which a method of
        the environment raised, did not answer in time, or returned what it must not, such as a
        token outside of the vocabulary.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "an environment in Python is asked by one process, and there are "
            f"{jax.process_count()}: each would have states and answers of its own; write the "
            "environment in the graph and use `act`, or start one process"
        )
    if isinstance(environment, Environment):
        raise ValueError("`make_act` is for an environment in Python; for an `Environment`: `act`")
    sizes = {"num_turns": num_turns, "num_tokens": num_tokens, "prompt_tokens": prompt_tokens}
    # Of one turn nobody reads an observation; of several an empty one is a token of padding.
    sizes |= {} if num_turns == 1 else {"observation_tokens": observation_tokens}
    _check_settings(model, pad_token, end_token, **sizes)
    length = _length(model, num_turns, num_tokens, prompt_tokens, observation_tokens)
    end_token = () if end_token is None else end_token
    writer_of = partial(Writer, model, num_tokens, pad_token, end_token, sampler)

    def write(
        params: Params, hidden: Array, cache: Any, row_keys: Array, over: Array, temperature: Array
    ) -> Written:
        reads = None if value_of is None else partial(value_of, params)
        writer = writer_of(reads)
        return writer.write(
            params,
            hidden,
            cache,
            writer.uniforms(row_keys),
            over,
            temperature=temperature,
            feed=_feed(model, params),
        )

    @jax.jit
    def begin(
        params: Params, prompts: Array, mask: Array, row_keys: Array, temperature: Array
    ) -> Written:
        hidden, cache = model.prefill(params, prompts, mask, length=length)
        return write(params, hidden, cache, row_keys, jnp.zeros(len(prompts), bool), temperature)

    @partial(jax.jit, donate_argnums=1)
    def go_on(
        params: Params,
        cache: Any,
        columns: dict[str, Array],
        t: Array,
        observation: tuple[Array, Array],
        over: Array,
        row_keys: Array,
        k: Array,
        temperature: Array,
    ) -> Written:
        last = {name: columns[name][t - 1] for name in ("token", "real")}
        hidden, cache = _go_on(model, params, cache, last, observation)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, k)
        return write(params, hidden, cache, keys, over, temperature)

    finish = jax.jit(_episodes)

    def padded(
        method: str, name: str, said: dict[int, list[int]], size: int, batch: int
    ) -> tuple[np.ndarray, np.ndarray]:
        tokens, mask = np.full((batch, size), pad_token, np.int32), np.zeros((batch, size), bool)
        for row, found in said.items():
            _check_tokens(method, name, row, found, size, model.vocab_size)
            found = found or [pad_token]
            tokens[row, -len(found) :], mask[row, -len(found) :] = found, True
        return tokens, mask

    def act(
        params: Params, seeds: Sequence[int], key: Array, *, temperature: float | Array = 1.0
    ) -> Episodes:
        batch, temperature = len(seeds), jnp.asarray(temperature, jnp.float32)
        states, said = ask_reset(environment, seeds)
        prompts, mask = padded("reset", "prompt", dict(enumerate(said)), prompt_tokens, batch)
        row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
        over = np.zeros(batch, bool)
        history: dict[str, list[Any]] = {}
        columns, t, cache = begin(params, prompts, mask, row_keys, temperature)
        for k in range(num_turns):
            rows = np.flatnonzero(~over).tolist()
            token, real = np.asarray(columns["token"]), np.asarray(columns["real"])
            turns = [token[real[:, row], row].tolist() for row in rows]
            after, said, rewards, done = ask_step(
                environment, rows, [states[row] for row in rows], turns
            )
            new: dict[str, Any] = dict(columns) | {
                "reward": np.zeros(batch, np.float32),
                "done": np.zeros(batch, bool),
                "taken": ~over,
                "outside": np.zeros(batch, bool),
            }
            new["reward"][rows], new["done"][rows] = rewards, done
            for row, state in zip(rows, after, strict=True):
                states[row] = state
            over = over | new["done"]
            last = k + 1 == num_turns
            read = {
                row: tokens
                for row, tokens in zip(rows, said, strict=True)
                if not (over[row] or last)
            }
            observation = padded("step", "observation", read, observation_tokens, batch)
            new["said"], new["observed"] = observation
            for name, column in new.items():
                history.setdefault(name, []).append(column)
            if last or over.all():
                break
            columns, t, cache = go_on(
                params,
                cache,
                columns,
                t,
                observation,
                over,
                row_keys,
                jnp.int32(k + 1),
                temperature,
            )
        whole = {
            name: jnp.stack(
                [*map(jnp.asarray, x), *_nothing(name, x[0], num_turns - len(x), pad_token)]
            )
            for name, x in history.items()
        }
        return finish(prompts, mask, whole)

    return act


def transcripts(samples: Rollout) -> list[list[tuple[bool, list[int]]]]:
    """The tokens of each row in the order in which they were read or written.

    Args:
      samples: of any kind; on the host.

    Returns:
      for each row its pieces, `(whether the policy wrote it, tokens)`.
    """
    tokens, real = np.asarray(samples.tokens), np.asarray(samples.attention_mask)
    written = np.zeros(real.shape, bool)
    written[:, -samples.response_mask.shape[1] :] = samples.response_mask
    rows = []
    for ids, here, own in zip(tokens, real, written, strict=True):
        pieces: list[tuple[bool, list[int]]] = []
        for token, policy in zip(ids[here].tolist(), own[here].tolist(), strict=True):
            if not pieces or pieces[-1][0] != policy:
                pieces.append((policy, []))
            pieces[-1][1].append(token)
        rows.append(pieces)
    return rows


def refuse_outside(episodes: Episodes) -> None:
    """Says where an environment in the graph wrote a token outside of the vocabulary.

    For the host, behind a step whose `episodes/outside` is not 0: nothing can be raised in the
    graph, where such an episode is left out and counted.

    Args:
      episodes: of a step.

    Raises:
      ValueError: with the first such row, the turn behind which it was, and the number of them.
    """
    rows = np.flatnonzero(np.asarray(episodes.outside))
    if not len(rows):
        return
    taken = np.asarray(episodes.turns)
    last = int(taken[rows[0]].sum())
    where = f"after turn {last} of at most {taken.shape[1]}" if last else "in its prompt"
    raise ValueError(
        f"environment.{'step' if last else 'reset'}: row {rows[0]} got a token outside of the "
        f"model's vocabulary {where}; {len(rows)} of {len(taken)} rows got one"
    )


def _check_settings(
    model: LanguageModel, pad_token: int, end_token: int | tuple[int, ...] | None, **sizes: int
) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size}: an episode has at least one")
    ends = [] if end_token is None else np.ravel(end_token).tolist()
    for name, tokens in (("pad_token", [pad_token]), ("end_token", ends)):
        for token in tokens:
            if not 0 <= token < model.vocab_size:
                raise ValueError(
                    f"{name}={token} is not in the model's vocabulary of {model.vocab_size} "
                    f"tokens, 0 to {model.vocab_size - 1}"
                )


def _length(
    model: LanguageModel, turns: int, num_tokens: int, prompt_tokens: int, observation_tokens: int
) -> int:
    if model.extend is None:
        raise ValueError(
            "the model cannot act over several turns: fill in LanguageModel.extend, which reads an "
            "observation into the cache"
        )
    length = prompt_tokens + turns * num_tokens + (turns - 1) * observation_tokens
    if length > model.context_length:
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens, {turns} turns of {num_tokens} and observations "
            f"of {observation_tokens} between them are {length} positions, which does not fit a "
            f"context of {model.context_length}: take fewer or shorter turns, or build the model "
            "with a longer context_length"
        )
    return length


def _check_tokens(
    method: str, name: str, row: int, tokens: list[int], size: int, vocab_size: int
) -> None:
    if len(tokens) > size:
        raise ValueError(
            f"environment.{method}: the {name} of row {row} has {len(tokens)} tokens, and there is "
            f"room for {size}: shorten it or raise {name}_tokens"
        )
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"environment.{method}: the {name} of row {row} has token {token}, but the model's "
                f"vocabulary has {vocab_size} tokens, 0 to {vocab_size - 1}"
            )


def _feed(model: LanguageModel, params: Params) -> Callable[[Any, Array, Array], tuple[Array, Any]]:
    assert model.extend is not None
    extend = model.extend
    return lambda cache, tokens, real: extend(params, cache, tokens[:, None], real[:, None])


def _go_on(
    model: LanguageModel,
    params: Params,
    cache: Any,
    last: dict[str, Array],
    observation: tuple[Array, Array],
) -> tuple[Array, Any]:
    """The last token of the longest turns, which no cache has seen yet, and the observation."""
    assert model.extend is not None
    tokens = jnp.concatenate([last["token"][:, None], observation[0]], axis=1)
    mask = jnp.concatenate([last["real"][:, None], observation[1]], axis=1)
    return model.extend(params, cache, tokens, mask)


def _read(
    said: Array, goes_on: Array, *, pad_token: int, vocab_size: int
) -> tuple[Array, Array, Array]:
    """What is said to rows that go on, left-padded; its mask; and whether any of it is no word."""
    known = (said >= 0) & (said < vocab_size)
    outside = goes_on & (~known & (said != NO_TOKEN)).any(1)
    tokens, mask = sequences.pad_left(said, known, pad_value=pad_token)
    nothing = ~mask.any(1)
    mask = mask.at[:, -1].set(mask[:, -1] | nothing)
    return tokens.astype(jnp.int32), mask & goes_on[:, None], outside


def _keep(over: Array, old: Array, new: Array) -> Array:
    return jnp.where(over.reshape(-1, *(1,) * (old.ndim - 1)), old, new)


def _nothing(name: str, like: Array, number: int, pad_token: int) -> Array:
    """So many turns in which nothing happened."""
    return jnp.full(
        (number, *like.shape), pad_token if name in ("token", "said") else 0, like.dtype
    )


def _history(first: dict[str, Array], num_turns: int, pad_token: int) -> History:
    return {
        name: jnp.concatenate([x[None], _nothing(name, x, num_turns - 1, pad_token)])
        for name, x in first.items()
    }


def _episodes(prompts: Array, prompt_mask: Array, history: History) -> Episodes:
    """Turns and observations side by side."""
    num_turns, num_tokens, batch = history["token"].shape
    size = history["said"].shape[2]
    length = num_turns * num_tokens + (num_turns - 1) * size

    def laid_out(turns: Array, observations: Array) -> Array:
        both = jnp.concatenate([turns.swapaxes(1, 2), observations], axis=2)
        return both.swapaxes(0, 1).reshape(batch, -1)[:, :length]

    nothing = jnp.zeros((num_turns, batch, size))
    mask = laid_out(history["real"], jnp.zeros(nothing.shape, bool))
    real = laid_out(history["real"], history["observed"])
    tokens = laid_out(history["token"], history["said"])
    log_probs = jnp.where(mask, laid_out(history["log_prob"], nothing), 0.0)
    ids = jnp.arange(length, dtype=jnp.int32) // (num_tokens + size)
    return Episodes(
        rollout=Rollout(
            tokens=jnp.concatenate([prompts, tokens], axis=1),
            attention_mask=jnp.concatenate([prompt_mask, real], axis=1),
            response_mask=mask,
            log_probs=log_probs,
            values=laid_out(history["value"], nothing) if "value" in history else None,
        ),
        rewards=history["reward"].T,
        turns=history["taken"].T,
        done=history["done"].any(0),
        outside=history["outside"].any(0),
        turn_ids=jnp.broadcast_to(ids, mask.shape),
    )
