"""ORPO from preference pairs: likelihood of the chosen response and odds against the rejected."""

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
      beta: the weight of the odds ratio (the paper's λ).
    """

    beta: float | Array = 0.1


def pair_loss(
    chosen: Responses,
    rejected: Responses,
    hyper: Hyperparameters,
    *,
    mask: Array,
    weights: float | Array,
) -> Loss:
    """-log π(chosen) per token + `reference_free.orpo` of means over tokens.

    The likelihood is of responses; TRL's is of prompts too.

    Args:
      chosen: the preferred responses.
      rejected: the others.
      hyper: the numbers.
      mask: [B] bool, the rows that are pairs.
      weights: of pairs.

    Returns:
      the loss and its metrics, with `nll_loss`.

    References:
      Hong et al. 2024, ORPO: Monolithic Preference Optimization without Reference Model, eq. 6.
    """
    odds, metrics = reference_free.orpo(
        chosen.mean, rejected.mean, mask, beta=hyper.beta, weights=weights
    )
    likelihood = direct.chosen_likelihood(chosen, mask, weights)
    return likelihood + odds, metrics | {"nll_loss": direct.chosen_likelihood(chosen, mask, 1.0)}


State = train_state.TrainState
init = train_state.init
loss = partial(direct.loss, pair_loss=pair_loss)
make_step = direct.maker(loss)
