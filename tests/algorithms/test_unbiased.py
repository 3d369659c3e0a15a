"""REINFORCE, RLOO and ReMax as they are, over all batches there can be, responses ending early.

The mean of their gradients, each batch weighed with its probability, is the gradient of the
objective; no response is sampled.
"""

import itertools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from rlhfjax import masked, models
from rlhfjax.algorithms import critic_free, ppo, reinforce, remax, rloo
from rlhfjax.log_probs import response_log_probs
from rlhfjax.tasks import tabular
from rlhfjax.types import Rollout

V, T, END, BETA = 3, 3, 0, 0.4
SIZES = {"num_prompts": 1, "vocab_size": V, "length": T}
MODEL = tabular.logit_table(**SIZES)
REF, PARAMS = (MODEL.init(jax.random.key(seed)) for seed in (1, 2))


def every_response() -> tuple[Array, Array]:
    """Of all strings of T tokens, those with nothing but END behind the first END."""
    strings = np.array(list(itertools.product(range(V), repeat=T)), np.int32)
    ends = strings == END
    mask = np.cumsum(ends, axis=1) - ends == 0
    whole = (mask | ends).all(1)
    return jnp.asarray(strings[whole]), jnp.asarray(mask[whole])


RESPONSES, MASK = every_response()
N = len(RESPONSES)
SCORES = jnp.asarray(np.random.default_rng(0).normal(size=N), jnp.float32)
TOKENS = jnp.asarray(np.pad(RESPONSES, [(0, 0), (1, 0)]))
ATTENTION = jnp.asarray(np.pad(MASK, [(0, 0), (1, 0)], constant_values=True))


def log_probs(params: Any, rows: Array | slice = slice(None)) -> Array:
    found, _ = response_log_probs(MODEL, params, TOKENS[rows], ATTENTION[rows], T)
    return masked.fill(found, MASK[rows])


NOW = jax.jit(log_probs)(PARAMS)
CHANCES = jnp.exp(NOW.sum(1))
ROLLOUT = Rollout(TOKENS, ATTENTION, MASK, NOW)


def exact(params: Any) -> Array:
    now = log_probs(params).sum(1)
    return -jnp.sum(jnp.exp(now) * (SCORES - BETA * (now - log_probs(REF).sum(1))))


def gradient(algorithm: ModuleType, batches: Array, chances: Array, group_size: int) -> Array:
    """The mean over batches [M, B] of rows, with their chances [M]."""
    hyper = algorithm.Hyperparameters(kl_coef=BETA)

    def loss(params: Any) -> Array:
        def of_batch(rows: Array) -> Array:
            samples = jax.tree.map(lambda x: x[rows], ROLLOUT)
            batch = critic_free.experience(
                samples, SCORES[rows], REF, hyper, model=MODEL, group_size=group_size
            )
            batch = algorithm.estimate(batch, hyper)
            own = rows[:: len(rows) // len(batch.scores)]
            return algorithm.loss(log_probs(params, own), batch, hyper)[0]

        return jnp.sum(chances * jax.vmap(of_batch)(batches))

    return jax.jit(jax.grad(loss))(PARAMS)["logits"]


def pairs() -> tuple[Array, Array]:
    first, second = (x.ravel() for x in jnp.meshgrid(jnp.arange(N), jnp.arange(N)))
    return jnp.stack([first, second], axis=1), CHANCES[first] * CHANCES[second]


def with_greedy() -> tuple[Array, Array]:
    """Each response, and the one that takes the most probable token again and again."""
    alive = np.arange(N)
    for t in range(T):
        probs = np.exp(np.asarray(NOW)[alive, t])
        best = np.asarray(RESPONSES)[alive[probs.argmax()], t]
        alive = alive[np.asarray(RESPONSES)[alive, t] == best]
    (greedy,) = alive
    return jnp.stack([jnp.arange(N), jnp.full(N, greedy)], axis=1), CHANCES


@pytest.mark.parametrize(
    ("algorithm", "batches", "group_size"),
    [(reinforce, pairs, 1), (rloo, pairs, 2), (remax, with_greedy, 2)],
    ids=["reinforce", "rloo", "remax"],
)
def test_the_mean_gradient_is_that_of_the_objective(
    algorithm: ModuleType, batches: Any, group_size: int
) -> None:
    assert sorted(set(np.asarray(MASK).sum(1))) == [1, 2, 3]
    assert float(CHANCES.sum()) == pytest.approx(1, abs=1e-6)
    wanted = np.asarray(jax.jit(jax.grad(exact))(PARAMS)["logits"])
    found = np.asarray(gradient(algorithm, *batches(), group_size))
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_the_first_update_of_ppo_is_the_exact_gradient_but_for_a_factor() -> None:
    """At λ = 1, whatever the critic says. It whitens: one baseline and one scale, 1/σ.

    The policy is uniform, so that a batch of every response once is its distribution.
    """
    task = tabular.draw(jax.random.key(0), **SIZES)
    critic = tabular.value_table(**SIZES)
    values = jax.random.normal(jax.random.key(4), (1, 13))
    params = {"policy": jax.tree.map(jnp.zeros_like, PARAMS), "value": {"values": values}}
    model = models.separate_trunks(MODEL, critic)
    hyper = ppo.Hyperparameters(gae_lambda=1.0, value_coef=0.0)
    count = len(task.responses)
    tokens = jnp.concatenate([jnp.zeros((count, 1), int), task.responses], axis=1)
    now = tabular.token_log_probs(MODEL, params["policy"], task)[0]
    samples = Rollout(tokens, jnp.ones(tokens.shape, bool), jnp.ones((count, T), bool), now)

    @jax.jit
    def ascent(params: Any) -> Any:
        batch, _ = ppo.experience(
            params, samples, task.rewards[0], REF, hyper, jnp.float32(BETA), model=model
        )
        grads, _ = jax.grad(ppo.loss, has_aux=True)(params, batch, hyper, model=model)
        return -grads["policy"]["logits"]

    found = np.asarray(ascent(params))
    ref = tabular.log_probs(MODEL, REF, task)
    exact = tabular.gradient(MODEL, params["policy"], ref, task, kl_coef=BETA)["logits"]
    factor = np.vdot(found, exact) / np.vdot(exact, exact)
    assert factor > 0
    assert np.linalg.norm(found / factor - exact) < 1e-5 * np.linalg.norm(exact)
