"""Online DPO: two responses of the policy to each prompt, labelled by their scores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax.algorithms import critic_free, direct, dpo, iteration
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.types import Loss


@dataclass(frozen=True)
class Config(critic_free.Config):
    """`critic_free.Config`; a group is a pair."""

    group_size: int = field(default=2, init=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      temperature: of sampling, and of every log-probability.
      kl_coef: β of DPO's implicit reward.
      score_temperature: τ of the labels. At 1 the scores are those of a Bradley-Terry reward
        model; at 0 the better response is chosen for certain (TRL).
    """

    temperature: float | Array = 1.0
    kl_coef: float | Array = 0.1
    score_temperature: float | Array = 1.0


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """A = σ((score - score of the other) / τ), the probability of being preferred.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience with advantages [2·N], the better response of a pair first; a pair that lacks
      a score counts nowhere.

    References:
      Guo et al. 2024, Direct Language Model Alignment from Online AI Feedback.
    """
    pairs = batch.scores.reshape(-1, 2)
    better_first = jnp.argsort(-pairs, axis=1) + 2 * jnp.arange(len(pairs))[:, None]
    batch = jax.tree.map(lambda x: x[better_first.ravel()], batch)
    gaps = jnp.abs(pairs[:, 0] - pairs[:, 1])
    margins = jnp.where(gaps > 0, gaps / hyper.score_temperature, 0.0)
    complete = jnp.repeat(batch.scored.reshape(-1, 2).all(1), 2)
    return replace(
        batch,
        rollout=replace(batch.rollout, response_mask=batch.mask & complete[:, None]),
        advantages=jax.nn.sigmoid(jnp.stack([margins, -margins], axis=1)).ravel(),
    )


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """`dpo.pair_loss` in both orders, weighted by the probability of each.

    Args:
      log_probs: [2·N, T] under the policy that is trained.
      batch: a minibatch of pairs.
      hyper: the numbers.

    Returns:
      the loss and its metrics.
    """
    columns = (log_probs, batch.ref_log_probs, batch.mask)
    better, worse = (direct.Responses(*(x[side::2] for x in columns)) for side in (0, 1))
    of_pairs = partial(dpo.pair_loss, hyper=dpo.Hyperparameters(beta=hyper.kl_coef))
    return direct.both_orders(of_pairs, better, worse, batch.advantages[::2])


State = iteration.State
init, sample = iteration.init, critic_free.sample
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
