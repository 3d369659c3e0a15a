"""The estimators that do not follow the gradient of the objective: which gradient they follow.

Every response or group is enumerated; `docs/fixed_points.md` states the same claims in words.
"""

import jax
import jax.numpy as jnp
import numpy as np
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
    length_of,
    normalised,
    of_groups,
    of_responses,
    penalised,
    relative,
    token_log_probs,
)

from rlhfjax import advantages, kl, masked
from rlhfjax.losses import policy
from rlhfjax.tasks import fixed_points, tabular

NOW = jax.jit(token_log_probs)(PARAMS)
CHANCE = chances(NOW)


def of_reward(rewards: Array) -> Array:
    """The exact gradient of minus the mean of E_π[rewards], for rewards [P, N] that stay put."""

    def loss(params: object) -> Array:
        return -jnp.mean(jnp.sum(chances(token_log_probs(params)) * rewards, axis=-1))

    return jax.jit(jax.grad(loss))(PARAMS)["logits"]


def of_tokens(divergence_of_prefix: object) -> Array:
    """The gradient of β·Σ over prefixes of their probability, as it is, and a divergence there."""

    def loss(params: object) -> Array:
        own, reference = (jax.nn.log_softmax(x["logits"]) for x in (params, REF_PARAMS))
        reached = jnp.concatenate([CHANCE.reshape(P, V**t, -1).sum(-1) for t in range(T)], axis=1)
        return BETA / P * jnp.sum(reached * divergence_of_prefix(own, reference))

    return jax.jit(jax.grad(loss))(PARAMS)["logits"]


def assert_equal(found: Array, wanted: Array, tolerance: float = 1e-5) -> None:
    assert length_of(wanted) > 1e-3
    assert length_of(found - wanted) <= tolerance * length_of(wanted)


def with_rewards(rewards: Array, by_group: object, size: int = 2) -> Array:
    return gradient(of_groups(by_group, size=size, scores=lambda now: rewards), PARAMS)


def ranks(rewards: Array, others: Array, chance: Array) -> Array:
    """P(r' < r) - P(r' > r)."""
    return jnp.sign(rewards[..., None] - others) @ chance


def test_a_mean_with_the_own_sample_shrinks_the_gradient_and_nothing_else() -> None:
    for size in (2, 4):
        found = with_rewards(TASK.rewards, relative, size)
        assert_equal(found, (size - 1) / size * of_reward(TASK.rewards))


def test_the_std_of_a_group_of_two_leaves_ranks() -> None:
    rank = jax.vmap(ranks)(TASK.rewards, TASK.rewards, CHANCE)
    found = with_rewards(TASK.rewards, normalised)
    assert_equal(found, of_reward(rank) / np.sqrt(2), 1e-2)  # of eps


@pytest.mark.parametrize("size", [2, 3])
def test_the_std_of_a_group_gives_every_prompt_the_same_scale(size: int) -> None:
    """A prompt whose rewards differ a tenth as much counts ten times as much as it should."""
    small = TASK.rewards.at[0].multiply(0.1)
    before, after = (with_rewards(r, normalised, size)[0] for r in (TASK.rewards, small))
    assert_equal(after, before, 1e-2)
    assert_equal(of_reward(small)[0], 0.1 * of_reward(TASK.rewards)[0])


def test_an_outlier_counts_as_a_number_of_the_group() -> None:
    """|A| ≤ (G - 1)/√G, whatever the reward; whitened by the biased variance √(B - 1)."""
    for size in (4, 16):
        scores = jnp.zeros(size).at[0].set(1e4)
        assert jax.jit(normalised)(scores)[0] == pytest.approx((size - 1) / np.sqrt(size), rel=1e-3)
        whitened = jax.jit(masked.whiten)(scores, jnp.ones(size, bool))
        assert whitened[0] == pytest.approx(np.sqrt(size - 1), rel=1e-3)


def test_in_large_groups_the_coefficient_is_that_of_the_policys_own_std() -> None:
    mean = jnp.sum(CHANCE * TASK.rewards, axis=-1, keepdims=True)
    deviation = TASK.rewards - mean
    std = jnp.sqrt(jnp.sum(CHANCE * jnp.square(deviation), axis=-1, keepdims=True))
    wanted = of_reward(TASK.rewards / std)
    errors = []
    for size in (2, 3, 4):
        found = with_rewards(TASK.rewards, normalised, size)
        scale = jnp.vdot(found, wanted) / jnp.vdot(found, found)
        errors.append(length_of(scale * found - wanted) / length_of(wanted))
    assert errors[0] > errors[1] > errors[2]


def whitened_pairs(rewards: Array) -> Array:
    """Batches of two responses to prompts that are drawn too, whitened."""
    flat = CHANCE.ravel() / P
    pairs = jnp.stack(jnp.broadcast_arrays(rewards.ravel()[:, None], rewards.ravel()), axis=-1)
    scores = jax.vmap(lambda pair: masked.whiten(pair, jnp.ones(2, bool)))(pairs.reshape(-1, 2))
    first = scores[:, 0].reshape(P * N, P * N) @ flat
    by_token = jnp.broadcast_to(first.reshape(P, N, 1), MASK.shape)
    return gradient(of_responses(policy.policy_gradient, lambda now: by_token), PARAMS)


def test_a_whitened_batch_of_two_knows_ranks_among_all_prompts() -> None:
    """A prompt far above the others always wins, and learns from its own pairs alone: 1/P."""
    rank = ranks(TASK.rewards.ravel(), TASK.rewards.ravel(), CHANCE.ravel() / P)
    assert_equal(whitened_pairs(TASK.rewards), of_reward(rank.reshape(P, N)), 1e-4)
    easy = TASK.rewards.at[0].add(100.0)
    within = jax.vmap(ranks)(TASK.rewards, TASK.rewards, CHANCE)
    assert_equal(whitened_pairs(easy)[0], of_reward(within)[0] / P, 1e-4)


def ppo(values: Array, gae_lambda: float) -> Estimator:
    def by_token(now: Array) -> Array:
        rewards = penalised(now)
        return advantages.gae(rewards, values, MASK, gamma=1.0, gae_lambda=gae_lambda)[0]

    return of_responses(policy.ppo_clip, by_token)


@jax.jit
def values_of_prefixes(of_response: Array) -> Array:
    """[P, N, T], the mean over what may follow of numbers [P, N, T]."""
    values = []
    for t in range(T):
        rest = (P, V**t, -1)
        weights = CHANCE.reshape(rest)
        mean = (weights * of_response[..., t].reshape(rest)).sum(-1) / weights.sum(-1)
        values.append(jnp.repeat(mean, N // V**t, axis=1))
    return jnp.stack(values, axis=-1)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95])
def test_a_wrong_critic_is_a_reward_for_what_it_overrates(gae_lambda: float) -> None:
    """The bias is the gradient of the reward (1 - λ)·λ^(k-1)·error at the k-th state from here."""
    exact = values_of_prefixes(advantages.discounted_returns(penalised(NOW), MASK, gamma=1.0))
    error = values_of_prefixes(jax.random.normal(jax.random.key(3), exact.shape))
    found = gradient(ppo(exact + error, gae_lambda), PARAMS) - gradient(ppo(exact, 1.0), PARAMS)
    later = jnp.stack(
        [
            sum(
                ((1 - gae_lambda) * gae_lambda ** (k - t - 1) * error[..., k])
                for k in range(t + 1, T)
            )
            + jnp.zeros((P, N))
            for t in range(T)
        ],
        axis=-1,
    )
    assert_equal(found, gradient(of_responses(policy.policy_gradient, lambda _: later), PARAMS))


def test_with_exact_values_every_lambda_is_exact() -> None:
    exact = values_of_prefixes(advantages.discounted_returns(penalised(NOW), MASK, gamma=1.0))
    assert_equal(gradient(ppo(exact, 0.0), PARAMS), gradient(ppo(exact, 1.0), PARAMS))


def test_without_a_critic_lambda_is_a_discount() -> None:
    def discounted(now: Array) -> Array:
        return advantages.discounted_returns(penalised(now), MASK, gamma=0.5)

    found = gradient(ppo(jnp.zeros(MASK.shape), 0.5), PARAMS)
    assert_equal(found, gradient(of_responses(policy.policy_gradient, discounted), PARAMS))


def test_k3_in_the_loss_is_the_forward_and_k2_the_reverse_divergence_of_tokens() -> None:
    forward = of_tokens(lambda own, ref: jnp.sum(jnp.exp(ref) * (ref - own), axis=-1))
    reverse = of_tokens(lambda own, ref: jnp.sum(jnp.exp(own) * (own - ref), axis=-1))
    assert_equal(gradient(in_loss(kl.k3), PARAMS), forward)
    assert_equal(gradient(in_loss(kl.k2), PARAMS), reverse)
    assert length_of(forward - reverse) > 0.1 * length_of(reverse)
    # k1 pulls nowhere; k2 of the response is the divergence of the response, later tokens included.
    assert length_of(gradient(in_loss(kl.k1), PARAMS)) < 1e-6 * length_of(reverse)
    whole = of_reward(-BETA * jax.lax.stop_gradient((NOW - REF_TOKENS).sum(-1)))
    assert_equal(gradient(in_loss(kl.k2, whole=True), PARAMS), whole)


def test_k3_in_the_loss_keeps_a_share_of_every_token_however_bad() -> None:
    """π/π_ref ≥ β/(β + range of r) for each token, where π* has exp(-range/β)."""
    reference = np.asarray(REF_TOKENS.sum(-1))
    rewards, solve = np.asarray(TASK.rewards), jax.jit(fixed_points.token_k3)
    for beta in (0.01, 3.0):
        found = np.asarray(solve(reference, TASK, kl_coef=beta))
        for t in range(T):
            own, ref = (np.exp(x).reshape(P, V**t, V, -1).sum(-1) for x in (found, reference))
            own, ref = (x / x.sum(-1, keepdims=True) for x in (own, ref))
            span = rewards.max(-1) - rewards.min(-1)
            least = beta / (beta + span)
            assert ((own / ref).min((1, 2)) >= 0.999 * least).all()


def test_k3_in_the_reward_is_the_difference_of_both_divergences() -> None:
    """Of the whole response: ∇KL(π ‖ π_ref) - ∇KL(π_ref ‖ π), nothing of first order at π_ref."""

    def pull(estimate: object, params: object) -> Array:
        def by_token(now: Array) -> Array:
            cost = estimate(now.sum(-1), REF_TOKENS.sum(-1))
            return advantages.spread(-cost, MASK)

        return gradient(of_responses(policy.policy_gradient, by_token), params)

    def divergences(params: object) -> Array:
        own, ref = token_log_probs(params).sum(-1), REF_TOKENS.sum(-1)
        reverse = kl.of_distributions(log_probs=own, ref_log_probs=ref)
        return jnp.mean(reverse - kl.of_distributions(log_probs=ref, ref_log_probs=own))

    assert_equal(pull(kl.k3, PARAMS), jax.jit(jax.grad(divergences))(PARAMS)["logits"])
    step = PARAMS["logits"] - REF_PARAMS["logits"]
    near = {"logits": REF_PARAMS["logits"] + 0.01 * step}
    for estimate in (kl.k2, kl.k3):
        assert length_of(pull(estimate, near)) < 0.02 * length_of(pull(kl.k1, near))


def test_k2_of_tokens_overrates_a_beginning_by_the_divergence_of_its_continuation() -> None:
    """For T = 2: log π - log π* = KL(π(·|y₁) ‖ π_ref(·|y₁)) + a constant of the prompt."""
    task = tabular.draw(jax.random.key(0), num_prompts=2, vocab_size=4, length=2)
    reference = jax.nn.log_softmax(2.0 * jax.random.normal(jax.random.key(1), (2, 16)))
    found = jax.jit(fixed_points.token_k2)(reference, task, kl_coef=BETA)
    best = tabular.optimum(reference, task, kl_coef=BETA)
    own, ref = (jax.nn.log_softmax(x.reshape(2, 4, 4)) for x in (found, reference))
    cost = kl.of_distributions(log_probs=own, ref_log_probs=ref)
    excess = (found - best).reshape(2, 4, 4) - cost[..., None]
    np.testing.assert_allclose(excess, excess[:, :1, :1] + jnp.zeros((2, 4, 4)), atol=1e-4)
    assert cost.max() > 0.1


def test_groups_that_are_dropped_take_their_divergence_along() -> None:
    """DAPO, KL and equal groups left out: at y the pull weighs 1 - π(y)^(G-1), distinct rewards."""
    group = jnp.stack(jnp.meshgrid(*[jnp.arange(N)] * 3), axis=-1).reshape(-1, 3)
    scores = TASK.rewards[:, group]
    kept = scores.max(-1) > scores.min(-1)
    weights = CHANCE[:, group].prod(-1) * kept / (3 * P)

    def of_kept(params: object) -> Array:
        estimate = kl.k3(token_log_probs(params), REF_TOKENS).sum(-1)
        return jnp.sum(weights[..., None] * estimate[:, group])

    def of_all(params: object) -> Array:
        estimate = kl.k3(token_log_probs(params), REF_TOKENS).sum(-1)
        return jnp.sum(CHANCE * (1 - CHANCE**2) / P * estimate)

    assert_equal(*(jax.jit(jax.grad(loss))(PARAMS)["logits"] for loss in (of_kept, of_all)))
