"""Learning from one's own samples: sample → reward → learn, as one program or as two halves.

What PPO and the algorithms without a critic have in common. A phase is a pure function; `makers`
compiles two of them around a reward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import advantages, masked, sharding
from rlhfjax.algorithms import checks
from rlhfjax.types import LanguageModel, Params, Rollout

Metrics = dict[str, Array]
Reward = Callable[[Params, Rollout], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that changes.

    Attributes:
      params: of the policy.
      opt_state: the optimiser's state.
      key: typed key; iteration i uses `fold_in(key, i)`, the key itself never changes.
      step: [] int32, iterations done, whether or not any of their updates was left out.
      num_skipped: [] int32, updates left out because a gradient was not finite.
    """

    params: Params
    opt_state: optax.OptState
    key: Array
    step: Array
    num_skipped: Array


def init(params: Params, optimizer: optax.GradientTransformation, key: Array) -> State:
    """The state before the first iteration.

    Args:
      params: of the policy. Copied, because steps donate their state.
      optimizer: any optax optimiser; `optax.inject_hyperparams` makes its numbers traced too.
      key: a typed key.

    Returns:
      a `State`.
    """
    params = jax.tree.map(jnp.copy, params)
    return State(params, optimizer.init(params), jnp.copy(key), jnp.int32(0), jnp.int32(0))


def keys(state: Any) -> tuple[Array, Array]:
    """The keys of an iteration: to sample with, and to shuffle with.

    Args:
      state: anything with `key` and `step`.

    Returns:
      two typed keys.
    """
    sample_key, shuffle_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return sample_key, shuffle_key


def _checked(samples: Rollout, scores: Array) -> Array:
    wanted = samples.response_mask.shape
    if jnp.shape(scores) not in (wanted, wanted[:1]):
        raise ValueError(
            f"scores are {list(jnp.shape(scores))}: give one to each response, {list(wanted[:1])}, "
            f"or one to each token, {list(wanted)}, such as `Episodes.token_rewards`"
        )
    return jnp.asarray(scores, jnp.float32)


def of_responses(samples: Rollout, scores: Array) -> Array:
    """Σ rewards of a response, for what compares responses and nothing else.

    Args:
      samples: the rollout.
      scores: [B], or [B, T] rewards of tokens, of which those at masked ones are not read.

    Returns:
      [B] float32, not finite where a reward is not.

    Raises:
      ValueError: the scores have another shape.
    """
    scores = _checked(samples, scores)
    return scores if scores.ndim == 1 else jnp.where(samples.response_mask, scores, 0.0).sum(1)


def leave_out_unscored(samples: Rollout, scores: Array) -> tuple[Rollout, Array]:
    """Empties the response mask of samples whose score is not finite.

    Args:
      samples: the rollout.
      scores: [B], or [B, T] rewards of tokens, all of which must be finite; those at masked ones,
        such as observations, are not read.

    Returns:
      the rollout, in which such samples count nowhere, and rewards [B, T], 0 where masked: those
      given, or each score at the last token of its response.

    Raises:
      ValueError: the scores have another shape.
    """
    scores = _checked(samples, scores)
    scored = jnp.isfinite(scores)
    if scores.ndim == 2:
        scored = (scored | ~samples.response_mask).all(1)
    mask = samples.response_mask & scored[:, None]
    place = masked.fill if scores.ndim == 2 else advantages.score_at_end
    return replace(samples, response_mask=mask), place(scores, mask)


def objective_metrics(
    samples: Rollout, scores: Array, divergence: Array, kl_coef: float | Array
) -> Metrics:
    """TRL's `objective/…`: means over the scored responses, in nats a response.

    Args:
      samples: the rollout without the unscored, see `leave_out_unscored`.
      scores: [B]
      divergence: [B, T] k1 of the tokens against the reference.
      kl_coef: β.

    Returns:
      `objective/kl`; `objective/entropy`, of -log π of the samples; `objective/scores`;
      `objective/non_score_reward`, -β·kl; `objective/rlhf_reward`, scores - β·kl;
      `objective/kl_coef`; `val/num_scored` and `val/num_unscored`, responses: an iteration without
      any of the former changes neither parameters nor optimiser.
    """
    mask = samples.response_mask
    scored = mask.any(1)
    mean_kl = masked.mean(masked.sum(divergence, mask, axis=1), scored)
    mean_score = masked.mean(scores, scored)
    return {
        "objective/kl": mean_kl,
        "objective/entropy": masked.mean(masked.sum(-samples.log_probs, mask, axis=1), scored),
        "objective/non_score_reward": -kl_coef * mean_kl,
        "objective/rlhf_reward": mean_score - kl_coef * mean_kl,
        "objective/scores": mean_score,
        "objective/kl_coef": jnp.float32(kl_coef),
        "val/num_scored": scored.sum(),
        "val/num_unscored": (~scored).sum(),
    }


def makers(
    sample: Callable[..., Rollout],
    learn: Callable[..., tuple[Any, Metrics]],
    *,
    policy_of: Callable[[Any], LanguageModel] = lambda model: model,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`make_step` and `make_halves` of an algorithm.

    Both refuse a config whose tokens the policy does not know; what they make refuses prompts and
    samples with such tokens, before it is compiled, where it is called with arrays.

    Args:
      sample: `(state, prompts, prompt_mask, hyper, *, model, config) -> rollout`.
      learn: `(state, rollout, scores, ref_params, hyper, *, model, optimizer, config) ->
        (state, metrics)`.
      policy_of: the language model in what is trained.

    Returns:
      the two functions.
    """

    def make_step(
        model: Any, reward: Reward, optimizer: optax.GradientTransformation, config: Any
    ) -> Callable[..., tuple[Any, Metrics]]:
        """A whole iteration as one compiled program, to scan over iterations or vmap over seeds.

        Args:
          model: what is trained: a `LanguageModel`, or PPO's `ActorCritic`.
          reward: `(reward_params, rollout) -> scores [B]`, or [B, T] of tokens; pure.
          optimizer: any optax optimiser; one update a minibatch.
          config: what is static.

        Returns:
          `step(state, prompts, prompt_mask, ref_params, reward_params, hyper) -> (state, metrics)`.
          The state is donated.

        Raises:
          ValueError: a token of the config is not in the vocabulary.
        """
        vocab_size = policy_of(model).vocab_size
        checks.special_tokens(config, vocab_size=vocab_size)
        draw = partial(sample, model=model, config=config)
        update = partial(learn, model=model, optimizer=optimizer, config=config)

        def step(
            state: Any,
            prompts: Array,
            prompt_mask: Array,
            ref_params: Params,
            reward_params: Params,
            hyper: Any,
        ) -> tuple[Any, Metrics]:
            samples = draw(state, prompts, prompt_mask, hyper)
            return update(state, samples, reward(reward_params, samples), ref_params, hyper)

        compiled = sharding.Step(step)
        return checks.Checked(compiled, "prompts", vocab_size=vocab_size)

    def make_halves(
        model: Any, optimizer: optax.GradientTransformation, config: Any
    ) -> tuple[Callable[..., Rollout], Callable[..., tuple[Any, Metrics]]]:
        """The same iteration as two compiled programs, for a reward that runs in Python.

        Args:
          model: what is trained.
          optimizer: any optax optimiser.
          config: what is static.

        Returns:
          `sample(state, prompts, prompt_mask, hyper) -> rollout` and
          `learn(state, rollout, scores, ref_params, hyper) -> (state, metrics)`, which donates the
          state. `rewards.call` turns a Python function's answer into scores.

        Raises:
          ValueError: a token of the config is not in the vocabulary.
        """
        vocab_size = policy_of(model).vocab_size
        checks.special_tokens(config, vocab_size=vocab_size)
        draw = jax.jit(partial(sample, model=model, config=config))
        update = sharding.Step(partial(learn, model=model, optimizer=optimizer, config=config))
        return (
            checks.Checked(draw, "prompts", vocab_size=vocab_size),
            checks.Checked(update, "samples", vocab_size=vocab_size),
        )

    return make_step, make_halves
