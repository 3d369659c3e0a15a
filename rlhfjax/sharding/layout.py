"""Where arrays lie on a mesh, and how they get there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rlhfjax.sharding.axes import AXES, ROWS, by_rows

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
            "be their number"
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
                return NamedSharding(mesh, _plain(spec, mesh))
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
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, by_rows(np.shape(x), mesh))), tree)


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
    return _plain(spec, mesh)


def _plain(spec: Iterable[Any], mesh: Mesh) -> PartitionSpec:
    """As a compiled program gives it back, without what divides nothing: it compares equal."""
    plain: list[Any] = []
    for entry in spec:
        axes = tuple(a for a in _axes(entry) if mesh.shape[a] > 1)
        plain.append(axes if len(axes) > 1 else next(iter(axes), None))
    while plain and plain[-1] is None:
        plain.pop()
    return PartitionSpec(*plain)


def _axes(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _check(
    name: str, shape: tuple[int, ...], mesh: Mesh, pattern: str, spec: PartitionSpec
) -> None:
    reason = f"it has {len(shape)} dimensions" if len(spec) > len(shape) else ""
    for size, entry in zip(shape, spec, strict=False):
        axes = _axes(entry)
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
