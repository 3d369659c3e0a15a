"""CPO from preference pairs: DPO under a uniform reference, with the chosen likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array

from rlhfjax.algorithms import direct, train_state
from rlhfjax.algorithms.direct import Responses
from rlhfjax.losses import reference_free
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      beta: β of the reward.
      likelihood_coef: α, the weight of the likelihood (TRL's `cpo_alpha`).
    """

    beta: float | Array = 0.1
    likelihood_coef: float | Array = 1.0


def pair_loss(
    chosen: Responses,
    rejected: Responses,
    hyper: Hyperparameters,
    *,
    mask: Array,
    weights: float | Array,
) -> Loss:
    """`reference_free.cpo` of sums over tokens - α·log π(chosen) per token.

    Args:
      chosen: the preferred responses.
      rejected: the others.
      hyper: the numbers.
      mask: [B] bool, the rows that are pairs.
      weights: of pairs.

    Returns:
      the loss and its metrics, with `nll_loss`.

    References:
      Xu et al. 2024, Contrastive Preference Optimization, eq. 6.
    """
    contrast, metrics = reference_free.cpo(
        chosen.sums[0], rejected.sums[0], mask, beta=hyper.beta, weights=weights
    )
    likelihood = direct.chosen_likelihood(chosen, mask, weights)
    metrics |= {"nll_loss": direct.chosen_likelihood(chosen, mask, 1.0)}
    return contrast + hyper.likelihood_coef * likelihood, metrics


State = train_state.TrainState
init = train_state.init
loss = partial(direct.loss, pair_loss=pair_loss)
make_step = direct.maker(loss)
