"""One program over many devices: a mesh, where each array lies on it, and batches divided by rows.

Nothing else knows of devices. A step that `make_step` compiled runs on a mesh as it is:

    with jax.set_mesh(sharding.mesh(fsdp=2, tensor=2)) as mesh:
        start = lambda key: ppo.init(model.init(key), optimizer, key, kl_coef=0.05)
        state = sharding.init(start, mesh)(jax.random.key(0))
        prompts, prompt_mask = sharding.rows((prompts, prompt_mask), mesh)
        state, metrics = step(state, prompts, prompt_mask, ref_params, reward_params, hyper)

The axes: `data` divides the rows of a batch; `fsdp` divides the rows too, and parameters and
optimiser state, which are gathered when they are used; `tensor` divides the matrices of a layer,
whose parts all devices along it work on together.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

Rules = Sequence[tuple[str, PartitionSpec]]
"""`(regular expression over a path such as "params/layers_0/qkv/kernel", how to divide it)`."""

# The dimension that `tensor` divides: outputs of the first matrices of attention and MLP, inputs
# of the second ones, entries of vocabularies.
_BY_TENSOR = (
    (r"(^|/)(qkv|gate|up)/(kernel|bias)$", -1),
    (r"(^|/)(output|down)/kernel$", -2),
    (r"(^|/|_)embedding/embedding$", -2),
    (r"(^|/)head$", -1),
)


def mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The devices as a grid of `AXES`.

    Args:
      data: size of the axis; None for all devices that the other axes leave.
      fsdp: size of the axis.
      tensor: size of the axis.
      devices: None for all devices of all processes.

    Returns:
      the mesh, for `jax.set_mesh`.

    Raises:
      ValueError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (len(devices) // max(fsdp * tensor, 1) if data is None else data, fsdp, tensor)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        asked = " × ".join(
            f"{name}={'the rest' if size is None else size}"
            for name, size in zip(AXES, (data, fsdp, tensor), strict=True)
        )
        raise ValueError(
            f"a mesh of {asked} does not fit {len(devices)} devices: the product of the axes must "
            "be their number; pass `devices` to use some of them"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Where the arrays of parameters, an optimiser's state or an algorithm's `State` lie.

    Matrices of the decoder are divided by `tensor`: those that begin attention and MLP by their
    outputs, those that end them by their inputs, embeddings and LM head by the vocabulary. What
    the optimiser keeps of a parameter is divided as the parameter. `fsdp` divides the largest
    dimension that is left. A dimension is divided only where it divides evenly. Scalars and keys
    are whole on every device.

    Args:
      tree: arrays, or anything with a shape and a dtype, such as `jax.eval_shape` gives.
      mesh: the mesh.
      rules: come before all this; the first that is found in a path holds.

    Returns:
      the tree of `NamedSharding`.

    Raises:
      ValueError: a rule does not fit an array that it matches.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = np.shape(leaf)
        for pattern, spec in rules:
            if re.search(pattern, name):
                _check(name, shape, mesh, pattern, spec)
                return NamedSharding(mesh, spec)
        key = _is_key(leaf)
        return NamedSharding(mesh, PartitionSpec() if key else _inferred(name, shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def init(function: Callable[..., Any], mesh: Mesh, rules: Rules = ()) -> Callable[..., Any]:
    """`function`, its arrays born in their shards: no device ever holds the whole.

    Args:
      function: such as `model.init`, or a function that makes a `State`.
      mesh: the mesh.
      rules: see `shardings`.

    Returns:
      the function, compiled for every call.
    """

    def born(*args: Any) -> Any:
        places = shardings(jax.eval_shape(function, *args), mesh, rules)
        return jax.jit(function, out_shardings=places)(*args)

    return born


def put(tree: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """Whole arrays into their shards.

    Args:
      tree: NumPy or JAX arrays; the same in every process, each of which takes its part.
      mesh: the mesh.
      rules: see `shardings`.

    Returns:
      the tree of global arrays.
    """
    return jax.tree.map(_put, tree, shardings(tree, mesh, rules))


def rows(tree: Any, mesh: Mesh) -> Any:
    """A batch, divided over `ROWS`: over the most devices that its rows divide over evenly.

    Args:
      tree: arrays [B, …]; the same in every process, each of which takes its part.
      mesh: the mesh.

    Returns:
      the tree of global arrays.
    """
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, _by_rows(np.shape(x), mesh))), tree)


def rows_of_process(tree: Any, mesh: Mesh) -> Any:
    """A batch of which each process has read its own rows.

    Args:
      tree: NumPy arrays [B / count, …], the part `index` of `(index, count)` that
        `part_of_process` gives.
      mesh: the mesh.

    Returns:
      the tree of global arrays [B, …], divided over `ROWS`.

    Raises:
      ValueError: the rows do not divide over the devices of the process.
    """
    _, count = part_of_process(mesh)
    devices = math.prod(mesh.shape[axis] for axis in ROWS)

    def place(x: Any) -> Array:
        if len(x) * count % devices:
            raise ValueError(
                f"{len(x)} rows of each of {count} parts do not divide over {devices} devices: "
                f"give each process a multiple of {devices // math.gcd(count, devices)}"
            )
        spec = NamedSharding(mesh, PartitionSpec(ROWS))
        return jax.make_array_from_process_local_data(
            spec, np.asarray(x), (len(x) * count, *x.shape[1:])
        )

    return jax.tree.map(place, tree)


def part_of_process(mesh: Mesh) -> tuple[int, int]:
    """Which rows of each batch this process reads: part `index` of `count` equal ones.

    Processes that hold different parts of the same matrices, because `tensor` reaches over them,
    have the same part of the rows.

    Args:
      mesh: the mesh.

    Returns:
      index and count.
    """
    num_parts = math.prod(mesh.shape[axis] for axis in ROWS)
    by_rows = NamedSharding(mesh, PartitionSpec(ROWS))
    places: Mapping[Any, Any] = by_rows.devices_indices_map((num_parts,))
    held: dict[int, set[int]] = {}
    for device, (part,) in places.items():
        held.setdefault(device.process_index, set()).add(part.indices(num_parts)[0])
    parts = sorted({tuple(sorted(part)) for part in held.values()})
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def split_rows(tree: Any) -> Any:
    """In traced code: each device has its own rows of what follows. Without a mesh, nothing.

    Args:
      tree: arrays [B, …].

    Returns:
      the tree, its leading axes divided over `ROWS`, over the most devices that divide them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _free(mesh, ROWS):
        return tree

    def constrain(x: Array) -> Array:
        return jax.lax.with_sharding_constraint(x, _by_rows(x.shape, mesh))

    return jax.tree.map(constrain, tree)


def whole(tree: Any) -> Any:
    """In traced code: all of it on every device, so that every process can read it.

    Args:
      tree: arrays.

    Returns:
      the tree, replicated over the mesh; without a mesh, unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _free(mesh, mesh.axis_names):
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
    if not _free(mesh, ROWS):
        return x
    divides = "tensor" in _free(mesh, AXES) and len(x) % mesh.shape["tensor"] == 0
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

    def divided(shared: Any, *rows: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        (num_rows,) = {len(x) for x in jax.tree.leaves(rows)}
        spec = _by_rows((num_rows,), mesh)
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

    return divided


def row_numbers(num_rows: int) -> Array:
    """Which rows of the whole batch these are, inside of `per_device` and outside.

    Args:
      num_rows: how many there are here.

    Returns:
      [num_rows] int32.
    """
    over = _divided(jax.sharding.get_abstract_mesh())
    first = jax.lax.axis_index(over) * num_rows if over else 0
    return first + jnp.arange(num_rows, dtype=jnp.int32)


def in_step(done: Array) -> Array:
    """Inside of `per_device`: may this device end its loop?

    Where devices work together in every round of the loop, as along `tensor`, only when all may:
    one that waits for a neighbour that has gone on waits for ever. Elsewhere each for itself.

    Args:
      done: [] bool, of this device.

    Returns:
      [] bool.
    """
    mesh = jax.sharding.get_abstract_mesh()
    over = _divided(mesh)
    alone = all(mesh.shape[axis] == 1 for axis in _free(mesh, mesh.axis_names))
    return done if alone or not over else jax.lax.pmin(done.astype(jnp.int32), over) == 1


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


_Places = tuple[NamedSharding | None, ...]


def _free(mesh: Any, axes: Sequence[str]) -> tuple[str, ...]:
    """Those axes that are on the mesh and left to the compiler."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in axes if types.get(axis) == AxisType.Auto)


def _places(state: Any) -> _Places:
    """Where the arrays of a state lie, as far as it is on a mesh and known while tracing."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _free(mesh, mesh.axis_names):
        return ()
    known = [
        None if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
        for x in jax.tree.leaves(state)
    ]
    return tuple(place if isinstance(place, NamedSharding) else None for place in known)


def _divided(mesh: Any) -> tuple[str, ...]:
    """The axes of `ROWS` that `per_device` has divided the rows over."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in ROWS if types.get(axis) == AxisType.Manual)


def _by_rows(shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The leading dimension over the most devices that divide it."""
    axes = [axis for axis in _free(mesh, ROWS) if mesh.shape[axis] > 1]
    choices = [c for n in range(len(axes) + 1) for c in combinations(axes, n)]
    sizes = [math.prod(mesh.shape[axis] for axis in choice) for choice in choices]
    fit = [(s, c) for s, c in zip(sizes, choices, strict=True) if shape and shape[0] % s == 0]
    best = max(fit, default=(1, ()))[1]
    return PartitionSpec(best if len(best) > 1 else best[0]) if best else PartitionSpec()


def _inferred(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    spec: list[str | None] = [None] * len(shape)

    def divide(dimension: int, axis: str) -> bool:
        size = mesh.shape[axis]
        fits = size > 1 and spec[dimension] is None and shape[dimension] % size == 0
        if fits:
            spec[dimension] = axis
        return fits

    for pattern, dimension in _BY_TENSOR:
        if re.search(pattern, name) and len(shape) >= -dimension:
            divide(dimension, "tensor")
            break
    by_size = sorted(range(len(shape)), key=lambda dimension: -shape[dimension])
    any(divide(dimension, "fsdp") for dimension in by_size)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _check(
    name: str, shape: tuple[int, ...], mesh: Mesh, pattern: str, spec: PartitionSpec
) -> None:
    reason = f"it has {len(shape)} dimensions" if len(spec) > len(shape) else ""
    for size, entry in zip(shape, spec, strict=False):
        axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        unknown = [axis for axis in axes if axis not in mesh.axis_names]
        if unknown:
            reason = f"the mesh has no axis {unknown[0]!r}, only {', '.join(mesh.axis_names)}"
        elif size % (parts := math.prod(mesh.shape[axis] for axis in axes)):
            reason = f"{size} does not divide into {parts} equal parts"
    if reason:
        raise ValueError(
            f"rule ({pattern!r}, {spec}) does not fit {name} of shape {shape}: {reason}"
        )


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _put(x: Any, sharding: NamedSharding) -> Array:
    if _is_key(x):
        bits = _put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
