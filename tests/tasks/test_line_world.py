"""The line world, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.tasks.line_world import LEFT, RIGHT, State, line_world

WORLD = line_world(num_states=4, width=4, num_steps=6)


def at(position: int, time: int = 0) -> State:
    return State(jnp.int32(position), jnp.int32(time))


@pytest.mark.parametrize(
    ("position", "action", "arrives", "reward", "done"),
    [
        (0, LEFT, 0, 0, False),
        (0, RIGHT, 1, 0, False),
        (2, LEFT, 1, 0, False),
        (2, RIGHT, 3, 1, True),
    ],
)
def test_a_step_moves_by_one_and_pays_at_the_right_end(
    position: int, action: int, arrives: int, reward: float, done: bool
) -> None:
    state, observation, gain, finished = WORLD.step(at(position), jnp.int32(action))
    assert (int(state.position), int(state.time)) == (arrives, 1)
    np.testing.assert_array_equal(observation, np.eye(4)[arrives])
    assert (float(gain), bool(finished)) == (reward, done)


@pytest.mark.parametrize("state", [at(3, 2), at(1, 6)])
@pytest.mark.parametrize("action", [LEFT, RIGHT])
def test_what_is_done_stays_and_pays_nothing(state: State, action: int) -> None:
    after, _, gain, done = WORLD.step(state, jnp.int32(action))
    assert (int(after.position), int(after.time)) == (int(state.position), int(state.time))
    assert float(gain) == 0 and bool(done)


def test_the_last_step_is_allowed_and_ends_the_episode() -> None:
    state, _, gain, done = WORLD.step(at(1, 5), jnp.int32(LEFT))
    assert (int(state.position), int(state.time), float(gain), bool(done)) == (0, 6, 0, True)
    _, _, gain, done = WORLD.step(at(2, 5), jnp.int32(RIGHT))
    assert (float(gain), bool(done)) == (1, True)


def test_starts_are_all_states_but_the_end_and_equally_likely() -> None:
    starts = jax.vmap(WORLD.reset)(jax.random.split(jax.random.key(0), 3000))
    counts = np.bincount(starts.position, minlength=4)
    assert counts[3] == 0
    np.testing.assert_allclose(counts[:3], 1000, atol=130)  # five standard deviations
    np.testing.assert_array_equal(starts.time, 0)


def test_lines_of_different_lengths_fit_in_one_program() -> None:
    def steps_to_the_right(num_states: jax.Array) -> jax.Array:
        world = line_world(num_states=num_states, width=5, num_steps=10)

        def advance(state: State, _: None) -> tuple[State, tuple[jax.Array, jax.Array]]:
            state, observation, gain, _ = world.step(state, jnp.int32(RIGHT))
            return state, (observation, gain)

        _, seen = jax.lax.scan(advance, at(0), length=5)
        return seen

    observations, gains = jax.jit(jax.vmap(steps_to_the_right))(jnp.array([2, 5]))
    np.testing.assert_array_equal(gains, [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(observations.argmax(-1), [[1] * 5, [1, 2, 3, 4, 4]])
