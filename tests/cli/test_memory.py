"""A program that asks for more memory than there is, and what it is told."""

import re
from dataclasses import fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.cli import memory
from rlhfjax.cli.main import COMMANDS

SIZE = 3_000_000
GIB = 2**30


@partial(jax.jit, donate_argnums=0)
def outer(state: dict[str, jax.Array], batch: Any) -> tuple[dict[str, jax.Array], jax.Array]:
    """Sorts a matrix of 36 TB."""
    x = state["x"]
    smallest = jnp.sort(jnp.outer(x, batch), axis=0)[0]
    return {"key": state["key"], "x": smallest}, smallest.sum()


def state_of(size: int) -> dict[str, jax.Array]:
    return {"key": jax.random.key(0), "x": jnp.ones(size)}


def test_it_is_told_its_own_figures_and_what_helps_first() -> None:
    with pytest.raises(MemoryError) as error:
        memory.explained(outer)(state_of(SIZE), np.ones(SIZE, np.float32))
    message = str(error.value)
    figures = {
        "arguments (parameters, optimiser state, batch)": 8 * SIZE,
        "take their place": 4,
        "temporaries (activations, gradients, caches)": 4 * SIZE**2,
    }
    for what, size in figures.items():
        found = float(message.split(what)[1].split()[0].rstrip(",."))
        assert found == pytest.approx(size / GIB, rel=1e-3, abs=5e-3)
    assert (
        message.index("num_micro_batches") < message.index("remat") < message.index("fewer prompts")
    )
    assert message.index("shorter") < message.index("fsdp")
    assert "RESOURCE_EXHAUSTED" in str(error.value.__cause__)


def test_where_the_state_is_the_most_of_it_other_things_help_first() -> None:
    @jax.jit
    def pretends(x: jax.Array) -> jax.Array:
        return x + 1

    def exhausted(x: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand so on")

    exhausted.lower = pretends.lower  # type: ignore[attr-defined]
    with pytest.raises(
        MemoryError, match=r"^out of memory \(RESOURCE_EXHAUSTED: Out of memory\):"
    ) as error:
        memory.explained(exhausted)(jnp.ones(8))
    message = str(error.value)
    assert message.index("fsdp") < message.index("optimiser that") < message.index("num_micro")


def test_a_program_that_cannot_even_be_compiled_is_told_what_helps() -> None:
    def uncompilable(x: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    with pytest.raises(MemoryError, match=r"cannot be compiled to measure it: What helps"):
        memory.explained(uncompilable)(jnp.ones(8))


def test_users_of_commands_are_told_of_flags_that_there_are() -> None:
    there = {field.name for command in COMMANDS.values() for field in fields(command.arguments)}
    told = re.findall(r"--(\w+)", " ".join(memory.OF_COMMANDS.passes + memory.OF_COMMANDS.state))
    assert set(told) <= there
    assert len(told) >= 6


def test_what_fits_is_what_the_function_returns() -> None:
    state, total = memory.explained(outer)(state_of(3), batch=np.float32([3, 1, 2]))
    assert total == 6
    np.testing.assert_array_equal(state["x"], [3, 1, 2])


@pytest.mark.parametrize("error", [ValueError("no"), jax.errors.JaxRuntimeError("INTERNAL: no")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    def failing() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        memory.explained(failing)()
    assert raised.value is error
