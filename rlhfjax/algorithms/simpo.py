"""SimPO from preference pairs: no reference, rewards per token, a target margin."""

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
      margin: γ, by how much the rewards should differ.
    """

    beta: float | Array = 2.0
    margin: float | Array = 0.5


def pair_loss(
    chosen: Responses,
    rejected: Responses,
    hyper: Hyperparameters,
    *,
    mask: Array,
    weights: float | Array,
) -> Loss:
    """`reference_free.simpo` of means over tokens.

    Args:
      chosen: the preferred responses.
      rejected: the others.
      hyper: the numbers.
      mask: [B] bool, the rows that are pairs.
      weights: of pairs.

    Returns:
      the loss and its metrics.

    References:
      Meng et al. 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward.
    """
    return reference_free.simpo(
        chosen.mean, rejected.mean, mask, beta=hyper.beta, margin=hyper.margin, weights=weights
    )


State = train_state.TrainState
init = train_state.init
loss = partial(direct.loss, pair_loss=pair_loss)
make_step = direct.maker(loss)
