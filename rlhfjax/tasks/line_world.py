"""States 0 … n - 1 in a line, steps to the left and to the right, a reward at the right end.

Pure functions of arrays, for `jit`, `vmap` and `scan`: nothing here knows of text or of a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

LEFT, RIGHT = 0, 1
NUM_ACTIONS = 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where an episode is.

    Attributes:
      position: [] int32, 0 … n - 1.
      time: [] int32, steps since the start.
    """

    position: Array
    time: Array


class LineWorld(NamedTuple):
    """An environment as pure functions.

    Attributes:
      reset: `(key) -> state`, one of the states 0 … n - 2, all equally likely.
      step: `(state, action) -> (state, observation, reward, done)`. The observation is that of the
        new state, the reward 1 on arrival at the right end. An episode is done there or after
        `num_steps`; what is done stays as it is and gives nothing more.
      observe: `(state) -> observation`, [width] float32, the position as one of that many.
      num_states: n.
      width: size of an observation.
      num_steps: the limit.
    """

    reset: Callable[[Array], State]
    step: Callable[[State, Array], tuple[State, Array, Array, Array]]
    observe: Callable[[State], Array]
    num_states: int | Array
    width: int
    num_steps: int | Array


def line_world(*, num_states: int | Array, width: int, num_steps: int | Array) -> LineWorld:
    """A line of n states.

    Args:
      num_states: n, at least 2. Only a number: one program can be vmapped over it.
      width: size of an observation, at least n. Static.
      num_steps: after how many steps an episode is done, wherever it is.

    Returns:
      a `LineWorld`.
    """
    end = num_states - 1

    def reset(key: Array) -> State:
        return State(jax.random.randint(key, (), 0, end), jnp.int32(0))

    def is_done(state: State) -> Array:
        return (state.position == end) | (state.time >= num_steps)

    def observe(state: State) -> Array:
        return jax.nn.one_hot(state.position, width)

    def step(state: State, action: Array) -> tuple[State, Array, Array, Array]:
        going = ~is_done(state)
        move = jnp.where(action == RIGHT, 1, -1)
        position = jnp.where(going, jnp.clip(state.position + move, 0, end), state.position)
        state = State(position.astype(jnp.int32), state.time + going)
        reward = (going & (position == end)).astype(jnp.float32)
        return state, observe(state), reward, is_done(state)

    return LineWorld(reset, step, observe, num_states, width, num_steps)
