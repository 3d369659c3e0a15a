"""The expected update of an algorithm, without sampling: every response, group or pair is written
out and weighs its probability.

An estimator takes the token log-probabilities [P, N, T] of the policy that samples, and returns a
loss of those of the policy that learns, made of the library's own functions.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import advantages, kl, masked
from rlhfjax.losses import policy
from rlhfjax.tasks import tabular

P, V, T = 3, 2, 3
SIZES = {"num_prompts": P, "vocab_size": V, "length": T}
TASK = jax.jit(partial(tabular.draw, **SIZES))(jax.random.key(0))
N = len(TASK.responses)
MODEL = tabular.logit_table(**SIZES)
REF_PARAMS, PARAMS = MODEL.init(jax.random.key(1)), MODEL.init(jax.random.key(2))
REF_TOKENS = jax.jit(partial(tabular.token_log_probs, MODEL))(REF_PARAMS, TASK)
MASK = jnp.ones((P, N, T), bool)
BETA = 0.4

Estimator = Callable[[Array], Callable[[Array], Array]]


def token_log_probs(params: Any) -> Array:
    return tabular.token_log_probs(MODEL, params, TASK)


def table(log_probs: Array) -> Any:
    """The parameters of the policy that has these log-probabilities [P, N]."""
    levels, mass = [], log_probs
    for _ in range(T):
        mass = mass.reshape(P, -1, V)
        levels.insert(0, jax.nn.log_softmax(mass))
        mass = jax.nn.logsumexp(mass, axis=-1)
    return {"logits": jnp.concatenate(levels, axis=1)}


def gradient(estimator: Estimator, params: Any) -> Array:
    """The mean gradient [P, M, V] of the estimator on samples of the policy itself."""

    @jax.jit
    def update(params: Any) -> Any:
        loss = estimator(token_log_probs(params))
        return jax.grad(lambda params: loss(token_log_probs(params)))(params)

    return update(params)["logits"]


def length_of(x: Array) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def objective(log_probs: Array) -> Array:
    """The exact loss, minus the objective, of token log-probabilities."""
    return -tabular.objective(log_probs.sum(-1), REF_TOKENS.sum(-1), TASK, kl_coef=BETA)


def penalised(now: Array) -> Array:
    """Rewards as algorithms with the KL in the reward see them: -β·k1, the score at the last."""
    return advantages.token_rewards(TASK.rewards, kl.k1(now, REF_TOKENS), MASK, kl_coef=BETA)


def of_responses(
    loss: Callable[..., Any], by_token: Callable[[Array], Array], **options: Any
) -> Estimator:
    """A loss whose advantages [P, N, T] are made of one response each."""

    def estimator(now: Array) -> Callable[[Array], Array]:
        weights, advantage = chances(now)[..., None] / P, by_token(now)
        old = () if loss is policy.policy_gradient else (now,)
        options["weights"] = jnp.broadcast_to(weights, MASK.shape)
        return lambda log_probs: loss(
            log_probs, *old, advantage, MASK, reduce=masked.sum, **options
        )[0]

    return estimator


def of_groups(
    by_group: Callable[[Array], Array],
    *,
    size: int,
    scores: Callable[[Array], Array] = lambda now: TASK.rewards,
    loss: Callable[..., Any] = policy.policy_gradient,
    of_sequences: bool = False,
) -> Estimator:
    """A loss whose advantages, from scores [G], are made of all groups of G responses."""
    group = jnp.stack(jnp.meshgrid(*[jnp.arange(N)] * size), axis=-1).reshape(-1, size)
    mask = jnp.ones((P, *group.shape, T), bool)

    def estimator(now: Array) -> Callable[[Array], Array]:
        advantage = jax.vmap(jax.vmap(by_group))(scores(now)[:, group])
        chance = chances(now)[:, group].prod(-1) / (P * size)
        weights = jnp.broadcast_to(chance[..., None, None], mask.shape)
        if of_sequences:
            # The loss of a response stands at each of its tokens: a mean over them, summed.
            weights = weights / T
        else:
            advantage = advantages.spread(advantage, mask)
        old = () if loss is policy.policy_gradient else (now[:, group],)
        return lambda log_probs: loss(
            log_probs[:, group], *old, advantage, mask, weights=weights, reduce=masked.sum
        )[0]

    return estimator


def in_loss(
    divergence: Callable[..., Array], *, kl_coef: float = BETA, whole: bool = False
) -> Estimator:
    """β·an estimate of the divergence of each token, or of the whole response, differentiated."""

    def estimator(now: Array) -> Callable[[Array], Array]:
        def loss(log_probs: Array) -> Array:
            pair = (x.sum(-1, keepdims=True) if whole else x for x in (log_probs, REF_TOKENS))
            return kl_coef * jnp.sum(chances(now)[..., None] / P * divergence(*pair))

        return loss

    return estimator


def together(*estimators: Estimator) -> Estimator:
    def estimator(now: Array) -> Callable[[Array], Array]:
        losses = [each(now) for each in estimators]
        return lambda log_probs: sum((loss(log_probs) for loss in losses), jnp.zeros(()))

    return estimator


def chances(now: Array) -> Array:
    return jnp.exp(now.sum(-1))


def leave_one_out(scores: Array) -> Array:
    return advantages.leave_one_out(scores, jnp.zeros(scores.shape, int))


def relative(scores: Array) -> Array:
    return advantages.group_relative(scores, jnp.zeros(scores.shape, int))


def normalised(scores: Array) -> Array:
    ids = jnp.zeros(scores.shape, int)
    return advantages.scale_by_group_std(relative(scores), scores, ids)
