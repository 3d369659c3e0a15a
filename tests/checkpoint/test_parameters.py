"""Parameters survive the disk to the last bit, and nothing else is taken for them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import checkpoint, models

SPECIAL = jnp.array([0.1, -0.0, jnp.nan, jnp.inf, 1e-45, 3e38])
TREE = {
    "policy": {
        "layers_0": {"kernel": jax.random.normal(jax.random.key(0), (3, 5)), "special": SPECIAL},
        "half": jnp.arange(4, dtype=jnp.bfloat16) / 3,
    },
    "step": jnp.int32(7),
    "flags": jnp.array([True, False]),
}


def assert_same_bits(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for mine, theirs in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "checkpoint", TREE)
    return tmp_path / "checkpoint"


def test_the_round_trip_is_exact(saved: Path) -> None:
    assert_same_bits(checkpoint.restore(saved, TREE), TREE)


def test_shapes_and_dtypes_suffice_to_restore(tmp_path: Path) -> None:
    model = models.decoder(models.DecoderConfig(7, 5, width=8, num_layers=1, num_heads=2))
    params = jax.jit(model.init)(jax.random.key(0))
    checkpoint.save(tmp_path / "model", params)
    like = jax.eval_shape(model.init, jax.random.key(1))
    assert_same_bits(checkpoint.restore(tmp_path / "model", like), params)


def test_trees_of_lists_and_tuples_are_trees_too(tmp_path: Path) -> None:
    tree = {"layers": [{"w": jnp.ones(2)}, {"w": jnp.zeros(3)}], "pair": (jnp.ones(1), jnp.ones(4))}
    checkpoint.save(tmp_path / "lists", tree)
    assert_same_bits(checkpoint.restore(tmp_path / "lists", tree), tree)


def test_saving_again_replaces(saved: Path) -> None:
    other = jax.tree.map(lambda x: x + x, TREE)
    checkpoint.save(saved, other)
    assert_same_bits(checkpoint.restore(saved, other), other)


def test_a_relative_path_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(Path("here"), TREE)
    assert_same_bits(checkpoint.restore(Path("here"), TREE), TREE)


def another(path: list[str], leaf: Any) -> dict[str, Any]:
    """The tree with one leaf replaced, added, or (None) removed."""
    tree = jax.tree.map(lambda x: x, TREE)
    branch = tree
    for name in path[:-1]:
        branch = branch[name]
    if leaf is None:
        del branch[path[-1]]
    else:
        branch[path[-1]] = leaf
    return tree


KERNEL = ["policy", "layers_0", "kernel"]


@pytest.mark.parametrize(
    ("path", "leaf", "said"),
    [
        (KERNEL, jnp.zeros((5, 3)), ["(3, 5)", "(5, 3)"]),
        (KERNEL, jnp.zeros((3, 5), jnp.bfloat16), ["float32", "bfloat16"]),
        (["policy", "half"], jnp.zeros(4), ["bfloat16", "float32"]),
        (KERNEL, None, ["missing"]),
        (["policy", "layers_0", "bias"], jnp.zeros(5), ["missing"]),
    ],
    ids=["shape", "narrower dtype", "wider dtype", "fewer arrays", "more arrays"],
)
def test_another_model_is_refused_by_the_name_of_the_array(
    saved: Path, path: list[str], leaf: Any, said: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        checkpoint.restore(saved, another(path, leaf))
    for part in [str(saved), "".join(f"[{name!r}]" for name in path), *said]:
        assert part in str(error.value)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no checkpoint"):
        checkpoint.restore(tmp_path / "nowhere", TREE)
