"""Best-of-n: the response with the highest score of n; nothing is trained.

Its law is known exactly, `tasks.fixed_points.best_of_n`, and it is what to compare training with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.algorithms import checks, critic_free, iteration
from rlhfjax.algorithms.iteration import Metrics, Reward, State
from rlhfjax.types import LanguageModel, Params, Rollout


@dataclass(frozen=True)
class Config(critic_free.Config):
    """`critic_free.Config`; n is the group's size, and may be 1."""

    group_size: int = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of `objective/rlhf_reward`; it is reported, and nothing is penalised.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.0


sample = critic_free.sample


def init(params: Params, key: Array) -> State:
    """The state before the first step.

    Args:
      params: of the policy. Copied, because steps donate their state.
      key: a typed key.

    Returns:
      a `State` without an optimiser; only its step ever changes.
    """
    params = jax.tree.map(jnp.copy, params)
    return State(params, (), jnp.copy(key), jnp.int32(0), jnp.int32(0))


def select(rows: Any, scores: Array, *, group_size: int) -> Any:
    """The row of the highest score of each group; of equal ones the first.

    Args:
      rows: a tree of arrays with N·G rows each.
      scores: [N·G]; one that is not finite is never chosen where another is.
      group_size: G.

    Returns:
      the tree, N rows each.

    Raises:
      AssertionError: the scores are not one a row.
    """
    chex.assert_rank(scores, 1)
    grouped = jnp.where(jnp.isfinite(scores), scores, -jnp.inf).reshape(-1, group_size)
    chosen = jnp.arange(len(grouped)) * group_size + grouped.argmax(1)
    return jax.tree.map(lambda x: x[chosen], rows)


def make_step(
    model: LanguageModel, reward: Reward, config: Config
) -> Callable[..., tuple[State, Rollout, Metrics]]:
    """Sample, score, select, as one compiled program. With a Python reward, call the three.

    Args:
      model: the policy.
      reward: `(reward_params, rollout) -> scores [N·G]`, or [N·G, T] of tokens; pure.
      config: what is static.

    Returns:
      `step(state, prompts, prompt_mask, reward_params, hyper) -> (state, rollout, metrics)`: the
      best response to each prompt, the mean scores of all and of the best, and how many have a
      score and have none. The state is donated.

    Raises:
      ValueError: a token of the config is not in the vocabulary.
    """
    checks.special_tokens(config, vocab_size=model.vocab_size)

    def step(
        state: State,
        prompts: Array,
        prompt_mask: Array,
        reward_params: Params,
        hyper: Hyperparameters,
    ) -> tuple[State, Rollout, Metrics]:
        samples = sample(state, prompts, prompt_mask, hyper, model=model, config=config)
        scores = iteration.of_responses(samples, reward(reward_params, samples))
        best = select((samples, scores), scores, group_size=config.group_size)
        scored = jnp.isfinite(scores)
        metrics = {
            "objective/scores": masked.mean(scores, scored),
            "objective/best_scores": masked.mean(best[1], jnp.isfinite(best[1])),
            "val/num_scored": scored.sum(),
            "val/num_unscored": (~scored).sum(),
        }
        return replace(state, step=state.step + 1), best[0], metrics

    compiled = sharding.Step(step)
    return checks.Checked(compiled, "prompts", vocab_size=model.vocab_size)
