"""What holds for every function of floors 0 and 1, whatever it computes; see `catalogue`."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import catalogue
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import Subject, is_mask

from rlhfjax import masked

SUBJECTS = [catalogue.subject(*named) for named in catalogue.functions().items()]
ORDER = np.array([2, 0, 3, 1])
# They relate a row to the others, which is what they are for.
OF_ALL_ROWS = (
    "advantages.groups.",
    "advantages.importance.normalize_weights",
    "losses.anchored.kto_pair",
    "losses.policy.kl_cov",
    "losses.preference.aot",
    "losses.selection.high_entropy_mask",
    "losses.unpaired.",
    "masked.whiten",
)


def close(one: Any, other: Any, tolerance: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def by_row(subject: Subject, arrays: dict[str, Any]) -> Any:
    """The results; of a loss the unreduced one, without its metrics."""
    try:
        result = subject(arrays, reduce=masked.fill)
    except TypeError:
        return subject(arrays)
    return result[0] if isinstance(result, tuple) else result


@cache
def compiled(subject: Subject) -> Callable[[dict[str, Any]], Any]:
    return jax.jit(partial(by_row, subject))


def has_rows(array: Any) -> bool:
    return np.ndim(array) > 0 and np.shape(array)[0] == catalogue.B


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_compiled_is_eager(subject: Subject) -> None:
    close(jax.jit(subject)(subject.arrays), subject(subject.arrays))


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_permuted_rows_give_permuted_results(subject: Subject) -> None:
    run = compiled(subject)
    permuted = {
        name: array[ORDER] if has_rows(array) else array for name, array in subject.arrays.items()
    }
    wanted = jax.tree.map(lambda x: x[ORDER] if has_rows(x) else x, run(subject.arrays))
    close(run(permuted), wanted)


@pytest.mark.parametrize(
    "subject", [s for s in SUBJECTS if not s.name.startswith(OF_ALL_ROWS)], ids=str
)
def test_a_batch_is_its_rows(subject: Subject) -> None:
    """Except for numbers of the whole batch, which one row does not have."""
    run = partial(by_row, subject)
    batched = compiled(subject)(subject.arrays)
    rows = {name: array for name, array in subject.arrays.items() if has_rows(array)}
    others = {name: array for name, array in subject.arrays.items() if name not in rows}
    try:
        mapped = jax.jit(jax.vmap(lambda row: run({**row, **others})))(rows)
    except (AssertionError, ValueError):
        pytest.skip("takes whole batches only")
    for of_batch, of_rows in zip(jax.tree.leaves(batched), jax.tree.leaves(mapped), strict=True):
        if of_batch.shape == of_rows.shape:
            close(of_batch, of_rows)
        else:
            assert not has_rows(of_batch), "rows of a batch must come out as rows"


@pytest.mark.parametrize("subject", SUBJECTS, ids=str)
def test_bfloat16_goes_in_and_float32_comes_out(subject: Subject) -> None:
    half = {
        name: jnp.asarray(x, jnp.bfloat16) if x.dtype.kind == "f" else x
        for name, x in subject.arrays.items()
    }
    for leaf in jax.tree.leaves(jax.eval_shape(subject, half)):
        assert leaf.dtype != jnp.bfloat16


@pytest.mark.parametrize(
    "subject",
    [s for s in SUBJECTS if s.name.startswith("advantages.groups.") and "scores" in s.arrays],
    ids=str,
)
def test_groups_do_not_see_a_shift_of_all_scores(subject: Subject) -> None:
    if subject.name.endswith((".gpg",)):
        pytest.skip("its factor counts the scores that are 0")
    shifted = {**subject.arrays, "scores": subject.arrays["scores"] + 8.0}
    run = compiled(subject)
    close(run(shifted), run(subject.arrays), 1e-5)


def test_the_walk_is_long_and_knows_masks() -> None:
    assert len(SUBJECTS) > 90
    assert sum(any(map(is_mask, s.arrays)) for s in SUBJECTS) > 60
