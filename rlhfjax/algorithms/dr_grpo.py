"""Dr.GRPO: GRPO without the divisions that bias it, by σ and by the length of a response."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
from jax import Array

from rlhfjax import advantages, kl
from rlhfjax.algorithms import critic_free, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.losses import policy
from rlhfjax.losses.reductions import constant_length
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of k2 in the loss; the paper has none.
      clip_range: ε of the ratio.
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.0
    clip_range: float | Array = 0.2


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """A = score - mean of the group at every token.

    A response is in its own baseline: on average the gradient is (G - 1) / G of the exact one.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience with advantages [B, T].

    References:
      Liu et al. 2025, Understanding R1-Zero-Like Training, §3.
    """

    def relative(scores: Array, scored: Array, group_ids: Array) -> Array:
        return advantages.group_relative(scores, group_ids, scored)

    of_response = batch.by_group(relative, batch.scores, batch.scored)
    return replace(batch, advantages=advantages.spread(of_response, batch.mask))


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`policy.ppo_clip` + β·k2, sums over tokens divided by T whatever their number.

    k2 rather than k3, because its gradient on samples of the policy is that of the reverse KL of
    each token; see docs/fixed_points.md for what that does and does not see.

    Args:
      log_probs: [B, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss and its metrics, with `kl`, the same of k2.
    """
    reduce = partial(constant_length, length=batch.mask.shape[1])
    surrogate, metrics = policy.ppo_clip(
        log_probs,
        batch.rollout.log_probs,
        batch.advantages,
        batch.mask,
        clip_range=hyper.clip_range,
        reduce=reduce,
    )
    divergence = reduce(kl.k2(log_probs, batch.ref_log_probs), batch.mask)
    return surrogate + hyper.kl_coef * divergence, metrics | {"kl": divergence}


Config = critic_free.GroupConfig
State = iteration.State
init, sample = iteration.init, critic_free.sample
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
