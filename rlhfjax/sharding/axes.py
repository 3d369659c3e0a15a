"""The axes of a mesh, and which of them divide the rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from jax.sharding import AxisType, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")


def free(mesh: Any, axes: Sequence[str]) -> tuple[str, ...]:
    """Those axes that are on the mesh and left to the compiler."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in axes if types.get(axis) == AxisType.Auto)


def divided(mesh: Any) -> tuple[str, ...]:
    """The axes of `ROWS` that `per_device` has divided the rows over."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in ROWS if types.get(axis) == AxisType.Manual)


def by_rows(shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """The leading dimension over the most devices that divide it."""
    axes = [axis for axis in free(mesh, ROWS) if mesh.shape[axis] > 1]
    choices = [c for n in range(len(axes) + 1) for c in combinations(axes, n)]
    sizes = [math.prod(mesh.shape[axis] for axis in choice) for choice in choices]
    fit = [(s, c) for s, c in zip(sizes, choices, strict=True) if shape and shape[0] % s == 0]
    best = max(fit, default=(1, ()))[1]
    return PartitionSpec(best if len(best) > 1 else best[0]) if best else PartitionSpec()
