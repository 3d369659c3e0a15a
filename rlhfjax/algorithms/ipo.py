"""IPO from preference pairs: the margin of a pair is led to a finite value."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jax import Array

from rlhfjax.algorithms import direct, train_state
from rlhfjax.algorithms.direct import Responses
from rlhfjax.losses import preference
from rlhfjax.types import Loss


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      beta: β (the paper's τ); the difference of the log ratios is led to 1/(2·β).
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
    """`preference.ipo` of sums over tokens, as in the paper; TRL takes means.

    Args:
      chosen: the preferred responses.
      rejected: the others.
      hyper: the numbers.
      mask: [B] bool, the rows that are pairs.
      weights: of pairs.

    Returns:
      the loss and its metrics.

    References:
      Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human
      Preferences, eq. 17.
    """
    (now, ref), (other, ref_other) = chosen.sums, rejected.sums
    return preference.ipo(now, other, ref, ref_other, mask, beta=hyper.beta, weights=weights)


State = train_state.TrainState
init = train_state.init
loss = partial(direct.loss, pair_loss=pair_loss)
make_step = direct.maker(loss)
