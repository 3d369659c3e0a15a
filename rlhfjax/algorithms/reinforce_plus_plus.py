"""REINFORCE++: PPO without a critic, the returns-to-go whitened over the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
from jax import Array

from rlhfjax import advantages, masked
from rlhfjax.algorithms import critic_free, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.algorithms.reinforce import token_rewards
from rlhfjax.losses import policy
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of the k1 penalty in the reward.
      clip_range: ε of the ratio.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.01
    clip_range: float | Array = 0.2


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """Aₜ = (Gₜ - mean G) / σ_G over all tokens of the batch, G the undiscounted return-to-go.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience with advantages [B, T].

    References:
      Hu et al. 2025, REINFORCE++: Stabilizing Critic-Free Policy Optimization, eq. 6.
    """
    rewards = token_rewards(batch, kl_coef=hyper.kl_coef)
    returns = advantages.discounted_returns(rewards, batch.mask, gamma=1.0)
    return replace(batch, advantages=masked.whiten(returns, batch.mask))


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`policy.ppo_clip`, the mean over tokens.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics.
    """
    return policy.ppo_clip(
        log_probs,
        batch.rollout.log_probs,
        batch.advantages,
        batch.mask,
        clip_range=hyper.clip_range,
    )


Config = critic_free.Config
State = iteration.State
init, sample = iteration.init, critic_free.sample
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
