"""The state of an algorithm that only descends a loss, and one descent of it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes in supervised training.

    Attributes:
      params: the parameters.
      opt_state: the optimiser's state.
      step: [] int32, updates made.
    """

    params: Params
    opt_state: optax.OptState
    step: Array


def init(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update.

    Args:
      params: where training starts. Copied, because steps donate their state.
      optimizer: any optax optimiser.

    Returns:
      a `TrainState`.
    """
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """One update of the parameters.

    Args:
      state: before.
      grads: gradients, the structure of the parameters.
      optimizer: the optimiser that made the state.

    Returns:
      the state after.
    """
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
