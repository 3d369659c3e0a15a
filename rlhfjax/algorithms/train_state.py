"""Descending a loss: the state of an algorithm that does nothing else, one update, and epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.types import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that changes in supervised training.

    Attributes:
      params: the parameters.
      opt_state: the optimiser's state.
      step: [] int32, batches seen: an update that was left out is a step all the same.
      num_skipped: [] int32, updates left out because a gradient was not finite.
    """

    params: Params
    opt_state: optax.OptState
    step: Array
    num_skipped: Array


def init(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update.

    Args:
      params: where training starts. Copied, because steps donate their state.
      optimizer: any optax optimiser.

    Returns:
      a `TrainState`.
    """
    params = jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))


def update(
    params: Params,
    opt_state: optax.OptState,
    grads: Params,
    wanted: bool | Array = True,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[Params, optax.OptState, Array]:
    """One update, or none: where a gradient is not finite, nothing changes, to the last bit.

    Args:
      params: before.
      opt_state: the optimiser's state before.
      grads: gradients, the structure of the parameters.
      wanted: [] bool; False leaves the update out whatever the gradients are.
      optimizer: the optimiser that made the state.

    Returns:
      parameters and optimiser's state after, and [] bool, whether all gradients were finite.
    """
    finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(grads)]).all()
    updates, new_state = optimizer.update(grads, opt_state, params)
    new = optax.apply_updates(params, updates), new_state
    # Selected and not branched on: a select is part of the loop that computes the new values, a
    # branch would copy the old ones.
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite & wanted, new, old), new, (params, opt_state)
    )
    return params, opt_state, finite


def apply_gradients(
    state: TrainState, grads: Params, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Array]]:
    """One step: `update`, counted.

    Args:
      state: before.
      grads: gradients, the structure of the parameters.
      optimizer: the optimiser that made the state.

    Returns:
      the state after, and the metric `val/num_skipped`, 1 where the update was left out.
    """
    params, opt_state, finite = update(state.params, state.opt_state, grads, optimizer=optimizer)
    skipped = (~finite).astype(jnp.int32)
    state = TrainState(params, opt_state, state.step + 1, state.num_skipped + skipped)
    return state, {"val/num_skipped": skipped}


def descend(
    loss: Callable[[Params, Any], tuple[Array, dict[str, Array]]],
    params: Params,
    opt_state: optax.OptState,
    data: Any,
    key: Array,
    *,
    wanted: Callable[[Any], Array | bool] = lambda minibatch: True,
    optimizer: optax.GradientTransformation,
    num_epochs: int,
    num_minibatches: int,
) -> tuple[Params, optax.OptState, dict[str, Array]]:
    """Epochs × minibatches of updates; every epoch sees all rows once, in a new order.

    An update is left out, see `update`, where a gradient is not finite and where its minibatch
    teaches nothing: moments and weight decay would move the parameters without a reason.

    Args:
      loss: `(params, minibatch) -> (loss, metrics)`.
      params: where it starts.
      opt_state: the optimiser's state.
      data: a tree of arrays with B rows each.
      key: a typed key; consumed.
      wanted: `(minibatch) -> [] bool`, whether there is anything in it to learn from.
      optimizer: the optimiser that made the state.
      num_epochs: passes over the data.
      num_minibatches: updates in each pass; must divide B.

    Returns:
      parameters, optimiser's state, and the metrics of every update, [updates] each; with
      `made`, whether there was one, and `val/num_skipped`, 1 where a gradient was not finite.

    Raises:
      ValueError: the minibatches do not divide the rows.
    """
    num_rows = jax.tree.leaves(data)[0].shape[0]
    if num_rows % num_minibatches:
        raise ValueError(
            f"{num_rows} rows do not divide into num_minibatches={num_minibatches}: "
            "choose a divisor, or another number of prompts"
        )

    def advance(
        carry: tuple[Params, optax.OptState], rows: Array
    ) -> tuple[tuple[Params, optax.OptState], dict[str, Array]]:
        params, opt_state = carry
        minibatch = sharding.split_rows(jax.tree.map(lambda x: x[rows], data))
        grads, metrics = jax.grad(loss, has_aux=True)(params, minibatch)
        teaches = jnp.asarray(wanted(minibatch))
        params, opt_state, finite = update(params, opt_state, grads, teaches, optimizer=optimizer)
        counted = {"made": finite & teaches, "val/num_skipped": (~finite).astype(jnp.int32)}
        return (params, opt_state), metrics | counted

    epoch_keys = jax.random.split(key, num_epochs)
    rows = jax.vmap(lambda key: jax.random.permutation(key, num_rows))(epoch_keys)
    rows = rows.reshape(-1, num_rows // num_minibatches)
    (params, opt_state), metrics = jax.lax.scan(advance, (params, opt_state), rows)
    return params, opt_state, metrics


def over_updates(measured: dict[str, Array]) -> dict[str, Array]:
    """What `descend` measured as one number each: means over the updates that were made.

    Args:
      measured: [updates] each.

    Returns:
      [] each, 0 where no update was made; `val/num_skipped` is the sum.
    """
    measured = dict(measured)
    made, num_skipped = measured.pop("made"), measured.pop("val/num_skipped").sum()
    means = {name: masked.mean(x, made) for name, x in measured.items()}
    return means | {"val/num_skipped": num_skipped}
