"""GRPO: advantages normalised within a group, the clipped ratio, k3 in the loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
from jax import Array

from rlhfjax import advantages, kl
from rlhfjax.algorithms import critic_free, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.losses import policy
from rlhfjax.losses.reductions import sequence_mean
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of k3 in the loss.
      clip_range: ε of the ratio.
      std_eps: added to the standard deviation of a group.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.04
    clip_range: float | Array = 0.2
    std_eps: float | Array = 1e-4


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """A = (score - mean of the group) / (σ of the group + ε) at every token.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience with advantages [B, T].

    References:
      Shao et al. 2024, DeepSeekMath, §4.1.2.
    """

    def normalised(scores: Array, scored: Array, group_ids: Array) -> Array:
        relative = advantages.group_relative(scores, group_ids, scored)
        return advantages.scale_by_group_std(relative, scores, group_ids, scored, eps=hyper.std_eps)

    of_response = batch.by_group(normalised, batch.scores, batch.scored)
    return replace(batch, advantages=advantages.spread(of_response, batch.mask))


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`policy.ppo_clip` + β·k3, the mean over responses of the means over their tokens.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics, with TRL's `kl`, the mean of k3.
    """
    surrogate, metrics = policy.ppo_clip(
        log_probs,
        batch.rollout.log_probs,
        batch.advantages,
        batch.mask,
        clip_range=hyper.clip_range,
        reduce=sequence_mean,
    )
    divergence = sequence_mean(kl.k3(log_probs, batch.ref_log_probs), batch.mask)
    return surrogate + hyper.kl_coef * divergence, metrics | {"kl": divergence}


Config = critic_free.GroupConfig
State = iteration.State
init, sample = iteration.init, critic_free.sample
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
