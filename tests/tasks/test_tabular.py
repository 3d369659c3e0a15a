"""A task that can be enumerated, and what is known of it in closed form."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import rollout
from rlhfjax.tasks import tabular

SIZES = {"num_prompts": 5, "vocab_size": 3, "length": 3}
TASK = jax.jit(partial(tabular.draw, **SIZES))(jax.random.key(0))
MODEL = tabular.logit_table(**SIZES)
PARAMS = MODEL.init(jax.random.key(1))
LOG_PROBS = jax.jit(partial(tabular.log_probs, MODEL))
REFERENCE = LOG_PROBS(MODEL.init(jax.random.key(2)), TASK)
BETA = 0.4


def test_responses_are_enumerated_with_the_first_token_slowest() -> None:
    np.testing.assert_array_equal(TASK.responses, list(itertools.product(range(3), repeat=3)))
    np.testing.assert_array_equal(TASK.prompts, [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]])
    assert TASK.rewards.shape == (5, 27)


def test_the_table_gives_each_prefix_its_own_distribution() -> None:
    table = np.asarray(PARAMS["logits"], np.float64)
    rows = table - np.log(np.exp(table).sum(-1, keepdims=True))
    expected = np.zeros((5, 27))
    for prompt in range(5):
        for number, response in enumerate(itertools.product(range(3), repeat=3)):
            prefix = 0
            for token in response:
                expected[prompt, number] += rows[prompt, prefix, token]
                prefix = prefix * 3 + 1 + token
    found = LOG_PROBS(PARAMS, TASK)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(jnp.exp(found).sum(-1), 1.0, rtol=1e-6)


def test_what_is_sampled_has_the_log_probabilities_of_the_enumeration() -> None:
    prompts = jnp.repeat(TASK.prompts, 40, axis=0)
    generate = jax.jit(partial(rollout.generate, MODEL, num_tokens=3, pad_token=0))
    samples = generate(PARAMS, prompts, jnp.ones(prompts.shape, bool), jax.random.key(3))
    number = samples.responses @ np.array([9, 3, 1])
    rewards = np.asarray(TASK.rewards)[np.repeat(np.arange(5), 40), number]
    np.testing.assert_array_equal(tabular.score(TASK, samples), rewards)
    known = tabular.token_log_probs(MODEL, PARAMS, TASK)[np.repeat(np.arange(5), 40), number]
    np.testing.assert_allclose(samples.log_probs, known, atol=1e-6)


def test_the_objective_is_the_sum_over_responses() -> None:
    log_probs = np.asarray(LOG_PROBS(PARAMS, TASK), np.float64)
    reference = np.asarray(REFERENCE, np.float64)
    values = np.asarray(TASK.rewards) - BETA * (log_probs - reference)
    expected = (np.exp(log_probs) * values).sum(-1).mean()
    found = tabular.objective(LOG_PROBS(PARAMS, TASK), REFERENCE, TASK, kl_coef=BETA)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_nothing_is_better_than_the_optimum_and_its_value_is_the_log_partition() -> None:
    best = tabular.optimum(REFERENCE, TASK, kl_coef=BETA)
    value = tabular.objective(best, REFERENCE, TASK, kl_coef=BETA)
    partition = jax.nn.logsumexp(REFERENCE + TASK.rewards / BETA, axis=-1)
    np.testing.assert_allclose(value, BETA * partition.mean(), rtol=1e-5)
    for size in (0.01, 0.1, 1.0):
        noise = size * jax.random.normal(jax.random.key(4), best.shape)
        other = jax.nn.log_softmax(best + noise)
        assert tabular.objective(other, REFERENCE, TASK, kl_coef=BETA) < value


def test_at_the_optimum_the_gradient_vanishes() -> None:
    def value(logits: jax.Array) -> jax.Array:
        return tabular.objective(jax.nn.log_softmax(logits), REFERENCE, TASK, kl_coef=BETA)

    best = tabular.optimum(REFERENCE, TASK, kl_coef=BETA)
    np.testing.assert_allclose(jax.grad(value)(best), 0.0, atol=1e-6)
    assert jnp.abs(jax.grad(value)(best + TASK.rewards)).max() > 1e-3


def test_preferences_are_bradley_terry() -> None:
    found = tabular.preference_probs(TASK)
    assert found.shape == (5, 27, 27)
    gap = float(TASK.rewards[2, 4] - TASK.rewards[2, 9])
    assert found[2, 4, 9] == pytest.approx(1 / (1 + np.exp(-gap)), rel=1e-6)
    np.testing.assert_allclose(found + found.swapaxes(1, 2), 1.0, rtol=1e-6)


def test_the_value_table_gives_each_prefix_its_own_number() -> None:
    model = tabular.value_table(**SIZES)
    assert not np.any(model.init(jax.random.key(0))["values"])
    table = np.arange(5 * 13.0).reshape(5, 13)
    tokens = np.array([[1, 0, 2, 1, 0], [0, 2, 0, 0, 1]])  # prompts 3 and 2, responses 210 and 001
    values = model.values({"values": jnp.asarray(table)}, tokens, np.ones((2, 5), bool), first=1)
    # The empty prefix is 0, those of one token 1 to 3, that of tokens a, b is 4 + 3·a + b.
    expected = [[table[3, 0], table[3, 3], table[3, 11]], [table[2, 0], table[2, 1], table[2, 4]]]
    np.testing.assert_array_equal(values[:, :3], expected)


def test_the_divergence_and_the_gradient_are_those_of_the_enumeration() -> None:
    now = np.asarray(LOG_PROBS(PARAMS, TASK), np.float64)
    ref = np.asarray(REFERENCE, np.float64)
    expected = (np.exp(now) * (now - ref)).sum(1)
    np.testing.assert_allclose(tabular.divergence(now, ref), expected, rtol=1e-5)
    found = tabular.gradient(MODEL, PARAMS, REFERENCE, TASK, kl_coef=BETA)["logits"]
    # At the logit of a response p·(x - E x) / P, x = r - β·(log π - log π_ref); at that of a first
    # token the sum over the responses that begin with it.
    x = np.asarray(TASK.rewards, np.float64) - BETA * (now - ref)
    of_response = np.exp(now) * (x - (np.exp(now) * x).sum(1, keepdims=True)) / len(x)
    np.testing.assert_allclose(found[:, 0], of_response.reshape(5, 3, 9).sum(2), atol=1e-6)
