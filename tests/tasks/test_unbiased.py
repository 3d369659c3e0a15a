"""Policy gradients, averaged over every response with its probability, against the exact gradient.

Nothing is sampled: an estimator is unbiased when this average *is* the gradient of the objective
E_π[r] - β·KL(π ‖ π_ref), to the rounding of float32.
"""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import Array
from tasks.enumeration import (
    MASK,
    PARAMS,
    Estimator,
    N,
    P,
    T,
    V,
    gradient,
    leave_one_out,
    length_of,
    normalised,
    objective,
    of_groups,
    of_responses,
    penalised,
)

from rlhfjax import advantages
from rlhfjax.losses import policy, sequence_policy


def reinforce(baseline: Array) -> Estimator:
    def by_token(now: Array) -> Array:
        return advantages.discounted_returns(penalised(now), MASK, gamma=1.0) - baseline

    return of_responses(policy.policy_gradient, by_token)


def remax() -> Estimator:
    """The baseline is what the greedy response gets."""

    def by_token(now: Array) -> Array:
        rewards, greedy = penalised(now), now.sum(-1).argmax(-1)
        scores = jnp.take_along_axis(rewards.sum(-1), greedy[:, None], axis=1)
        return advantages.remax(rewards, jnp.broadcast_to(scores, (P, N)), MASK)

    return of_responses(policy.policy_gradient, by_token)


def ppo(gae_lambda: float) -> Estimator:
    """The first step of PPO, with a value function that knows nothing."""
    # A value is of a state: responses that begin alike share it.
    of_prefix = jax.random.normal(jax.random.key(3), (P, T, N))
    prefix = jnp.stack([jnp.arange(N) // V ** (T - t) for t in range(T)], axis=-1)
    values = jnp.stack([of_prefix[:, t, prefix[:, t]] for t in range(T)], axis=-1)

    def by_token(now: Array) -> Array:
        rewards = penalised(now)
        return advantages.gae(rewards, values, MASK, gamma=1.0, gae_lambda=gae_lambda)[0]

    return of_responses(policy.ppo_clip, by_token)


pairs = partial(of_groups, size=2, scores=lambda now: penalised(now).sum(-1))

UNBIASED = {
    "REINFORCE": reinforce(jnp.zeros((P, 1, 1))),
    "REINFORCE with a baseline": reinforce(jnp.array([[[0.3]], [[-2.0]], [[5.0]]])),
    "ReMax": remax(),
    "RLOO": pairs(leave_one_out),
    "RLOO, first step of its clipped ratio": pairs(
        leave_one_out, loss=sequence_policy.rloo_clip, of_sequences=True
    ),
    "PPO, λ = 1, first step": ppo(1.0),
}
BIASED = {
    "PPO, λ = 0.5": ppo(0.5),
    "division by the standard deviation of the group": pairs(normalised),
}


def error(estimator: Estimator) -> float:
    """The distance of the estimator's mean gradient from the exact one, relative to it."""
    wanted = gradient(lambda now: objective, PARAMS)
    return length_of(gradient(estimator, PARAMS) - wanted) / length_of(wanted)


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_gradient_is_the_gradient_of_the_objective(name: str) -> None:
    assert error(UNBIASED[name]) < 1e-5


@pytest.mark.parametrize("name", BIASED)
def test_a_biased_estimator_is_seen_to_be_biased(name: str) -> None:
    assert error(BIASED[name]) > 1e-2
