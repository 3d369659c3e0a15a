"""DAPO's dynamic sampling: what is collected against a loop, and its program against its phases."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import assert_close, assert_same, bigram

from rlhfjax.algorithms import dapo
from rlhfjax.types import Rollout

V, P, T, G = 7, 2, 3, 3
NUM_PLACES, NUM_ROUNDS = 2, 3
MODEL = bigram(V)
PARAMS, REF = (MODEL.init(jax.random.key(seed)) for seed in (0, 1))
CONFIG = dapo.Config(
    T, pad_token=0, end_token=2, group_size=G, num_minibatches=2, num_rounds=NUM_ROUNDS
)
HYPER = dapo.Hyperparameters(kl_coef=0.3)
SGD = optax.sgd(0.1)
NAN, INF = np.nan, np.inf


def numbered(first: int, count: int) -> Rollout:
    """Samples that are told apart by their numbers."""
    numbers = jnp.arange(first, first + count)
    tokens = jnp.tile(numbers[:, None], (1, 4))
    mask = jnp.ones((count, 3), bool)
    return Rollout(tokens, jnp.ones((count, 4), bool), mask, -1.0 * tokens[:, 1:])


ROUNDS = {
    "all differ": [[1, 2, 3, 4, 5, 6]],
    "one does not": [[1, 2, 3, 3, 5, 6], [1, 2, 3, 4, 5, 6]],
    "none does": [[1, 1, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0]],
    "they come slowly": [[1, 1, 2, 2, 3, 4], [5, 5, 6, 7, 8, 8], [0, 9, 0, 9, 0, 9]],
    "more than there is room for": [[1, 2, 3, 4, 5, 5], [6, 7, 8, 9, 1, 2]],
    "when full, no more": [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 3]],
    "samples without a score": [
        [1, NAN, NAN, NAN, 2, 3],
        [INF, 1, NAN, 2, -1, -1],
        [1, 2, 3, 4, 5, 6],
    ],
    "negative": [[-1, -2, 0, -3, -4, -4]],
}


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("size", [2, 3])
def test_groups_that_differ_are_collected_in_their_order(name: str, size: int) -> None:
    collected = dapo.nothing_of(numbered(100, 6))
    found: list[list[int]] = []
    for number, scores in enumerate(ROUNDS[name]):
        samples = numbered(6 * number, 6)
        given = jnp.array(scores, jnp.float32)
        collected = dapo.collect(collected, samples, given, group_size=size)
        for first in range(0, 6, size):
            finite = {x for x in scores[first : first + size] if np.isfinite(x)}
            if len(finite) > 1 and len(found) < 6 // size:
                found.append(list(range(6 * number + first, 6 * number + first + size)))

    rows = [row for group in found for row in group]
    every = np.float32(np.concatenate(ROUNDS[name]))
    assert collected.num_groups == len(found)
    assert collected.num_groups.dtype == jnp.int32
    filled = slice(len(rows))
    np.testing.assert_array_equal(collected.rollout.tokens[filled, 0], rows)
    np.testing.assert_array_equal(collected.rollout.log_probs[filled, 0], -np.float32(rows))
    np.testing.assert_array_equal(collected.scores[filled], every[np.array(rows, int)])
    assert np.isnan(collected.scores[len(rows) :]).all()


def odd_prompts_only(weight: Any, samples: Rollout) -> jax.Array:
    """Responses differ in their score if the prompt begins with an odd token."""
    scores = weight * (samples.responses * samples.response_mask).sum(1)
    return jnp.where(samples.prompts[:, 0] % 2 == 1, scores, 0.0)


SAMPLE, LEARN = dapo.make_halves(MODEL, SGD, CONFIG)
STEP = dapo.make_step(MODEL, odd_prompts_only, SGD, CONFIG)
MASK = np.ones((NUM_ROUNDS * NUM_PLACES, P), bool)
# Which of the six prompts are odd, how many groups are found, in how many rounds.
PROMPTS = {
    "full at once": ([1, 1, 1, 0, 0, 1], 2, 1),
    "full after two": ([0, 1, 1, 1, 1, 1], 2, 2),
    "full at last": ([0, 1, 0, 0, 0, 1], 2, 3),
    "not full": ([0, 0, 0, 1, 0, 0], 1, 3),
    "empty": ([0, 0, 0, 0, 0, 0], 0, 3),
}


def prompts_of(name: str) -> np.ndarray:
    odd = np.array(PROMPTS[name][0])
    return np.stack([odd + 4, np.arange(len(odd))], axis=1).astype(np.int32)


def start(seed: int = 0) -> dapo.State:
    return dapo.init(PARAMS, SGD, jax.random.key(seed))


@cache
def by_step(name: str) -> Any:
    return STEP(start(), prompts_of(name), MASK, REF, jnp.float32(1.0), HYPER)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_step_is_rounds_of_samples_until_there_are_enough_groups(name: str) -> None:
    _, num_groups, num_rounds = PROMPTS[name]
    collected = None
    for number in range(num_rounds):
        rows = slice(number * NUM_PLACES, (number + 1) * NUM_PLACES)
        samples = SAMPLE(start(), prompts_of(name)[rows], MASK[rows], HYPER, number)
        scores = np.float32(odd_prompts_only(1.0, samples))
        collected = dapo.nothing_of(samples) if collected is None else collected
        collected = dapo.collect(collected, samples, scores, group_size=G)
    expected, measured = LEARN(start(), collected.rollout, collected.scores, REF, HYPER)

    state, metrics = by_step(name)
    assert_close(state, expected, atol=1e-6)
    counts = {"val/num_groups": num_groups, "val/num_rounds": num_rounds}
    # What has a score, in this task, is all of every round.
    counts["val/num_scored"] = num_rounds * NUM_PLACES * G
    assert_close(metrics, measured | counts, atol=1e-6)
    assert all(np.isfinite(x) for x in metrics.values())
    moved = jnp.abs(state.params["table"] - PARAMS["table"]).max()
    assert (moved > 1e-4) if num_groups else (moved == 0.0)


def test_further_prompts_do_not_matter_once_there_are_enough_groups() -> None:
    prompts = prompts_of("full at once")
    prompts[NUM_PLACES:] = 3
    assert_same(STEP(start(), prompts, MASK, REF, jnp.float32(1.0), HYPER), by_step("full at once"))


def test_rounds_sample_from_keys_of_their_own() -> None:
    prompts, mask = prompts_of("empty")[:2], MASK[:2]
    first, second, default = (
        SAMPLE(start(), prompts, mask, HYPER, *number).responses for number in ([0], [1], [])
    )
    assert (first != second).any()
    assert_same(first, default)


def test_prompts_that_do_not_divide_into_rounds_are_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"\b5 prompts .* num_rounds=3\b"):
        STEP(start(), prompts_of("empty")[:5], MASK[:5], REF, jnp.float32(1.0), HYPER)
