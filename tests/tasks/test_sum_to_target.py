"""Digits that should add up to a target: the reward, the observation, a network as a model."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from rlhfjax import models, rollout
from rlhfjax.algorithms import ppo
from rlhfjax.log_probs import response_log_probs
from rlhfjax.tasks import sum_to_target, tabular


class Linear:
    """The smallest network: one matrix."""

    def __init__(self, size: int) -> None:
        self.size = size

    def init(self, key: Array, observations: Array) -> Array:
        return jax.random.normal(key, (observations.shape[-1], self.size))

    def apply(self, params: Array, observations: Array) -> Array:
        return observations @ params


@pytest.mark.parametrize(
    ("digits", "target", "expected"),
    [([5, 5, 5], 15, 1.0), ([9, 9, 9], 15, 1 / 13), ([0, 0, 0], 15, 1 / 16), ([7, 6], 14, 0.5)],
)
def test_the_reward_falls_with_the_distance_from_the_target(
    digits: list[int], target: int, expected: float
) -> None:
    found = sum_to_target.reward(jnp.array(digits), jnp.array(target))
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_enumerated_task_has_every_response_with_its_reward() -> None:
    task = sum_to_target.enumerate_task(target=7, length=2)
    every = list(itertools.product(range(10), repeat=2))
    np.testing.assert_array_equal(task.responses, every)
    np.testing.assert_array_equal(task.prompts, [[7]])
    np.testing.assert_allclose(task.rewards[0], [1 / (1 + abs(a + b - 7)) for a, b in every])


def test_a_network_sees_the_position_the_sum_and_the_target() -> None:
    found = sum_to_target.observe(jnp.array(2), jnp.array(9), jnp.array(15), length=3)
    np.testing.assert_allclose(found, [0, 0, 1, 9 / 27, 15 / 27], rtol=1e-6)


def test_whole_sequences_and_the_value_see_what_the_digits_before_add_up_to() -> None:
    params = jnp.arange(5.0)[:, None]
    value = sum_to_target.value(Linear(1))
    tokens = jnp.array([[15, 4, 9, 2]])
    found = value.values(params, tokens[:, :-1], jnp.ones((1, 3), bool))
    sums, target = np.array([0, 4, 13]) / 27, 15 / 27
    np.testing.assert_allclose(found, [np.arange(3) + 3 * sums + 4 * target], rtol=1e-6)
    later = value.values(params, tokens[:, :-1], jnp.ones((1, 3), bool), first=1)
    np.testing.assert_array_equal(later, found[:, 1:])


def test_decoding_sees_what_the_whole_sequence_sees() -> None:
    model = sum_to_target.policy(Linear(10), length=4)
    params = model.init(jax.random.key(0))
    prompts = jnp.array([[0], [15], [36]])
    mask = jnp.ones(prompts.shape, bool)

    @jax.jit
    def sample_and_read(params: Array) -> tuple[Array, Array]:
        samples = rollout.generate(
            model, params, prompts, mask, jax.random.key(1), num_tokens=4, pad_token=0
        )
        known, _ = response_log_probs(model, params, samples.tokens, samples.attention_mask, 4)
        return samples.log_probs, known

    decoded, known = sample_and_read(params)
    np.testing.assert_allclose(decoded, known, atol=1e-6)
    assert np.ptp(decoded) > 0.1


def test_its_probabilities_sum_to_one_over_all_responses() -> None:
    model = sum_to_target.policy(Linear(10))
    log_probs = jax.jit(partial(tabular.log_probs, model))(
        model.init(jax.random.key(0)), sum_to_target.enumerate_task()
    )
    assert log_probs.shape == (1, 1000)
    np.testing.assert_allclose(jnp.exp(log_probs).sum(), 1.0, rtol=1e-5)


def test_the_uniform_policy_has_the_mean_of_the_rewards() -> None:
    model = sum_to_target.policy(Linear(10))
    task = sum_to_target.enumerate_task()
    log_probs = tabular.log_probs(model, jnp.zeros((5, 10)), task)
    sums = [sum(digits) for digits in itertools.product(range(10), repeat=3)]
    expected = np.mean([1 / (1 + abs(total - 15)) for total in sums])
    np.testing.assert_allclose(tabular.expected_reward(log_probs, task), [expected], rtol=1e-5)


def test_ppo_needs_no_text() -> None:
    """Every phase runs on a task that has neither an end token nor padding."""
    model = models.separate_trunks(sum_to_target.policy(Linear(10)), sum_to_target.value(Linear(1)))
    optimizer = optax.sgd(0.1)
    step = ppo.make_step(
        model,
        lambda _, samples: sum_to_target.reward(samples.responses, samples.prompts[:, 0]),
        optimizer,
        ppo.Config(num_tokens=3, pad_token=0, num_epochs=1, num_minibatches=1),
    )
    state = ppo.init(model.init(jax.random.key(0)), optimizer, jax.random.key(1), kl_coef=0.0)
    before = jax.tree.map(np.array, state.params)
    prompts = jnp.full((8, 1), 15)
    mask = jnp.ones(prompts.shape, bool)
    state, metrics = step(state, prompts, mask, before["policy"], None, ppo.Hyperparameters())
    assert metrics["ppo/first_ratio_error"] < 1e-5
    assert jnp.abs(state.params["policy"] - before["policy"]).max() > 1e-4
    assert jnp.abs(state.params["value"] - before["value"]).max() > 1e-4
