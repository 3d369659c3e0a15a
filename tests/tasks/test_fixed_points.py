"""Where the expected update of each algorithm vanishes, on a task that is enumerated.

The updates are made of the library's losses and advantages, the fixed points are those of
`rlhfjax.tasks.fixed_points`: neither knows of the other. The derivations are in
`docs/fixed_points.md`.
"""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array
from tasks.enumeration import (
    BETA,
    MASK,
    PARAMS,
    REF_PARAMS,
    REF_TOKENS,
    TASK,
    Estimator,
    N,
    P,
    T,
    V,
    chances,
    gradient,
    in_loss,
    leave_one_out,
    length_of,
    normalised,
    of_groups,
    of_responses,
    penalised,
    relative,
    table,
    together,
    token_log_probs,
)

from rlhfjax import advantages, kl, masked
from rlhfjax.losses import policy, preference, reference_free, sequence_policy, supervised, unpaired
from rlhfjax.tasks import fixed_points, tabular

REFERENCE = REF_TOKENS.sum(-1)
UNIFORM = jnp.zeros_like(REFERENCE)
SKEWED = jax.random.normal(jax.random.key(5), REFERENCE.shape)
OPTIMUM = tabular.optimum(REFERENCE, TASK, kl_coef=BETA)
PREFERRED = tabular.preference_probs(TASK)


def policy_gradient(baseline: float = 0.0) -> Estimator:
    def by_token(now: Array) -> Array:
        return advantages.discounted_returns(penalised(now), MASK, gamma=1.0) - baseline

    return of_responses(policy.policy_gradient, by_token)


def whitened(now: Array) -> Array:
    """By the mean and the variance of infinitely many samples."""
    returns = advantages.discounted_returns(penalised(now), MASK, gamma=1.0)
    weights = jnp.broadcast_to(chances(now)[..., None] / (P * T), returns.shape)
    mean = jnp.sum(weights * returns)
    return masked.standardize(returns, mean, jnp.sum(weights * jnp.square(returns - mean)))


def ppo(gae_lambda: float) -> Estimator:
    """With a critic that has learned its targets: the values are those of the policy."""

    def by_token(now: Array) -> Array:
        rewards = penalised(now)
        returns, chance = advantages.discounted_returns(rewards, MASK, gamma=1.0), chances(now)
        values = []
        for t in range(T):
            rest = (P, V**t, -1)
            weights = chance.reshape(rest)
            value = (weights * returns[..., t].reshape(rest)).sum(-1) / weights.sum(-1)
            values.append(jnp.repeat(value, N // V**t, axis=1))
        values = jnp.stack(values, axis=-1)
        return advantages.gae(rewards, values, MASK, gamma=1.0, gae_lambda=gae_lambda)[0]

    return of_responses(policy.ppo_clip, by_token)


def pairs_of(
    loss: Callable[..., Any], sampler: Array | None = None, *, temperature: float = 1.0
) -> Estimator:
    """All pairs, both outcomes of each with their probabilities; None: drawn from the policy."""

    def estimator(now: Array) -> Callable[[Array], Array]:
        chance = chances(now) if sampler is None else jax.nn.softmax(sampler)
        preferred = jax.nn.sigmoid((TASK.rewards[..., None] - TASK.rewards[:, None]) / temperature)
        weights = chance[:, :, None] * chance[:, None] * preferred / P
        reference = jnp.broadcast_arrays(REFERENCE[:, :, None], REFERENCE[:, None])

        def total(log_probs: Array) -> Array:
            whole = log_probs.sum(-1)
            pair = jnp.broadcast_arrays(whole[:, :, None], whole[:, None])
            return loss(*pair, *reference, weights=weights, reduce=masked.sum)[0]

        return total

    return estimator


def without_reference(loss: Callable[..., Any], *, per_token: bool, nll_coef: float = 0.0):
    """As a loss of pairs with a reference, plus the likelihood of the chosen response."""

    def total(chosen: Array, rejected: Array, *_: Array, weights: Array, reduce: Any) -> Any:
        scale = 1 / T if per_token else 1.0
        value, metrics = loss(scale * chosen, scale * rejected, weights=weights, reduce=reduce)
        likelihood = supervised.language_model(
            chosen, jnp.ones(chosen.shape, bool), reduce=lambda x, mask: reduce(weights * x, mask)
        )
        return value + nll_coef * likelihood, metrics

    return total


def kto(now: Array) -> Callable[[Array], Array]:
    """Uniform pairs, each response as the chosen and as the rejected one; z as in a large batch."""
    wins = PREFERRED.mean(-1)

    def total(log_probs: Array) -> Array:
        whole = log_probs.sum(-1)
        z = unpaired.reference_kl(whole.ravel(), REFERENCE.ravel())
        losses = [
            unpaired.kto(
                whole,
                REFERENCE,
                jnp.full(whole.shape, desirable),
                z,
                beta=BETA,
                weights=share / (P * N),
                reduce=masked.sum,
            )[0]
            for desirable, share in ((True, wins), (False, 1.0 - wins))
        ]
        return losses[0] + losses[1]

    return total


def grpo(size: int, **loss: Any) -> Estimator:
    return together(of_groups(normalised, size=size, **loss), in_loss(kl.k3))


def point(of: Callable[..., Array], **numbers: Any) -> Callable[[], Array]:
    return lambda: of(REFERENCE, TASK, **({"kl_coef": BETA} | numbers))


def of_pairs(loss: Callable[..., Any], sampler: Array) -> Callable[[], Array]:
    return lambda: fixed_points.of_pairs(loss, REFERENCE, sampler, TASK)


DPO = partial(preference.dpo, beta=BETA)
CDPO = partial(preference.cdpo, beta=BETA, label_smoothing=0.1)
IPO = partial(preference.ipo, beta=BETA)
SIMPO = without_reference(partial(reference_free.simpo, beta=2.0, margin=0.5), per_token=True)
CPO = without_reference(partial(reference_free.cpo, beta=BETA), per_token=False, nll_coef=1 / T)
ORPO = without_reference(partial(reference_free.orpo, beta=BETA), per_token=True, nll_coef=1 / T)
cispo = partial(policy.cispo, clip_range=1.0, clip_range_high=4.0)

POINTS: dict[str, tuple[Estimator, Callable[[], Array]]] = {
    "REINFORCE": (policy_gradient(0.7), lambda: OPTIMUM),
    "REINFORCE++": (of_responses(policy.ppo_clip, whitened), lambda: OPTIMUM),
    "RLOO": (
        of_groups(
            leave_one_out,
            size=2,
            scores=lambda now: penalised(now).sum(-1),
            loss=sequence_policy.rloo_clip,
            of_sequences=True,
        ),
        lambda: OPTIMUM,
    ),
    "PPO, λ = 0.5, exact values": (ppo(0.5), lambda: OPTIMUM),
    "k2 of the whole response": (
        together(of_groups(leave_one_out, size=2), in_loss(kl.k2, whole=True)),
        lambda: OPTIMUM,
    ),
    "k2 of each token": (
        together(of_groups(leave_one_out, size=2), in_loss(kl.k2)),
        point(fixed_points.token_k2),
    ),
    "k3 of each token": (
        together(of_groups(leave_one_out, size=2), in_loss(kl.k3)),
        point(fixed_points.token_k3),
    ),
    "Dr.GRPO, G = 3": (
        together(of_groups(relative, size=3), in_loss(kl.k2)),
        point(fixed_points.token_k2, kl_coef=BETA * 3 / 2),
    ),
    "GRPO, G = 2": (grpo(2, loss=policy.ppo_clip), point(fixed_points.group_std, num_responses=2)),
    "GRPO, G = 4": (grpo(4, loss=policy.ppo_clip), point(fixed_points.group_std, num_responses=4)),
    "GSPO": (
        grpo(2, loss=sequence_policy.gspo_token),
        point(fixed_points.group_std, num_responses=2),
    ),
    "CISPO": (grpo(3, loss=cispo), point(fixed_points.group_std, num_responses=3)),
    "DPO": (pairs_of(DPO, SKEWED), lambda: OPTIMUM),
    "DPO by descent": (pairs_of(DPO, SKEWED), of_pairs(DPO, SKEWED)),
    "cDPO": (pairs_of(CDPO, SKEWED), of_pairs(CDPO, SKEWED)),
    "IPO": (
        pairs_of(IPO, SKEWED),
        lambda: fixed_points.ipo(REFERENCE, SKEWED, TASK, kl_coef=BETA),
    ),
    "SimPO": (pairs_of(SIMPO, UNIFORM), of_pairs(SIMPO, UNIFORM)),
    "CPO": (pairs_of(CPO, UNIFORM), of_pairs(CPO, UNIFORM)),
    "ORPO": (pairs_of(ORPO, UNIFORM), of_pairs(ORPO, UNIFORM)),
    "online DPO": (pairs_of(DPO), lambda: OPTIMUM),
    "online DPO, τ = 2": (
        pairs_of(DPO, temperature=2.0),
        lambda: tabular.optimum(REFERENCE, TASK, kl_coef=2.0 * BETA),
    ),
}


@pytest.fixture(scope="module")
def points() -> dict[str, Array]:
    return jax.jit(lambda: {name: point() for name, (_, point) in POINTS.items()})()


@pytest.mark.parametrize("name", POINTS)
def test_the_expected_update_vanishes_there_and_not_elsewhere(name: str, points: Any) -> None:
    update = jax.jit(partial(gradient, POINTS[name][0]))
    at_start = length_of(update(REF_PARAMS))
    assert length_of(update(table(points[name]))) <= 1e-4 * at_start
    nearby = points[name] + 0.1 * jax.random.normal(jax.random.key(6), REFERENCE.shape)
    assert length_of(update(table(nearby))) > 1e-2 * at_start
    np.testing.assert_allclose(jnp.exp(points[name]).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["k2 of each token", "k3 of each token", "GRPO, G = 2", "GRPO, G = 4", "ORPO", "cDPO"]
)
def test_another_start_leads_to_the_same_point(name: str, points: Any) -> None:
    found = descend(POINTS[name][0], PARAMS, num_steps=400)
    assert divergence(points[name], found).max() < 1e-3
    assert divergence(points[name], token_log_probs(PARAMS).sum(-1)).max() > 0.1


def test_kto_leaves_nothing_of_what_loses_more_often_than_it_wins() -> None:
    limit = fixed_points.kto(REFERENCE, UNIFORM, TASK, kl_coef=BETA)
    wins = np.asarray(PREFERRED).mean(-1)
    np.testing.assert_array_equal(np.isneginf(limit), wins < 0.5)
    # In the limit, what is left gains as much as its probability; descent gets there as a power
    # of time.
    gains = (2 * wins - 1) * jax.nn.sigmoid(BETA * (limit - REFERENCE))
    gains *= jax.nn.sigmoid(-BETA * (limit - REFERENCE))
    gains = np.where(wins > 0.5, gains, 0.0)
    np.testing.assert_allclose(jnp.exp(limit), gains / gains.sum(-1, keepdims=True), atol=1e-5)
    near = table(jnp.maximum(limit, -60.0))
    start = length_of(gradient(kto, REF_PARAMS))
    assert length_of(gradient(kto, near)) <= 1e-4 * start
    away = [divergence(limit, descend(kto, PARAMS, num_steps=k)).max() for k in (100, 400)]
    assert away[1] < 0.02 < away[0]


def test_kto_leaves_the_reference_where_nothing_wins() -> None:
    equal = tabular.Task(TASK.prompts, TASK.responses, jnp.zeros_like(TASK.rewards))
    found = fixed_points.kto(REFERENCE, jnp.zeros_like(REFERENCE), equal, kl_coef=BETA)
    np.testing.assert_array_equal(found, REFERENCE)


def test_hard_labels_have_no_fixed_point() -> None:
    """A response that always wins is pushed on and on: online DPO as τ falls to 0."""
    hard = pairs_of(DPO, temperature=1e-3)
    chance = [jnp.exp(descend(hard, REF_PARAMS, num_steps=k)).max(-1).min() for k in (50, 400)]
    assert chance[1] > chance[0] and chance[1] > 0.95


def test_the_points_differ() -> None:
    """None of them is π* in disguise: the nearest one is 0.01 nats away, token-level k2."""
    for of in (fixed_points.token_k2, fixed_points.token_k3):
        assert divergence(of(REFERENCE, TASK, kl_coef=BETA), OPTIMUM).mean() > 0.01
    first = fixed_points.token_k2(REFERENCE, TASK, kl_coef=BETA)
    assert divergence(fixed_points.token_k3(REFERENCE, TASK, kl_coef=BETA), first).mean() > 0.01


def test_for_one_token_k2_of_each_token_is_that_of_the_response() -> None:
    task = tabular.draw(jax.random.key(0), num_prompts=2, vocab_size=9, length=1)
    reference = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (2, 9)))
    found = fixed_points.token_k2(reference, task, kl_coef=0.3)
    np.testing.assert_allclose(found, tabular.optimum(reference, task, kl_coef=0.3), atol=1e-5)


def by_prefix(choose: Callable[[np.ndarray, np.ndarray], np.ndarray], prompt: int) -> np.ndarray:
    """Backward induction in float64 over prefixes as tuples."""
    responses = list(itertools.product(range(V), repeat=T))
    reference = dict(zip(responses, np.exp(np.asarray(REFERENCE[prompt], np.float64)), strict=True))
    value = dict(zip(responses, np.asarray(TASK.rewards[prompt], np.float64), strict=True))
    policy: dict[tuple[int, ...], float] = {}
    for t in reversed(range(T)):
        for prefix in itertools.product(range(V), repeat=t):
            after = [(*prefix, token) for token in range(V)]
            mass = np.array([reference[s] for s in after])
            chance = choose(mass / mass.sum(), np.array([value[s] for s in after]))
            policy |= dict(zip(after, chance, strict=True))
            reference[prefix] = mass.sum()
            value[prefix] = float(chance @ [value[s] for s in after])
    return np.array([math.prod(policy[y[: t + 1]] for t in range(T)) for y in responses])


def exponential(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    weights = reference * np.exp(values / BETA)
    return weights / weights.sum()


def hyperbolic(reference: np.ndarray, values: np.ndarray) -> np.ndarray:
    low, high = values.max(), values.max() + BETA
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if (BETA * reference / (mu - values)).sum() > 1 else (low, mu)
    return BETA * reference / (high - values)


@pytest.mark.parametrize(
    ("of", "choose"), [(fixed_points.token_k2, exponential), (fixed_points.token_k3, hyperbolic)]
)
def test_backward_induction_is_that_over_a_tree(of: Any, choose: Any) -> None:
    found = jnp.exp(of(REFERENCE, TASK, kl_coef=BETA))
    for prompt in range(P):
        np.testing.assert_allclose(found[prompt], by_prefix(choose, prompt), rtol=2e-5)


@pytest.mark.parametrize("beta", [1e-3, 0.03, 1.0, 1e3])
def test_token_k3_sums_to_one_whatever_the_coefficient(beta: float) -> None:
    values = np.array([2.0, 1.999, -3.0, 2.0])
    reference = np.array([1e-6, 0.2, 0.799998, 1e-6])
    task = tabular.Task(jnp.zeros((1, 1), int), jnp.arange(4)[:, None], jnp.asarray(values[None]))
    found = fixed_points.token_k3(jnp.log(jnp.asarray(reference))[None], task, kl_coef=beta)[0]
    # β·π_ref/π = μ - Q, with one μ for all.
    mu = np.asarray(beta * reference / np.exp(np.asarray(found, np.float64))) + values
    np.testing.assert_allclose(mu, mu[0], rtol=1e-4, atol=1e-4)


def test_ipo_is_the_reference_tilted_by_the_chance_to_win() -> None:
    """The minimiser of Σ μᵢμⱼ·(hᵢ - hⱼ - (2·pᵢⱼ - 1)/(2·β))² over h, by least squares."""
    found = fixed_points.ipo(REFERENCE, SKEWED, TASK, kl_coef=BETA)
    for prompt in range(P):
        skew = np.exp(np.asarray(SKEWED[prompt], np.float64))
        rewards = np.asarray(TASK.rewards[prompt], np.float64)
        rows, wanted = [], []
        for i, j in itertools.permutations(range(N), 2):
            weight = math.sqrt(skew[i] * skew[j])
            rows.append(weight * (np.eye(N)[i] - np.eye(N)[j]))
            label = 2 / (1 + math.exp(rewards[j] - rewards[i])) - 1
            wanted.append(weight * label / (2 * BETA))
        ratio = np.linalg.lstsq(np.array(rows), np.array(wanted))[0]
        weights = np.exp(np.asarray(REFERENCE[prompt], np.float64) + ratio)
        np.testing.assert_allclose(jnp.exp(found[prompt]), weights / weights.sum(), rtol=1e-4)


def test_simpo_without_a_margin_forgets_the_reference() -> None:
    """π ∝ exp(T·r/β)."""
    loss = without_reference(partial(reference_free.simpo, beta=2.0, margin=0.0), per_token=True)
    found = fixed_points.of_pairs(loss, REFERENCE, SKEWED, TASK)
    np.testing.assert_allclose(found, jax.nn.log_softmax(T * TASK.rewards / 2.0), atol=1e-3)


def test_labels_flipped_with_a_known_chance_cost_robust_dpo_nothing() -> None:
    def flipped(*pair: Array, weights: Array, reduce: Any) -> Any:
        loss = partial(preference.robust, beta=BETA, label_smoothing=0.1, reduce=reduce)
        swapped = (pair[1], pair[0], pair[3], pair[2])
        kept = loss(*pair, weights=0.9 * weights)[0]
        return kept + loss(*swapped, weights=0.1 * weights)[0], {}

    found = fixed_points.of_pairs(flipped, REFERENCE, UNIFORM, TASK)
    np.testing.assert_allclose(found, OPTIMUM, atol=1e-3)


@pytest.mark.parametrize("num_samples", [1, 2, 4])
def test_best_of_n_is_the_law_of_the_best_of_all_draws(num_samples: int) -> None:
    rewards = TASK.rewards.at[:, 3].set(TASK.rewards[:, 5])
    task = tabular.Task(TASK.prompts, TASK.responses, rewards)
    found = fixed_points.best_of_n(REFERENCE, task, num_samples=num_samples)
    chance, rewards = np.exp(np.asarray(REFERENCE, np.float64)), np.asarray(rewards)
    expected = np.zeros((P, N))
    for draws in itertools.product(range(N), repeat=num_samples):
        of_draws = rewards[:, draws]
        first_best = np.array(draws)[of_draws.argmax(-1)]
        expected[np.arange(P), first_best] += chance[:, draws].prod(-1)
    np.testing.assert_allclose(jnp.exp(found), expected, rtol=1e-4)


def test_best_of_n_is_within_the_known_bound_and_repeats_as_a_power() -> None:
    for num_samples in (2, 8, 64):
        found = fixed_points.best_of_n(REFERENCE, TASK, num_samples=num_samples)
        bound = math.log(num_samples) - (num_samples - 1) / num_samples
        assert (divergence(found, REFERENCE) < bound).all()
    thrice = REFERENCE
    for _ in range(3):
        thrice = fixed_points.best_of_n(thrice, TASK, num_samples=2)
    once = fixed_points.best_of_n(REFERENCE, TASK, num_samples=8)
    np.testing.assert_allclose(jnp.exp(thrice), jnp.exp(once), rtol=1e-4, atol=1e-7)
    forever = fixed_points.best_of_n(REFERENCE, TASK, num_samples=1e6)
    np.testing.assert_array_equal(forever.argmax(-1), TASK.rewards.argmax(-1))
    np.testing.assert_allclose(jnp.exp(forever).max(-1), 1.0, atol=1e-5)


def test_groups_that_cannot_be_enumerated_are_refused() -> None:
    with pytest.raises(ValueError, match="numbers"):
        fixed_points.group_std(REFERENCE, TASK, kl_coef=BETA, num_responses=10**8)
    with pytest.raises(ValueError, match="two responses"):
        fixed_points.group_std(REFERENCE, TASK, kl_coef=BETA, num_responses=1)


def divergence(log_probs: Array, ref_log_probs: Array) -> Array:
    return kl.of_distributions(log_probs=log_probs, ref_log_probs=ref_log_probs)


def descend(estimator: Estimator, params: Any, *, num_steps: int) -> Array:
    """log π after descending the expected update."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.2, num_steps))

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = optimizer.update({"logits": gradient(estimator, params)}, state)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps))(carry)
    return token_log_probs(params).sum(-1)
