"""REINFORCE: the policy gradient with return-to-go, and the rest of the batch as baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import advantages, kl, masked
from rlhfjax.algorithms import critic_free, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.losses import policy, reductions
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of the k1 penalty in the reward.
      gamma: discount of a token.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.05
    gamma: float | Array = 1.0


def token_rewards(batch: Experience, *, kl_coef: float | Array) -> Array:
    """`advantages.penalize_kl` under k1: -β·k1ₜ, and what the token earned.

    Args:
      batch: the experience.
      kl_coef: β.

    Returns:
      [B, T] float32.
    """
    divergence = kl.k1(batch.rollout.log_probs, batch.ref_log_probs)
    return advantages.penalize_kl(batch.rewards, divergence, batch.mask, kl_coef=kl_coef)


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """Aₜ = Gₜ - mean of Gₜ over the other responses of the batch that have a token t.

    G is the discounted return-to-go of `token_rewards`. No response is in its own baseline, so the
    gradient is unbiased. Where no other response has a token t, the baseline is 0.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience with advantages [B, T].

    References:
      Williams 1992, Simple Statistical Gradient-Following Algorithms.
    """
    rewards = token_rewards(batch, kl_coef=hyper.kl_coef)
    returns = advantages.discounted_returns(rewards, batch.mask, gamma=hyper.gamma)
    count = batch.mask.sum(0)
    mean = masked.mean(returns, batch.mask, axis=0)
    # x - mean of the others = (x - mean of all)·n / (n - 1).
    relative = jnp.where(count > 1, (returns - mean) * count / jnp.maximum(count - 1, 1), returns)
    return replace(batch, advantages=masked.fill(relative, batch.mask))


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """-mean over responses of Σₜ Aₜ·log πₜ, the exact gradient of the objective on average.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics.
    """
    return policy.policy_gradient(
        log_probs, batch.advantages, batch.mask, reduce=reductions.sequence_sum
    )


Config = critic_free.Config
State = iteration.State
init, sample = iteration.init, critic_free.sample
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
