"""A compiled step that leaves its state where it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from rlhfjax.sharding.axes import free

_Places = tuple[NamedSharding | None, ...]


class Step:
    """`jax.jit` of `(state, …) -> (state, …)` for loops: donates the state, and leaves it in place.

    On a mesh the arrays of the new state are divided as those of the old one were, whatever rules
    put them there, so that the next call runs the same program.

    Args:
      function: the state is its first argument and its first result.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        functools.update_wrapper(self, function)

        def run(places: _Places, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            state, *rest = function(state, *args, **kwargs)
            leaves, structure = jax.tree.flatten(state)
            if places:
                leaves = [
                    x if place is None else jax.lax.with_sharding_constraint(x, place)
                    for x, place in zip(leaves, places, strict=True)
                ]
            return jax.tree.unflatten(structure, leaves), *rest

        run.__name__ = getattr(function, "__name__", run.__name__)
        self._run = jax.jit(run, static_argnums=0, donate_argnums=1)

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """The function."""
        return self._run(_places(state), state, *args, **kwargs)

    def trace(self, state: Any, *args: Any, **kwargs: Any) -> jax.stages.Traced:
        """`jax.jit(…).trace`, of arrays or of `jax.ShapeDtypeStruct` with shardings."""
        return self._run.trace(_places(state), state, *args, **kwargs)

    def lower(self, state: Any, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """`jax.jit(…).lower`, likewise."""
        return self._run.lower(_places(state), state, *args, **kwargs)

    def eval_shape(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """`jax.jit(…).eval_shape`, likewise."""
        return self._run.eval_shape(_places(state), state, *args, **kwargs)


def _places(state: Any) -> _Places:
    """Where the arrays of a state lie, as far as it is on a mesh and known while tracing."""
    mesh = jax.sharding.get_abstract_mesh()
    if not free(mesh, mesh.axis_names):
        return ()
    known = [
        None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        for x in jax.tree.leaves(state)
    ]
    return tuple(place if isinstance(place, NamedSharding) else None for place in known)
