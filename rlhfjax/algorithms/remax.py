"""ReMax: REINFORCE with the greedy response to the same prompt as baseline."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import advantages, sampling, sharding
from rlhfjax.algorithms import critic_free, iteration, reinforce
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.types import LanguageModel, Rollout


@dataclass(frozen=True)
class Config(critic_free.Config):
    """`critic_free.Config`; a group is a sampled response and the greedy one."""

    group_size: int = field(default=2, init=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of the k1 penalty in the reward.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.05


def sample(
    state: iteration.State,
    prompts: Array,
    prompt_mask: Array,
    hyper: Hyperparameters,
    *,
    model: LanguageModel,
    config: Config,
) -> Rollout:
    """The first phase: to each prompt a sampled response in an even row, the greedy one after it.

    Args:
      state: the state at the start of the iteration.
      prompts: [N, P] int32, left-padded.
      prompt_mask: [N, P] bool.
      hyper: the numbers.
      model: the policy.
      config: lengths and tokens.

    Returns:
      a `Rollout` of 2·N rows; the reward scores both.
    """

    def either(logits: Array, uniform: Array) -> Array:
        even = sharding.row_numbers(len(logits)) % 2 == 0
        return jnp.where(even, config.sampler(logits, uniform), sampling.greedy(logits, uniform))

    return critic_free.sample(
        state, prompts, prompt_mask, hyper, model=model, config=replace(config, sampler=either)
    )


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """`advantages.remax` of score - β·k1: Aₜ = Gₜ - Σ of all rewards of the greedy response.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience of the sampled responses only, with advantages [N, T]. Where either response
      has no score, neither counts.

    References:
      Li et al. 2024, ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method.
    """
    rewards = reinforce.token_rewards(batch, kl_coef=hyper.kl_coef)
    sampled, greedy = (jax.tree.map(lambda x, row=row: x[row::2], batch) for row in (0, 1))
    mask = sampled.mask & greedy.scored[:, None]
    return replace(
        sampled,
        rollout=replace(sampled.rollout, response_mask=mask),
        advantages=advantages.remax(rewards[::2], rewards[1::2].sum(1), mask),
        group_size=1,
    )


State = iteration.State
init, loss = iteration.init, reinforce.loss
learn = partial(critic_free.learn, estimate=estimate, loss=loss, sampled=slice(0, None, 2))
make_step, make_halves = iteration.makers(sample, learn)
