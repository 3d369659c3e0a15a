"""What is masked does not exist: not for values, not for gradients, to the last bit.

Walks all public functions of floors 0 and 1 that take a mask, see `catalogue`.
"""

import functools
from collections.abc import Callable
from typing import Any

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import Subject, is_mask

POISONS = [np.nan, np.inf, -np.inf, 1e30]
SUBJECTS = [
    found
    for name, function in catalogue.functions().items()
    for found in [catalogue.subject(name, function)]
    if found.masks
]


def hidden(subject: Subject, name: str) -> np.ndarray | None:
    """The entries of an argument that its mask, or a row without a True entry, takes out."""
    array, mask = subject.arrays[name], subject.arrays[subject.masks[0]]
    if array.shape == mask.shape:
        return ~mask
    return ~mask.any(-1) if array.shape == mask.shape[:-1] else None


def poisoned(subject: Subject, poison: float) -> dict[str, np.ndarray]:
    """Arguments with the poison, or for integers another valid number, where they are masked."""
    arrays = dict(subject.arrays)
    for name, array in arrays.items():
        under = None if is_mask(name) or array.dtype == bool else hidden(subject, name)
        if under is not None:
            value = poison if array.dtype.kind == "f" else array.max()
            arrays[name] = np.where(under, array.dtype.type(value), array)
    return arrays


def outcome(subject: Subject) -> Callable[[dict[str, Any]], Any]:
    """The results, and the gradient of the sum of them with respect to every float argument."""

    def total(floats: dict[str, Any], others: dict[str, Any]) -> tuple[jax.Array, Any]:
        results = subject({**floats, **others})
        leaves = [x for x in jax.tree.leaves(results) if jnp.issubdtype(x.dtype, jnp.floating)]
        return sum((leaf.sum() for leaf in leaves), jnp.float32(0)), results

    def both(arrays: dict[str, Any]) -> Any:
        floats = {name: x for name, x in arrays.items() if x.dtype.kind == "f"}
        others = {name: x for name, x in arrays.items() if name not in floats}
        if not floats:
            return {}, subject(arrays)
        return jax.grad(total, has_aux=True)(floats, others)

    return both


@functools.cache
def compiled(subject: Subject) -> Callable[[dict[str, Any]], Any]:
    return jax.jit(outcome(subject))


def assert_same_bits(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_nothing_under_a_mask_reaches_values_or_gradients(subject: Subject) -> None:
    run = compiled(subject)
    clean = run(subject.arrays)
    for leaf in jax.tree.leaves(clean):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
    for poison in POISONS:
        assert_same_bits(run(poisoned(subject, poison)), clean)


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_where_everything_is_masked_all_is_finite(subject: Subject) -> None:
    nothing = {name: np.zeros_like(x) if is_mask(name) else x for name, x in subject.arrays.items()}
    for leaf in jax.tree.leaves(compiled(subject)(nothing)):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_the_walk_finds_the_functions_that_take_a_mask() -> None:
    names = {subject.name for subject in SUBJECTS}
    assert len(names) > 60
    assert {
        "masked.whiten",
        "advantages.returns.gae",
        "advantages.groups.group_relative",
        "losses.policy.ppo_clip",
        "losses.sequence_policy.gspo",
        "losses.reductions.by_segment",
        "losses.preference.dpo",
        "losses.value.clipped_value_loss",
    } <= names


@pytest.mark.parametrize(
    "function",
    [
        lambda x, mask: jnp.where(mask, jnp.exp(x), 0.0).sum(),
        lambda x, mask: x.sum() + 0 * mask.sum(),
    ],
    ids=["masked after exp", "mask forgotten"],
)
def test_the_walk_sees_what_it_must(function: Callable[..., jax.Array]) -> None:
    arrays = {"x": catalogue.floats(*catalogue.TOKENS), "mask": catalogue.MASK}
    faulty = Subject("faulty", function, arrays, {})
    with pytest.raises(AssertionError):
        test_nothing_under_a_mask_reaches_values_or_gradients(faulty)
