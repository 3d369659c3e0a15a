"""GSPO: GRPO with one ratio a response, the geometric mean of those of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array

from rlhfjax import kl
from rlhfjax.algorithms import critic_free, grpo, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.losses import sequence_policy
from rlhfjax.losses.reductions import sequence_mean
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of k3 in the loss; the paper has none.
      clip_range: ε below 1 of the ratio of a response.
      clip_range_high: ε above 1.
      std_eps: added to the standard deviation of a group.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.0
    clip_range: float | Array = 3e-4
    clip_range_high: float | Array = 4e-4
    std_eps: float | Array = 1e-4


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`sequence_policy.gspo_token` + β·k3, the mean over responses of the means over their tokens.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics, with TRL's `kl`, the mean of k3.

    References:
      Zheng et al. 2025, Group Sequence Policy Optimization, eq. 5, in the form of eq. 14.
    """
    surrogate, metrics = sequence_policy.gspo_token(
        log_probs,
        batch.rollout.log_probs,
        batch.advantages,
        batch.mask,
        clip_range=hyper.clip_range,
        clip_range_high=hyper.clip_range_high,
    )
    divergence = sequence_mean(kl.k3(log_probs, batch.ref_log_probs), batch.mask)
    return surrogate + hyper.kl_coef * divergence, metrics | {"kl": divergence}


Config = critic_free.GroupConfig
State = iteration.State
init, sample, estimate = iteration.init, critic_free.sample, grpo.estimate
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
