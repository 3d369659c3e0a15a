"""What holds for every loss of tokens and of responses, whatever its equation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
    ADVANTAGES,
    MASK,
    NEW,
    OF_RESPONSES,
    OLD,
    WEIGHTS,
    Loss,
    assert_close,
)

from rlhfjax import masked
from rlhfjax.losses import policy, reductions, sequence_policy, supervised, value


class Case(NamedTuple):
    loss: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]


def weighted(loss: Loss, advantages: np.ndarray = ADVANTAGES, **options: float) -> Case:
    def of_arrays(new: Any, old: Any, a: Any, weights: Any, mask: Any, **more: Any) -> Any:
        return loss(new, old, a, mask, weights=weights, **options, **more)

    return Case(of_arrays, (NEW, OLD, advantages, WEIGHTS))


def without_ratio(new: Any, a: Any, weights: Any, mask: Any, **more: Any) -> Any:
    return policy.policy_gradient(new, a, mask, weights=weights, **more)


def entropy_loss(entropies: Any, weights: Any, mask: Any, **more: Any) -> Any:
    return policy.entropy_loss(entropies, mask, weights=weights, **more)


def language_model(*arrays: Any, **more: Any) -> Any:
    return supervised.language_model(*arrays, **more), {}


CASES = {
    "ppo_clip": weighted(policy.ppo_clip, dual_clip=1.3, log_ratio_clip=0.5),
    "cispo": weighted(policy.cispo),
    "sapo": weighted(policy.sapo),
    "kl_cov": weighted(policy.kl_cov, fraction=0.5),
    "gspo": weighted(sequence_policy.gspo, OF_RESPONSES, clip_range=0.1),
    "gspo_token": weighted(sequence_policy.gspo_token, clip_range=0.1),
    "rloo_clip": weighted(sequence_policy.rloo_clip, OF_RESPONSES),
    "gmpo": weighted(sequence_policy.gmpo, OF_RESPONSES, clip_range=0.1),
    "policy_gradient": Case(without_ratio, (NEW, ADVANTAGES, WEIGHTS)),
    "entropy_loss": Case(entropy_loss, (-OLD, WEIGHTS)),
    "value_loss": Case(value.value_loss, (OLD, ADVANTAGES)),
    "clipped_value_loss": Case(
        partial(value.clipped_value_loss, clip_range=0.2), (NEW, OLD, ADVANTAGES)
    ),
    "language_model": Case(language_model, (NEW,)),
}
each_loss = pytest.mark.parametrize("loss, arrays", CASES.values(), ids=CASES)


@each_loss
def test_masked_tokens_are_ignored_to_the_last_bit_and_only_the_trained_has_a_gradient(
    loss: Loss, arrays: tuple[np.ndarray, ...]
) -> None:
    def loss_and_metrics(*arrays_and_mask: jax.Array) -> tuple[jax.Array, Any]:
        given, metrics = loss(*arrays_and_mask)
        total = sum(metrics.values(), jnp.float32(0))
        return jnp.stack([given, total]), (given, metrics)

    run = jax.jit(jax.jacrev(loss_and_metrics, tuple(range(len(arrays))), has_aux=True))

    def under_the_mask(garbage: float) -> Any:
        real = (MASK if x.ndim == 2 else MASK.any(-1) for x in arrays)
        filled = (np.where(r, x, np.float32(garbage)) for x, r in zip(arrays, real, strict=True))
        return run(*filled, MASK)

    clean = under_the_mask(0.0)
    for garbage in (np.nan, np.inf, -np.inf, 1e30):
        jax.tree.map(np.testing.assert_array_equal, under_the_mask(garbage), clean)
    (trained, *others), _ = clean
    of_loss, of_metrics = np.asarray(trained)
    assert np.isfinite(of_loss).all() and (of_loss[~MASK] == 0).all() and of_loss.any()
    assert not any(np.asarray(grad).any() for grad in (of_metrics, *others))
    # Without a token at all everything is 0.
    for array in jax.tree.leaves(run(*arrays, np.zeros_like(MASK))):
        assert not np.asarray(array).any()


def ways(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
    """The losses of tokens, of rows, and of the batch by two means."""
    rows = masked.mean(x, mask, axis=-1)
    return (
        masked.fill(x, mask),
        rows,
        reductions.token_mean(x, mask),
        reductions.sequence_mean(x, mask),
    )


@each_loss
def test_tokens_rows_and_micro_batches_add_up_and_a_batch_is_its_rows(
    loss: Loss, arrays: tuple[np.ndarray, ...]
) -> None:
    @jax.jit
    def reduced(*arrays: jax.Array) -> tuple[Any, Any]:
        def of(*arrays: jax.Array) -> Any:
            return loss(*arrays, reduce=ways)[0]

        return of(*arrays), jax.vmap(of)(*arrays)

    (tokens, rows, token_mean, sequence_mean), of_rows = reduced(*arrays, MASK)
    real = [np.asarray(x)[mask] for x, mask in zip(tokens, MASK, strict=True)]
    assert (np.asarray(tokens)[~MASK] == 0).all()
    assert_close(rows, [x.mean() if x.size else 0.0 for x in real])
    assert_close(token_mean, np.concatenate(real).mean())
    if loss is CASES["kl_cov"].loss:  # It compares the tokens of a call with one another.
        return
    assert_close(of_rows[:2], (tokens, rows))
    assert_close(np.average(of_rows[2], weights=MASK.sum(-1)), token_mean)
    assert_close(np.average(of_rows[3], weights=MASK.any(-1)), sequence_mean)


@each_loss
def test_numbers_are_float32_and_what_does_not_fit_is_refused(
    loss: Loss, arrays: tuple[np.ndarray, ...]
) -> None:
    half = (jnp.asarray(x, jnp.bfloat16) for x in arrays)
    for array in jax.tree.leaves(jax.eval_shape(loss, *half, MASK)):
        assert array.shape == () and array.dtype == jnp.float32
    for mask in (MASK[:, :-1], MASK[:-1], MASK.astype(np.float32)):
        with pytest.raises(AssertionError):
            jax.eval_shape(loss, *arrays, mask)
