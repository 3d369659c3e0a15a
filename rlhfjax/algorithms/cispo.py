"""CISPO: GRPO's advantages, and clipped ratios as weights, so that no token loses its gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array

from rlhfjax import kl, masked
from rlhfjax.algorithms import critic_free, grpo, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.losses import policy
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of k3 in the loss; the paper has none.
      clip_range: ε below 1 of the weight; 1 for no bound, as in the paper.
      clip_range_high: ε above 1; TRL proposes a cap 1 + ε of 5.
      std_eps: added to the standard deviation of a group.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.0
    clip_range: float | Array = 1.0
    clip_range_high: float | Array = 4.0
    std_eps: float | Array = 1e-4


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`policy.cispo` + β·k3, means over the tokens of the batch.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics, with TRL's `kl`, the mean of k3.

    References:
      MiniMax 2025, MiniMax-M1, eq. 4.
    """
    surrogate, metrics = policy.cispo(
        log_probs,
        batch.rollout.log_probs,
        batch.advantages,
        batch.mask,
        clip_range=hyper.clip_range,
        clip_range_high=hyper.clip_range_high,
    )
    divergence = masked.mean(kl.k3(log_probs, batch.ref_log_probs), batch.mask)
    return surrogate + hyper.kl_coef * divergence, metrics | {"kl": divergence}


Config = critic_free.GroupConfig
State = iteration.State
init, sample, estimate = iteration.init, critic_free.sample, grpo.estimate
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
