"""Best-of-n: the rows it selects, and that its step is sampling, scoring and selecting."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_same, bigram, left_padded

from rlhfjax.algorithms import best_of_n
from rlhfjax.types import Rollout

V, N, P, T, G = 7, 5, 3, 4, 4
PROMPTS, MASK = left_padded(np.random.default_rng(0), [3, 1, 2, 3, 2], P, 3, V)
MODEL = bigram(V)
PARAMS = MODEL.init(jax.random.key(0))
CONFIG = best_of_n.Config(T, pad_token=0, end_token=2, group_size=G)
HYPER = best_of_n.Hyperparameters(temperature=0.9)
NAN, INF = np.nan, np.inf


def sum_of_tokens(weight: Any, samples: Rollout) -> jax.Array:
    """None for the second prompt, and for responses of a single token."""
    scores = weight * (samples.responses * samples.response_mask).sum(1)
    without = samples.response_mask.sum(1) == 1
    return jnp.where(without.at[G : 2 * G].set(True), jnp.nan, scores)


STEP = best_of_n.make_step(MODEL, sum_of_tokens, CONFIG)
SAMPLE = jax.jit(partial(best_of_n.sample, model=MODEL, config=CONFIG))


def start(seed: int = 0) -> best_of_n.State:
    return best_of_n.init(PARAMS, jax.random.key(seed))


def advance(state: best_of_n.State, hyper: best_of_n.Hyperparameters = HYPER) -> Any:
    return STEP(state, PROMPTS, MASK, jnp.float32(1.0), hyper)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([1, 3, 2], 1),
        ([-3, -2, -1], 2),
        ([5, 7, 7], 1),
        ([NAN, -9, NAN], 1),
        ([INF, 2, 3], 2),
        ([-INF, -9, INF], 1),
        ([NAN, NAN, NAN], 0),
    ],
)
def test_the_highest_score_is_selected(scores: list[float], best: int) -> None:
    groups = jnp.array([[0.0, 1.0, 0.0], scores, [9.0, 8.0, 7.0]], jnp.float32)
    rows = {"number": jnp.arange(9), "pair": jnp.arange(18).reshape(9, 2)}
    selected = best_of_n.select(rows, groups.ravel(), group_size=3)
    np.testing.assert_array_equal(selected["number"], [1, 3 + best, 6])
    np.testing.assert_array_equal(selected["pair"][:, 0], 2 * selected["number"])


def test_rewards_of_tokens_are_summed() -> None:
    def of_tokens(weight: Any, samples: Rollout) -> jax.Array:
        whole = sum_of_tokens(weight, samples)
        return (
            jnp.where(samples.response_mask, weight * samples.responses, jnp.nan)
            .at[:, 0]
            .add(
                0.0 * whole  # NaN where there is no score
            )
        )

    _, best, metrics = best_of_n.make_step(MODEL, of_tokens, CONFIG)(
        start(), PROMPTS, MASK, jnp.float32(1.0), HYPER
    )
    _, expected, measured = advance(start())
    assert_same(best, expected)
    assert metrics == measured


def test_a_step_gives_the_best_response_to_each_prompt() -> None:
    state, best, metrics = advance(start())
    samples = SAMPLE(start(), PROMPTS, MASK, HYPER)
    scores = np.asarray(sum_of_tokens(1.0, samples))
    assert np.isnan(scores).sum() > G
    rows = []
    for first in range(0, N * G, G):
        scored = [row for row in range(first, first + G) if not np.isnan(scores[row])]
        rows.append(max(scored, key=lambda row: scores[row]) if scored else first)
    assert_same(best, jax.tree.map(lambda x: x[np.array(rows)], samples))
    assert_same(best.prompts, PROMPTS)
    assert set(metrics) == {
        *("objective/scores", "objective/best_scores", "val/num_scored", "val/num_unscored")
    }
    assert metrics["objective/scores"] == pytest.approx(np.nanmean(scores), rel=1e-6)
    assert metrics["objective/best_scores"] == pytest.approx(np.nanmean(scores[rows]), rel=1e-6)
    assert metrics["objective/best_scores"] > metrics["objective/scores"]
    assert state.step == 1
    assert_same((state.params, state.key), (PARAMS, jax.random.key(0)))


def test_steps_and_seeds_sample_from_keys_of_their_own() -> None:
    state, first, _ = advance(start())
    _, second, _ = advance(state)
    _, other, _ = advance(start(1))
    assert (first.responses != second.responses).any()
    assert (first.responses != other.responses).any()


def test_vmapped_over_seeds_and_temperatures_it_equals_a_run_of_each() -> None:
    seeds, temperatures = (0, 1, 2), (0.5, 0.9, 2.0)
    states = [start(seed) for seed in seeds]
    hyper = best_of_n.Hyperparameters(jnp.array(temperatures), kl_coef=jnp.zeros(3))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    _, together, _ = jax.vmap(advance)(stacked, hyper)
    for index, (seed, temperature) in enumerate(zip(seeds, temperatures, strict=True)):
        _, alone, _ = advance(start(seed), best_of_n.Hyperparameters(temperature))
        assert_same(together.tokens[index], alone.tokens)
