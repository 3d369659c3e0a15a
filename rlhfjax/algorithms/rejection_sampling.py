"""Rejection sampling with fine-tuning: the best response of each group becomes training text.

One iteration with many prompts and epochs is rejection-sampling fine-tuning (RAFT, Llama 2);
iterations, each from the newest policy, are expert iteration.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.algorithms import best_of_n, critic_free, iteration
from rlhfjax.algorithms.best_of_n import Hyperparameters
from rlhfjax.algorithms.critic_free import Experience
from rlhfjax.losses import supervised
from rlhfjax.types import Loss


def estimate(batch: Experience, hyper: Hyperparameters) -> Experience:
    """Keeps the response of the highest score of each group.

    Args:
      batch: the experience.
      hyper: the numbers.

    Returns:
      the experience of N rows.

    References:
      Dong et al. 2023, RAFT: Reward rAnked FineTuning; Anthony et al. 2017, expert iteration.
    """
    scores = masked.fill(batch.scores, batch.scored, value=-jnp.inf)
    return replace(best_of_n.select(batch, scores, group_size=batch.group_size), group_size=1)


def loss(log_probs: Array, batch: Experience, hyper: Hyperparameters) -> Loss:
    """-log π of the kept responses, the mean over their tokens.

    Args:
      log_probs: [N, T] under the policy that is trained.
      batch: a minibatch.
      hyper: the numbers.

    Returns:
      the loss, without metrics.
    """
    return supervised.language_model(log_probs, batch.mask), {}


Config = best_of_n.Config
State = iteration.State
init, sample = iteration.init, critic_free.sample
learn = partial(critic_free.learn, estimate=estimate, loss=loss)
make_step, make_halves = iteration.makers(sample, learn)
