"""What tells two arrays apart, computed where they are and however they are divided."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.dtypes import prng_key

Arrays = dict[str, Array]


def flatten(tree: Any) -> Arrays:
    """The arrays of a tree by their names; typed keys as their bits.

    Args:
      tree: of arrays, or of `jax.ShapeDtypeStruct`.

    Returns:
      name → array, as `params.layers_0.kernel`.

    Raises:
      ValueError: two arrays would have one name.
    """
    named = [(_name(path), leaf) for path, leaf in _leaves(jax.tree.map(_bits_of_key, tree))]
    twice = [name for name, number in Counter(name for name, _ in named).items() if number > 1]
    if twice:
        raise ValueError(f"several arrays have the name {', '.join(twice)}: give other names")
    return dict(named)


def unflatten(arrays: Arrays, like: Any) -> Any:
    """The inverse of `flatten`.

    Args:
      arrays: name → array.
      like: the tree's structure, with typed keys where they belong.

    Returns:
      the tree.
    """

    def restored(path: Any, leaf: Any) -> Array:
        array = arrays[_name(path)]
        if not jnp.issubdtype(leaf.dtype, prng_key):
            return array
        impl = jax.random.key_impl(jnp.empty((), leaf.dtype))
        return jax.random.wrap_key_data(array, impl=impl)

    return jax.tree_util.tree_map_with_path(restored, like)


def digests(tree: Any) -> dict[str, str]:
    """A fingerprint of each array: Σᵢ mix(bitsᵢ, i) mod 2³², twice, with different mixes.

    The sum has no order and i counts in the whole array, so neither the mesh nor the number of
    processes matters. A mix is one to one in the bits: one changed element always shows.

    Args:
      tree: of arrays.

    Returns:
      name → "float32[2, 3] 0123456789abcdef".
    """

    def of(array: Array) -> str:
        # Waits for each: many small programs that reduce over devices get into each other's way.
        first, second = jax.device_get(_sums(array))
        return f"{shape_of(array)} {first:08x}{second:08x}"

    return {name: of(array) for name, array in flatten(tree).items()}


def digest(tree: Any) -> str:
    """One fingerprint of a tree: SHA-256 of its arrays' names and `digests`.

    Args:
      tree: of arrays.

    Returns:
      64 hexadecimal digits.
    """
    lines = sorted(f"{name} {of_array}\n" for name, of_array in digests(tree).items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def shape_of(array: Any) -> str:
    """Dtype and shape, as `float32[2, 3]`."""
    return f"{array.dtype}{list(array.shape)}"


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _bits_of_key(leaf: Any) -> Any:
    if not jnp.issubdtype(leaf.dtype, prng_key):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        bits = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(bits.shape, bits.dtype, sharding=leaf.sharding)
    return jax.random.key_data(leaf)


# An array at a time: arrays of one shape, as the layers of a model have them, share a program.
@jax.jit
def _sums(x: Array) -> Array:
    bits = _words(jnp.asarray(x))
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)

    def total(odd: int) -> Array:
        mixed = (bits ^ _scramble(place + np.uint32(odd))) * np.uint32(odd)
        return _scramble(mixed).sum(dtype=jnp.uint32)

    return jnp.stack([total(0x9E3779B9), total(0x7F4A7C15)])


def _words(x: Array) -> Array:
    """The bits as uint32, in as many of them as one element needs."""
    if x.dtype == bool:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if size <= 4:
        narrow = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
        return jax.lax.bitcast_convert_type(x, narrow).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _scramble(x: Array) -> Array:
    """A permutation of the 32-bit words in which every bit depends on every other (Murmur3)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
