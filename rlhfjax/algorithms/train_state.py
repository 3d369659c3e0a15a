"""Descending a loss: the state of an algorithm that does nothing else, one update, and epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def descend(
    loss: Callable[[Params, Any], tuple[Array, dict[str, Array]]],
    params: Params,
    opt_state: optax.OptState,
    data: Any,
    key: Array,
    *,
    optimizer: optax.GradientTransformation,
    num_epochs: int,
    num_minibatches: int,
) -> tuple[Params, optax.OptState, dict[str, Array]]:
    """Epochs × minibatches of updates; every epoch sees all rows once, in a new order.

    Args:
      loss: `(params, minibatch) -> (loss, metrics)`.
      params: where it starts.
      opt_state: the optimiser's state.
      data: a tree of arrays with B rows each.
      key: a typed key; consumed.
      optimizer: the optimiser that made the state.
      num_epochs: passes over the data.
      num_minibatches: updates in each pass; must divide B.

    Returns:
      parameters, optimiser's state, and the metrics of every update, [updates] each.

    Raises:
      ValueError: the minibatches do not divide the rows.
    """
    num_rows = jax.tree.leaves(data)[0].shape[0]
    if num_rows % num_minibatches:
        raise ValueError(
            f"{num_rows} rows do not divide into num_minibatches={num_minibatches}: "
            "choose a divisor, or another number of prompts"
        )

    def update(
        carry: tuple[Params, optax.OptState], rows: Array
    ) -> tuple[tuple[Params, optax.OptState], dict[str, Array]]:
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[rows], data)
        grads, metrics = jax.grad(loss, has_aux=True)(params, minibatch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    epoch_keys = jax.random.split(key, num_epochs)
    rows = jax.vmap(lambda key: jax.random.permutation(key, num_rows))(epoch_keys)
    rows = rows.reshape(-1, num_rows // num_minibatches)
    (params, opt_state), metrics = jax.lax.scan(update, (params, opt_state), rows)
    return params, opt_state, metrics
