"""RLOO: REINFORCE with the other responses to the same prompt as baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
from jax import Array

from rlhfjax import advantages, kl, masked
from rlhfjax.algorithms import critic_free, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.losses import sequence_policy
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of the k1 penalty in the reward.
      clip_range: ε of the ratio of whole responses.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.05
    clip_range: float | Array = 0.2


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """A = R - mean of R over the other responses to the prompt, R = score - β·Σₜ k1ₜ.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience with advantages [B].

    References:
      Ahmadian et al. 2024, Back to Basics, eq. 8.
    """
    divergence = kl.k1(batch.rollout.log_probs, batch.ref_log_probs)
    divergence = masked.sum(divergence, batch.mask, axis=1)
    rewards = advantages.penalize_kl(batch.scores, divergence, batch.scored, kl_coef=hyper.kl_coef)

    def relative(rewards: Array, scored: Array, group_ids: Array) -> Array:
        return advantages.leave_one_out(rewards, group_ids, scored)

    return replace(batch, advantages=batch.by_group(relative, rewards, batch.scored))


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`sequence_policy.rloo_clip`: a response is one action. On the first update, REINFORCE.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics.
    """
    return sequence_policy.rloo_clip(
        log_probs,
        batch.rollout.log_probs,
        batch.advantages,
        batch.mask,
        clip_range=hyper.clip_range,
    )


Config = critic_free.GroupConfig
State = iteration.State
init, sample = iteration.init, critic_free.sample
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
