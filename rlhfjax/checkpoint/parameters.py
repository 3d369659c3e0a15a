"""Parameters as a checkpoint of their own."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from rlhfjax.types import Params


def save(directory: Path, params: Params) -> None:
    """Writes a tree of arrays; durable when it returns.

    Args:
      directory: a checkpoint of its own, replaced if it exists.
      params: any tree of arrays.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(directory).absolute(), params, force=True)


def restore(directory: Path, like: Params) -> Params:
    """Reads what `save` wrote.

    Args:
      directory: the checkpoint.
      like: a tree of the same structure, of arrays or of `jax.ShapeDtypeStruct`, such as
        `jax.eval_shape(model.init, key)`; its shardings are where the arrays go, by default
        where jax makes new ones.

    Returns:
      the tree.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: its structure, or the shape or dtype of an array, is another.
    """
    path = Path(directory).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no checkpoint there")
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        _compare(path, stored, like)
        return checkpointer.restore(path, abstract(like))


def abstract(like: Params) -> Params:
    """Shapes, dtypes and shardings; by default where new arrays are, not where they were saved."""
    place = jnp.zeros(()).sharding
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=getattr(x, "sharding", None) or place
        ),
        like,
    )


def _compare(path: Path, stored: Params, like: Params) -> None:
    """Orbax would cast another dtype without a word."""

    def leaves(tree: Params) -> dict[str, tuple]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(k): (tuple(x.shape), str(x.dtype)) for k, x in flat}

    found, wanted = leaves(stored), leaves(like)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: {name} is {found.get(name, 'missing')} in the checkpoint and "
                f"{wanted.get(name, 'missing')} in the model: restore with the configuration "
                "it was saved with"
            )
