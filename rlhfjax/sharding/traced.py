"""What traced code says of devices; without a mesh in context, nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from rlhfjax.sharding.axes import AXES, ROWS, by_rows, divided, free


def split_rows(tree: Any) -> Any:
    """In traced code: each device has its own rows of what follows. Without a mesh, nothing.

    Args:
      tree: arrays [B, …].

    Returns:
      the tree, its leading axes divided over `ROWS`, over the most devices that divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not free(mesh, ROWS):
        return tree

    def constrain(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, by_rows(x.shape, mesh))

    return jax.tree.map(constrain, tree)


def whole(tree: Any) -> Any:
    """In traced code: all of it on every device, so that every process can read it.

    Args:
      tree: arrays.

    Returns:
      the tree, replicated over the mesh; without a mesh, unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not free(mesh, mesh.axis_names):
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def table(x: Array) -> Array:
    """In traced code: a table [V, …] to look rows up in, gathered over all axes but `tensor`.

    Left alone, the compiler would divide what is looked up by its width, as the table is, and then
    gather it whole on every device to divide it by rows.

    Args:
      x: the table.

    Returns:
      the table, its entries divided by `tensor` where that divides them; without a mesh, unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not free(mesh, ROWS):
        return x
    divides = "tensor" in free(mesh, AXES) and len(x) % mesh.shape["tensor"] == 0
    return jax.lax.with_sharding_constraint(x, PartitionSpec("tensor" if divides else None))


def per_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` on each device's rows by itself, without a word between devices.

    Without a mesh this is the function.

    Args:
      function: `(shared, *rows) -> tree`, row by row: of trees of arrays [B, …] one of such arrays.
        It sees the rows of one device, whose numbers are `row_numbers(B)`, and ends its loops by
        `in_step`. `shared`, such as parameters, is gathered once, before it starts; only `tensor`
        still divides it.

    Returns:
      the function of whole batches.
    """

    def run_divided(shared: Any, *rows: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        (num_rows,) = {len(x) for x in jax.tree.leaves(rows)}
        spec = by_rows((num_rows,), mesh)
        if not any(spec):
            return function(shared, *rows)
        over = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
        run = jax.shard_map(
            function,
            in_specs=(PartitionSpec(), *[spec] * len(rows)),
            out_specs=spec,
            axis_names=set(over),
            check_vma=False,
        )
        return jax.jit(run)(shared, *rows)

    return run_divided


def row_numbers(num_rows: int) -> Array:
    """Which rows of the whole batch these are, inside of `per_device` and outside.

    Args:
      num_rows: how many there are here.

    Returns:
      [num_rows] int32.
    """
    over = divided(jax.sharding.get_abstract_mesh())
    first = jax.lax.axis_index(over) * num_rows if over else 0
    return first + jnp.arange(num_rows, dtype=jnp.int32)


@jax.custom_batching.custom_vmap
def in_step(done: Array) -> Array:
    """Inside of `per_device`: may this device end its loop?

    Where devices work together in every round of the loop, as along `tensor`, only when all may:
    one that waits for a neighbour that has gone on waits for ever. Elsewhere each for itself. Under
    vmap only when all members may: a loop that each of them could end for itself would choose
    between all of its old and new values in every round, a whole cache among them.

    Args:
      done: [] bool, of this device.

    Returns:
      [] bool.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = divided(mesh)
    alone = all(mesh.shape[axis] == 1 for axis in free(mesh, mesh.axis_names))
    return done if alone or not over else jax.lax.pmin(done.astype(jnp.int32), over) == 1


@in_step.def_vmap
def _of_all_members(axis_size: int, is_batched: list[bool], done: Array) -> tuple[Array, bool]:
    return in_step(done.all() if is_batched[0] else done), False
