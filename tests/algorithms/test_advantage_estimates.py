"""Advantages and losses of the algorithms without a critic, each against a loop in float64."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.algorithms import (
    best_of_n,
    cispo,
    critic_free,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    iteration,
    online_dpo,
    reinforce,
    reinforce_plus_plus,
    rejection_sampling,
    remax,
    rloo,
)
from rlhfjax.types import Rollout

N, G, T = 3, 4, 5
B = N * G
RNG = np.random.default_rng(0)
OLD, REF, NOW = RNG.uniform(-3.0, -0.2, (3, B, T)).astype(np.float32)
# Ratios on both sides of every clip range, but none at its edge.
NOW = (OLD + 0.15 * (NOW - REF)).astype(np.float32)
SCORES = RNG.normal(size=B).astype(np.float32)
# A response that has no score has no tokens; the last group has two of them.
LENGTHS = np.array([5, 3, 1, 4, 2, 5, 0, 3, 4, 0, 2, 0])
MASK = np.arange(T) < LENGTHS[:, None]
SCORED = LENGTHS > 0


def experience(group_size: int = G) -> critic_free.Experience:
    tokens = jnp.tile(jnp.arange(B)[:, None], (1, T + 1))
    real = jnp.concatenate([jnp.ones((B, 1), bool), MASK], axis=1)
    rollout = Rollout(tokens, real, jnp.asarray(MASK), jnp.where(MASK, OLD, 0.0))
    rewards = np.zeros((B, T), np.float32)
    rewards[SCORED, LENGTHS[SCORED] - 1] = SCORES[SCORED]
    ref = jnp.where(MASK, REF, 0.0)
    return critic_free.Experience(rollout, jnp.asarray(rewards), ref, jnp.zeros((B, T)), group_size)


def groups(size: int = G) -> Iterator[list[int]]:
    """The scored rows of each group."""
    for first in range(0, B, size):
        yield [row for row in range(first, first + size) if SCORED[row]]


def tokens(rows: Any = range(B)) -> Iterator[tuple[int, int]]:
    return ((row, t) for row in rows for t in range(LENGTHS[row]))


def returns_to_go(kl_coef: float, gamma: float = 1.0) -> np.ndarray:
    returns = np.zeros((B, T))
    for row in range(B):
        for t in range(LENGTHS[row]):
            for later in range(t, LENGTHS[row]):
                reward = -kl_coef * (float(OLD[row, later]) - float(REF[row, later]))
                if later == LENGTHS[row] - 1:
                    reward += SCORES[row]
                returns[row, t] += gamma ** (later - t) * reward
    return returns


class TestAdvantages:
    def test_of_reinforce_leave_a_response_out_of_its_baseline(self) -> None:
        hyper = reinforce.Hyperparameters(kl_coef=0.3, gamma=0.9)
        returns, expected = returns_to_go(0.3, 0.9), np.zeros((B, T))
        for row, t in tokens():
            others = [returns[other, t] for other in range(B) if other != row and MASK[other, t]]
            expected[row, t] = returns[row, t] - np.mean(others) if others else 0.0
        assert_advantages(reinforce.estimate(experience(), hyper), expected)

    def test_of_a_response_that_alone_reaches_a_token_have_no_baseline(self) -> None:
        batch = experience()
        mask = batch.mask.at[5, -1].set(False)
        alone = replace(batch, rollout=replace(batch.rollout, response_mask=mask))
        advantages = reinforce.estimate(alone, reinforce.Hyperparameters(kl_coef=0.3)).advantages
        (row,) = np.flatnonzero(mask[:, -1])
        np.testing.assert_allclose(advantages[row, -1], returns_to_go(0.3)[row, -1], rtol=1e-5)

    def test_of_reinforce_plus_plus_are_whitened_over_tokens(self) -> None:
        hyper = reinforce_plus_plus.Hyperparameters(kl_coef=0.3)
        returns = returns_to_go(0.3)
        real = returns[MASK]
        expected = np.where(MASK, (returns - real.mean()) / real.std(), 0.0)
        assert_advantages(reinforce_plus_plus.estimate(experience(), hyper), expected)

    def test_of_rloo_leave_a_response_out_of_its_baseline(self) -> None:
        expected = np.zeros(B)
        rewards = returns_to_go(0.3)[:, 0]
        for group in groups():
            for row in group:
                others = [rewards[other] for other in group if other != row]
                expected[row] = rewards[row] - np.mean(others) if others else 0.0
        batch = rloo.estimate(experience(), rloo.Hyperparameters(kl_coef=0.3))
        assert_advantages(batch, expected)

    def test_of_remax_are_returns_less_what_the_greedy_response_gets(self) -> None:
        batch = remax.estimate(experience(2), remax.Hyperparameters(kl_coef=0.3))
        returns = returns_to_go(0.3)
        expected = np.zeros((B // 2, T))
        for row, t in tokens(range(0, B, 2)):
            if SCORED[row + 1]:
                expected[row // 2, t] = returns[row, t] - returns[row + 1, 0]
        mask = MASK[::2] & SCORED[1::2, None]
        np.testing.assert_array_equal(batch.mask, mask)
        np.testing.assert_array_equal(batch.rollout.tokens[:, 0], np.arange(0, B, 2))
        np.testing.assert_allclose(batch.advantages, expected, atol=1e-5)
        assert batch.group_size == 1

    @pytest.mark.parametrize("algorithm", [grpo, gspo, cispo, dapo])
    def test_of_grpo_and_its_kin_are_normalised_in_the_group(self, algorithm: ModuleType) -> None:
        batch = algorithm.estimate(experience(), algorithm.Hyperparameters(std_eps=0.1))
        assert_advantages(batch, normalised(SCORES, 0.1))

    def test_of_dr_grpo_are_centred_in_the_group(self) -> None:
        expected = np.zeros((B, T))
        for group in groups():
            for row in group:
                if len(group) > 1:
                    expected[row, : LENGTHS[row]] = SCORES[row] - SCORES[group].mean()
        assert_advantages(dr_grpo.estimate(experience(), dr_grpo.Hyperparameters()), expected)

    def test_of_dapo_count_length_against_the_score(self) -> None:
        # Nothing up to 5 - 3 tokens, then a third of the factor more for each.
        penalty = np.array([0.0, 0.0, 0.0, 0.5, 1.0, 1.5])[LENGTHS]
        hyper = dapo.Hyperparameters(std_eps=0.1, overlong_buffer=3.0, overlong_factor=1.5)
        batch = dapo.estimate(experience(), hyper)
        assert_advantages(batch, normalised(SCORES - penalty, 0.1))
        # What is reported stays the score.
        np.testing.assert_array_equal(batch.scores, experience().scores)

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 1e-6])
    def test_of_online_dpo_are_probabilities_of_being_the_better(self, temperature: float) -> None:
        hyper = online_dpo.Hyperparameters(score_temperature=temperature)
        batch = online_dpo.estimate(experience(2), hyper)
        for pair in range(B // 2):
            rows = np.array([2 * pair, 2 * pair + 1])
            real = batch.mask[rows]
            if not SCORED[rows].all():
                assert not real.any()
                continue
            better, worse = sorted(rows, key=lambda row: -SCORES[row])
            np.testing.assert_array_equal(real, MASK[[better, worse]])
            np.testing.assert_array_equal(batch.rollout.tokens[rows, 0], [better, worse])
            margin = float(SCORES[better] - SCORES[worse]) / temperature
            wins = 1.0 / (1.0 + np.exp(-margin))
            np.testing.assert_allclose(batch.advantages[rows], [wins, 1 - wins], atol=1e-5)

    def test_at_a_temperature_of_0_the_better_response_wins_for_certain(self) -> None:
        hyper = online_dpo.Hyperparameters(score_temperature=0.0)
        advantages = np.array(online_dpo.estimate(experience(2), hyper).advantages)
        np.testing.assert_array_equal(advantages[[0, 1, 2, 3]], [1, 0, 1, 0])

    @pytest.mark.parametrize("temperature", [1.0, 0.0])
    def test_of_equal_scores_are_even_and_keep_their_order(self, temperature: float) -> None:
        batch = replace(experience(2), rewards=jnp.zeros((B, T)))
        hyper = online_dpo.Hyperparameters(score_temperature=temperature)
        batch = online_dpo.estimate(batch, hyper)
        np.testing.assert_array_equal(batch.rollout.tokens[:, 0], np.arange(B))
        np.testing.assert_array_equal(batch.advantages, np.full(B, 0.5))

    def test_of_rejection_sampling_is_only_which_rows_are_kept(self) -> None:
        batch = rejection_sampling.estimate(experience(), rejection_sampling.Hyperparameters())
        best = [max(group, key=lambda row: SCORES[row]) for group in groups()]
        np.testing.assert_array_equal(batch.rollout.tokens[:, 0], best)
        np.testing.assert_array_equal(batch.scores, SCORES[best])
        assert batch.group_size == 1

    def test_a_score_is_kept_before_none_however_low_and_of_equal_ones_the_first(self) -> None:
        mask = MASK.copy()
        mask[[0, 4]] = False
        batch = experience()
        batch = replace(
            batch,
            rewards=jnp.where(mask.any(1, keepdims=True), -5.0, 0.0) * np.eye(1, T),
            rollout=replace(batch.rollout, response_mask=jnp.asarray(mask)),
        )
        batch = rejection_sampling.estimate(batch, rejection_sampling.Hyperparameters())
        np.testing.assert_array_equal(batch.rollout.tokens[:, 0], [1, 5, 8])


class TestRewardsOfTokens:
    """What each turn of an episode earned, say, in the place of one score."""

    REWARDS = np.where(MASK, RNG.normal(size=(B, T)), 0.0).astype(np.float32)

    def test_are_credited_to_the_tokens_before_them(self) -> None:
        batch = replace(experience(), rewards=jnp.asarray(self.REWARDS))
        hyper = reinforce_plus_plus.Hyperparameters(kl_coef=0.3)
        returns = np.zeros((B, T))
        for row, t in tokens():
            later = slice(t, LENGTHS[row])
            divergence = np.float64(OLD[row, later]) - REF[row, later]
            returns[row, t] = (self.REWARDS[row, later] - 0.3 * divergence).sum()
        real = returns[MASK]
        expected = np.where(MASK, (returns - real.mean()) / real.std(), 0.0)
        assert_advantages(reinforce_plus_plus.estimate(batch, hyper), expected)

    def test_count_as_their_sum_where_responses_are_compared(self) -> None:
        batch = replace(experience(), rewards=jnp.asarray(self.REWARDS))
        batch = grpo.estimate(batch, grpo.Hyperparameters(std_eps=0.1))
        assert_advantages(batch, normalised(self.REWARDS.sum(1), 0.1))

    def test_at_masked_tokens_are_not_read(self) -> None:
        given = jnp.where(MASK, self.REWARDS, jnp.nan).at[3, 0].set(jnp.nan)
        samples, rewards = iteration.leave_out_unscored(experience().rollout, given)
        left = np.arange(B) != 3
        np.testing.assert_array_equal(samples.response_mask, MASK & left[:, None])
        np.testing.assert_array_equal(rewards, np.where(left[:, None], self.REWARDS, 0.0))

    def test_are_summed_before_responses_are_chosen(self) -> None:
        given = jnp.where(MASK, self.REWARDS, jnp.nan)
        samples, sums = experience().rollout, self.REWARDS.sum(1)
        of_tokens, of_responses = (
            dapo.collect(dapo.nothing_of(samples), samples, scores, group_size=G)
            for scores in (given, sums)
        )
        assert of_tokens.num_groups == of_responses.num_groups == B // G
        np.testing.assert_allclose(of_tokens.scores, of_responses.scores, rtol=1e-6)
        with pytest.raises(AssertionError):
            best_of_n.select(samples, given, group_size=G)

    @pytest.mark.parametrize("shape", [(), (B, 1), (B, 2), (B, T + 1), (B // 2,), (T, B)])
    def test_of_another_shape_are_refused(self, shape: tuple[int, ...]) -> None:
        for function in (iteration.leave_out_unscored, iteration.of_responses):
            with pytest.raises(ValueError, match=r"Episodes\.token_rewards") as error:
                function(experience().rollout, np.zeros(shape))
            assert str(list(shape)) in str(error.value)


def assert_advantages(batch: critic_free.Experience, expected: np.ndarray) -> None:
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(batch.mask, MASK)


def normalised(scores: np.ndarray, eps: float) -> np.ndarray:
    advantages = np.zeros((B, T))
    for group in groups():
        for row in group:
            if len(group) > 1:
                deviation = scores[row] - scores[group].mean()
                advantages[row, : LENGTHS[row]] = deviation / (scores[group].std(ddof=1) + eps)
    return advantages


# Advantages of responses and of tokens that no estimate has to do with.
OF_TOKENS = RNG.normal(size=(B, T)).astype(np.float32)
OF_RESPONSES = RNG.normal(size=B).astype(np.float32)
BY_RESPONSE = np.where(MASK, OF_RESPONSES[:, None], 0.0)


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def k2(now: np.ndarray, row: int, t: int) -> float:
    return 0.5 * (now[row, t] - float(REF[row, t])) ** 2


def k3(now: np.ndarray, row: int, t: int) -> float:
    difference = float(REF[row, t]) - now[row, t]
    return np.exp(difference) - 1 - difference


def ratio(now: np.ndarray, row: int, t: int) -> float:
    return np.exp(now[row, t] - float(OLD[row, t]))


def mean_over_tokens(of: Callable[[int, int], float]) -> float:
    return float(np.mean([of(*at) for at in tokens()]))


def mean_over_responses(of: Callable[[int, int], float], divisor: float | None = None) -> float:
    """Of sums over tokens, divided by their number or by something else."""
    rows = [row for row in range(B) if SCORED[row]]
    sums = [sum(of(*at) for at in tokens([row])) / (divisor or LENGTHS[row]) for row in rows]
    return float(np.mean(sums))


def of_reinforce(now: np.ndarray, held: np.ndarray) -> float:
    return mean_over_responses(lambda row, t: -OF_TOKENS[row, t] * now[row, t], 1.0)


def of_reinforce_plus_plus(now: np.ndarray, held: np.ndarray) -> float:
    return mean_over_tokens(lambda row, t: clipped(ratio(now, row, t), OF_TOKENS[row, t], 0.2, 0.2))


def of_rloo(now: np.ndarray, held: np.ndarray) -> float:
    whole = np.where(MASK, now - OLD, 0).sum(1)
    rows = [row for row in range(B) if SCORED[row]]
    each = [clipped(np.exp(whole[row]), OF_RESPONSES[row], 0.2, 0.2) for row in rows]
    return float(np.mean(each))


def of_grpo(now: np.ndarray, held: np.ndarray) -> float:
    return mean_over_responses(
        lambda row, t: (
            clipped(ratio(now, row, t), BY_RESPONSE[row, t], 0.2, 0.2) + 0.3 * k3(now, row, t)
        )
    )


def of_dr_grpo(now: np.ndarray, held: np.ndarray) -> float:
    return mean_over_responses(
        lambda row, t: (
            clipped(ratio(now, row, t), BY_RESPONSE[row, t], 0.2, 0.2) + 0.3 * k2(now, row, t)
        ),
        divisor=T,
    )


def of_dapo(now: np.ndarray, held: np.ndarray) -> float:
    return mean_over_tokens(
        lambda row, t: (
            clipped(ratio(now, row, t), BY_RESPONSE[row, t], 0.1, 0.3) + 0.3 * k3(now, row, t)
        )
    )


def of_gspo(now: np.ndarray, held: np.ndarray) -> float:
    def of(row: int, t: int) -> float:
        mean = np.mean([now[at] - float(OLD[at]) for at in tokens([row])])
        return clipped(np.exp(mean), BY_RESPONSE[row, t], 0.02, 0.05) + 0.3 * k3(now, row, t)

    return mean_over_responses(of)


def of_cispo(now: np.ndarray, held: np.ndarray) -> float:
    def of(row: int, t: int) -> float:
        weight = min(max(ratio(held, row, t), 1 - 0.1), 1 + 0.3)
        return -weight * BY_RESPONSE[row, t] * now[row, t] + 0.3 * k3(now, row, t)

    return mean_over_tokens(of)


def of_rejection_sampling(now: np.ndarray, held: np.ndarray) -> float:
    return mean_over_tokens(lambda row, t: -now[row, t])


class Case(NamedTuple):
    """A loss, its numbers, the advantages it reads, and the loop."""

    algorithm: ModuleType
    numbers: dict[str, float]
    advantages: np.ndarray
    loop: Callable[[np.ndarray, np.ndarray], float]


ASYMMETRIC = {"kl_coef": 0.3, "clip_range": 0.1, "clip_range_high": 0.3}
LOSSES = {
    "reinforce": Case(reinforce, {}, OF_TOKENS, of_reinforce),
    "reinforce_plus_plus": Case(reinforce_plus_plus, {}, OF_TOKENS, of_reinforce_plus_plus),
    "rloo": Case(rloo, {}, OF_RESPONSES, of_rloo),
    "remax": Case(remax, {}, OF_TOKENS, of_reinforce),
    "grpo": Case(grpo, {"kl_coef": 0.3}, BY_RESPONSE, of_grpo),
    "dr_grpo": Case(dr_grpo, {"kl_coef": 0.3}, BY_RESPONSE, of_dr_grpo),
    "dapo": Case(dapo, ASYMMETRIC, BY_RESPONSE, of_dapo),
    "gspo": Case(
        gspo,
        {"kl_coef": 0.3, "clip_range": 0.02, "clip_range_high": 0.05},
        BY_RESPONSE,
        of_gspo,
    ),
    "cispo": Case(cispo, ASYMMETRIC, BY_RESPONSE, of_cispo),
    "rejection_sampling": Case(rejection_sampling, {}, OF_RESPONSES, of_rejection_sampling),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_those_of_the_loop(name: str) -> None:
    algorithm, numbers, advantages, loop = LOSSES[name]
    hyper = algorithm.Hyperparameters(**numbers)
    batch = replace(experience(), advantages=jnp.asarray(advantages, jnp.float32))

    def loss(now: jax.Array) -> Any:
        return algorithm.loss(now, batch, hyper)

    filled = jnp.where(MASK, NOW, 0.0)
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(filled)
    now = NOW.astype(np.float64)
    assert value == pytest.approx(loop(now, now), rel=1e-5)

    slopes = np.zeros((B, T))
    for at in tokens():
        step = np.zeros((B, T))
        step[at] = 1e-6
        slopes[at] = (loop(now + step, now) - loop(now - step, now)) / 2e-6
    np.testing.assert_allclose(grads, slopes, rtol=1e-4, atol=1e-5)

    if "kl" in metrics:
        without = algorithm.loss(filled, batch, replace(hyper, kl_coef=0.0))[0]
        assert metrics["kl"] == pytest.approx(float(value - without) / 0.3, rel=1e-4)
    if "clip_fraction" in metrics:
        assert 0.1 < metrics["clip_fraction"] < 0.9


def test_the_loss_of_online_dpo_is_that_of_dpo_in_both_orders() -> None:
    hyper = online_dpo.Hyperparameters(kl_coef=0.4, score_temperature=0.7)
    batch = online_dpo.estimate(experience(2), hyper)
    rows = np.array(batch.rollout.tokens[:, 0])
    loss, metrics = online_dpo.loss(jnp.where(batch.mask, NOW[rows], 0.0), batch, hyper)

    log_ratios = np.where(MASK, NOW.astype(np.float64) - REF, 0.0).sum(1)
    losses, rewards = [], []
    for one, other in groups_of_two():
        preferred = 1 / (1 + np.exp(-float(SCORES[one] - SCORES[other]) / 0.7))
        margin = 0.4 * (log_ratios[one] - log_ratios[other])
        losses.append(
            preferred * np.log1p(np.exp(-margin)) + (1 - preferred) * np.log1p(np.exp(margin))
        )
        rewards.append(margin if SCORES[one] >= SCORES[other] else -margin)
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(np.mean(rewards), rel=1e-4)


def groups_of_two() -> Iterator[list[int]]:
    return (pair for pair in groups(2) if len(pair) == 2)
