"""A digest changes with every bit, with places, names, shapes and dtypes, and with nothing else."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import checkpoint

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.normal(size=(3, 4)).astype(np.float32),
    "bfloat16": jnp.asarray(RNG.normal(size=(5,)), jnp.bfloat16),
    "float16": RNG.normal(size=(2, 2)).astype(np.float16),
    "int32": RNG.integers(-9, 9, (4,)).astype(np.int32),
    "uint8": RNG.integers(0, 255, (2, 3)).astype(np.uint8),
    "scalar": np.float32(0.5),
}


def flipped(array: Any, bit: int) -> np.ndarray:
    content = bytearray(np.asarray(array).tobytes())
    content[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(content), np.asarray(array).dtype).reshape(np.shape(array))


@pytest.mark.parametrize("name", ARRAYS)
def test_every_bit_counts(name: str) -> None:
    array = np.asarray(ARRAYS[name])
    digests = {checkpoint.digest({"x": flipped(array, bit)}) for bit in range(array.nbytes * 8)}
    assert len(digests | {checkpoint.digest({"x": array})}) == array.nbytes * 8 + 1


@pytest.mark.parametrize(
    "other",
    [
        {"y": jnp.arange(6.0)},
        {"x": jnp.arange(6.0).reshape(2, 3)},
        {"x": jnp.arange(6.0).astype(jnp.int32)},
        {"x": jnp.arange(6.0)[::-1]},
        {"x": jnp.arange(6.0), "y": jnp.zeros(0)},
        {"x": {"x": jnp.arange(6.0)}},
    ],
    ids=["name", "shape", "dtype", "order", "one more", "deeper"],
)
def test_so_does_all_that_makes_an_array(other: Any) -> None:
    assert checkpoint.digest(other) != checkpoint.digest({"x": jnp.arange(6.0)})


def test_two_arrays_of_one_name_are_refused() -> None:
    tree = {"a.b": jnp.zeros(2), "a": {"b": jnp.ones(2), "c": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"the name a\.b: "):
        checkpoint.flatten(tree)


def test_two_elements_changed_together_do_not_cancel() -> None:
    array = np.zeros(8, np.uint32)
    seen = set()
    for first in range(8):
        for second in range(first):
            for delta in (1, 2**31, 77):
                other = array.copy()
                other[first], other[second] = delta, -delta % 2**32
                seen.add(checkpoint.digest(other))
    # Adding and taking away 2^31 are the same in 32 bits.
    assert len(seen) == 28 * 3 and checkpoint.digest(array) not in seen


def test_numpy_and_jax_arrays_are_the_same_arrays() -> None:
    assert checkpoint.digest({"x": np.ones(3)[:2].astype(np.float32)}) == checkpoint.digest(
        {"x": jnp.ones(2)}
    )


def test_keys_are_their_bits() -> None:
    one, other = jax.random.key(1), jax.random.key(2)
    assert (
        checkpoint.digest(one) == checkpoint.digest(jax.random.key(1)) != checkpoint.digest(other)
    )


def test_names_and_back() -> None:
    tree = {"a": [jnp.ones(2), {"b": jnp.zeros(())}], "key": jax.random.key(3)}
    flat = checkpoint.flatten(tree)
    assert flat.keys() == {"a.0", "a.1.b", "key"}
    again = checkpoint.unflatten(flat, jax.eval_shape(lambda: tree))
    assert jax.random.bits(again["key"]) == jax.random.bits(tree["key"])
    assert checkpoint.digest(again) == checkpoint.digest(tree)
