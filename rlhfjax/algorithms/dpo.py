"""DPO from preference pairs; cDPO where labels are smoothed."""

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
      beta: β of the implicit reward.
      label_smoothing: ε, the probability that a label is wrong; above 0 it is cDPO.
    """

    beta: float | Array = 0.1
    label_smoothing: float | Array = 0.0


def pair_loss(
    chosen: Responses,
    rejected: Responses,
    hyper: Hyperparameters,
    *,
    mask: Array,
    weights: float | Array,
) -> Loss:
    """`preference.cdpo` of sums over tokens: -(1 - ε)·log σ(m) - ε·log σ(-m).

    Args:
      chosen: the preferred responses.
      rejected: the others.
      hyper: the numbers.
      mask: [B] bool, the rows that are pairs.
      weights: of pairs.

    Returns:
      the loss and its metrics.

    References:
      Rafailov et al. 2023, Direct Preference Optimization, eq. 7; Mitchell 2023, A note on DPO
      with noisy preferences and relationship to IPO (cDPO).
    """
    (now, ref), (other, ref_other) = chosen.sums, rejected.sums
    return preference.cdpo(
        now,
        other,
        ref,
        ref_other,
        mask,
        beta=hyper.beta,
        label_smoothing=hyper.label_smoothing,
        weights=weights,
    )


State = train_state.TrainState
init = train_state.init
loss = partial(direct.loss, pair_loss=pair_loss)
make_step = direct.maker(loss)
