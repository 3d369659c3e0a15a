"""Policy gradients, averaged over every response with its probability, against the exact gradient.

Nothing is sampled: an estimator is unbiased when this average *is* the gradient of the objective
E_π[r] - β·KL(π ‖ π_ref), to the rounding of float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rlhfjax import advantages, kl, masked
from rlhfjax.losses import policy, reductions, sequence_policy
from rlhfjax.tasks import tabular

P, V, T = 3, 2, 3
SIZES = {"num_prompts": P, "vocab_size": V, "length": T}
TASK = tabular.draw(jax.random.key(0), **SIZES)
N = len(TASK.responses)
MODEL = tabular.logit_table(**SIZES)
REF_PARAMS, PARAMS = MODEL.init(jax.random.key(1)), MODEL.init(jax.random.key(2))
REF_TOKENS = tabular.token_log_probs(MODEL, REF_PARAMS, TASK)
NOW = tabular.token_log_probs(MODEL, PARAMS, TASK)
CHANCE = jnp.exp(NOW.sum(-1))
MASK = jnp.ones((P, N, T), bool)
BETA = 0.4
# As every algorithm with the KL in the reward sees it: -β·k1 at each token, the score at the last.
REWARDS = advantages.token_rewards(TASK.rewards, kl.k1(NOW, REF_TOKENS), MASK, kl_coef=BETA)


def exact(params: Any) -> Array:
    log_probs = tabular.log_probs(MODEL, params, TASK)
    return -tabular.objective(log_probs, REF_TOKENS.sum(-1), TASK, kl_coef=BETA)


def each_response(loss: Callable[..., Any], by_token: Array, **options: Any) -> Callable:
    """Σ over responses of their probability and their loss, a mean over prompts."""
    weights = jnp.broadcast_to(CHANCE[..., None] / P, MASK.shape)

    def total(params: Any) -> Array:
        log_probs = tabular.token_log_probs(MODEL, params, TASK)
        old = () if loss is policy.policy_gradient else (NOW,)
        return loss(log_probs, *old, by_token, MASK, weights=weights, reduce=masked.sum, **options)[
            0
        ]

    return total


def reinforce(baseline: Array) -> Callable:
    returns = advantages.discounted_returns(REWARDS, MASK, gamma=1.0)
    return each_response(policy.policy_gradient, returns - baseline)


def remax() -> Callable:
    """The baseline is what the greedy response gets."""
    greedy = NOW.sum(-1).argmax(-1)
    scores = jnp.take_along_axis(REWARDS.sum(-1), greedy[:, None], axis=1)
    by_token = advantages.remax(REWARDS, jnp.broadcast_to(scores, (P, N)), MASK)
    return each_response(policy.policy_gradient, by_token)


def ppo(gae_lambda: float) -> Callable:
    """The first step of PPO, with a value function that knows nothing."""
    # A value is of a state: responses that begin alike share it.
    of_prefix = jax.random.normal(jax.random.key(3), (P, T, N))
    prefix = jnp.stack([jnp.arange(N) // V ** (T - t) for t in range(T)], axis=-1)
    values = jnp.stack([of_prefix[:, t, prefix[:, t]] for t in range(T)], axis=-1)
    by_token, _ = advantages.gae(REWARDS, values, MASK, gamma=1.0, gae_lambda=gae_lambda)
    return each_response(policy.ppo_clip, by_token)


def pairs_of_responses(advantage_of_pair: Callable, loss: Callable) -> Callable:
    """All groups of two: both responses are drawn, each sees the other."""
    first, second = (x.ravel() for x in jnp.meshgrid(jnp.arange(N), jnp.arange(N)))
    group = jnp.stack([first, second], axis=-1)  # [N², 2]
    scores = REWARDS.sum(-1)[:, group]
    per_response = jax.vmap(jax.vmap(advantage_of_pair))(scores)
    chance = CHANCE[:, first] * CHANCE[:, second] / P
    weights = jnp.broadcast_to(chance[..., None, None] / 2, (*scores.shape, T))
    mask = jnp.ones(weights.shape, bool)

    def total(params: Any) -> Array:
        log_probs = tabular.token_log_probs(MODEL, params, TASK)[:, group]
        if loss is policy.policy_gradient:
            by_token = advantages.spread(per_response, mask)
            return loss(log_probs, by_token, mask, weights=weights, reduce=masked.sum)[0]
        # The loss of a response stands at each of its tokens: a mean over them, summed.
        reduce = reductions.constant_total
        return loss(
            log_probs,
            NOW[:, group],
            per_response,
            mask,
            weights=weights,
            reduce=lambda x, mask: reduce(x, mask, total=T),
        )[0]

    return total


def leave_one_out(scores: Array) -> Array:
    return advantages.leave_one_out(scores, jnp.zeros(2, int))


def normalised(scores: Array) -> Array:
    ids = jnp.zeros(2, int)
    relative = advantages.group_relative(scores, ids)
    return advantages.scale_by_group_std(relative, scores, ids)


UNBIASED = {
    "REINFORCE": reinforce(jnp.zeros((P, 1, 1))),
    "REINFORCE with a baseline": reinforce(jnp.array([[[0.3]], [[-2.0]], [[5.0]]])),
    "ReMax": remax(),
    "RLOO": pairs_of_responses(leave_one_out, policy.policy_gradient),
    "RLOO, first step of its clipped ratio": pairs_of_responses(
        leave_one_out, sequence_policy.rloo_clip
    ),
    "PPO, λ = 1, first step": ppo(1.0),
}
BIASED = {
    "PPO, λ = 0.5": ppo(0.5),
    "division by the standard deviation of the group": pairs_of_responses(
        normalised, policy.policy_gradient
    ),
}


def error(estimator: Callable) -> float:
    """The distance of the estimator's mean gradient from the exact one, relative to it."""
    found = np.asarray(jax.grad(estimator)(PARAMS)["logits"], np.float64)
    wanted = np.asarray(jax.grad(exact)(PARAMS)["logits"], np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", UNBIASED)
def test_the_mean_gradient_is_the_gradient_of_the_objective(name: str) -> None:
    assert error(UNBIASED[name]) < 1e-5


@pytest.mark.parametrize("name", BIASED)
def test_a_biased_estimator_is_seen_to_be_biased(name: str) -> None:
    assert error(BIASED[name]) > 1e-2
