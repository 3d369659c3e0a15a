"""Losses of reward models against loops, probabilities that must add up, and each other."""

from collections.abc import Callable
from functools import cache
from itertools import combinations, permutations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import masked
from rlhfjax.losses import ranking, reductions, reward

RNG = np.random.default_rng(0)
B, K = 4, 5
FIRST, SECOND, LABELS = RNG.normal(size=(3, B, K)).astype(np.float32)
LEVELS = RNG.integers(0, 4, (B, K)).astype(np.int32)
THRESHOLDS = np.array([-1.0, 0.3, 0.9], np.float32)
# Candidates need not come first; the last two rows have no pair.
MASK = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
BEST = np.array([3, 2, 2, 0], np.int32)

Loss = Callable[..., tuple[Any, dict[str, Any]]]
LOSSES: dict[str, tuple[Loss, tuple[np.ndarray, ...]]] = {
    "pairwise": (
        lambda first, second, labels, *mask, **options: reward.pairwise(
            first, second, *mask, margin=labels, preference=labels, l2_coef=0.1, **options
        ),
        (FIRST, SECOND, LABELS),
    ),
    "rating": (reward.rating, (FIRST, LABELS)),
    "comparison": (reward.comparison, (FIRST, SECOND, LABELS)),
    "classifier": (reward.classifier, (FIRST, LABELS)),
    "ordinal": (
        lambda scores, *mask, **options: reward.ordinal(
            scores, LEVELS[: len(scores)], THRESHOLDS, *mask, **options
        ),
        (FIRST,),
    ),
    "plackett-luce": (ranking.plackett_luce, (FIRST,)),
    "best of n": (
        lambda scores, *mask, **options: ranking.best_of_n(
            scores, BEST[: len(scores)], *mask, **options
        ),
        (FIRST,),
    ),
}
BY_ROW = {"plackett-luce", "best of n"}
plackett_luce = jax.jit(ranking.plackett_luce, static_argnames="reduce")
each_loss = pytest.mark.parametrize("name", LOSSES)


def softplus(x: Any) -> np.ndarray:
    return np.logaddexp(0.0, np.asarray(x, np.float64))


def sigmoid(x: Any) -> np.ndarray:
    return np.exp(-softplus(-np.asarray(x, np.float64)))


class TestPairwise:
    MARGIN, PREFERENCE = np.float32([0.2, 0.0, 1.0]), np.float32([1.0, 0.7, 0.0])
    CHOSEN, REJECTED = np.float32([1.0, 0.5, -2.0]), np.float32([0.3, 2.0, 1.0])

    def test_the_cross_entropy_with_the_preference(self) -> None:
        loss, metrics = reward.pairwise(
            self.CHOSEN, self.REJECTED, margin=self.MARGIN, preference=self.PREFERENCE
        )
        d = self.CHOSEN - self.REJECTED - self.MARGIN
        expected = np.mean(self.PREFERENCE * softplus(-d) + (1 - self.PREFERENCE) * softplus(d))
        assert loss == pytest.approx(expected, rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(1 / 3)

    def test_a_preference_of_0_exchanges_the_two(self) -> None:
        reverse, _ = reward.pairwise(self.REJECTED, self.CHOSEN)
        loss, _ = reward.pairwise(self.CHOSEN, self.REJECTED, preference=0.0)
        assert loss == reverse

    def test_smoothed_labels_hold_the_probability_at_1_less_epsilon(self) -> None:
        def slope(difference: float) -> jax.Array:
            return jax.grad(lambda c: reward.pairwise(c, jnp.zeros(1), preference=0.9)[0])(
                jnp.array([difference])
            )[0]

        assert slope(np.log(9.0)) == pytest.approx(0.0, abs=1e-6)
        assert slope(2.0) < 0 < slope(2.4)

    def test_l2_adds_half_the_squares_of_both_scores(self) -> None:
        plain, _ = reward.pairwise(self.CHOSEN, self.REJECTED)
        loss, _ = reward.pairwise(self.CHOSEN, self.REJECTED, l2_coef=0.1)
        squares = (1.0 + 0.25 + 4.0) + (0.09 + 4.0 + 1.0)
        assert loss - plain == pytest.approx(0.1 * squares / 2 / 3, rel=1e-4)

    def test_confident_and_wrong_costs_the_difference(self) -> None:
        (loss, _), grad = jax.value_and_grad(reward.pairwise, has_aux=True)(
            jnp.array([1e4]), jnp.array([-1e4]), preference=0.25
        )
        assert (loss, grad[0]) == (0.75 * 2e4, 0.75)


class TestRating:
    def test_the_mean_square_of_the_errors(self) -> None:
        loss, metrics = reward.rating(np.float32([1.0, -0.5]), np.float32([3.0, -1.0]))
        assert loss == pytest.approx((4.0 + 0.25) / 2) and metrics == {}

    def test_a_comparison_rates_the_second_less_the_first(self) -> None:
        loss, metrics = reward.comparison(
            np.float32([1.0, 2.0]), np.float32([1.5, 0.0]), np.float32([1.0, -2.0])
        )
        assert loss == pytest.approx(0.5**2 / 2) and metrics == {}


class TestClassifier:
    def test_the_cross_entropy_with_the_label(self) -> None:
        scores, labels = np.float32([2.0, -1.0, 0.5]), np.float32([1.0, 0.0, 0.3])
        loss, metrics = reward.classifier(scores, labels)
        expected = np.mean(labels * softplus(-scores) + (1 - labels) * softplus(scores))
        assert loss == pytest.approx(expected, rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(2 / 3)
        hard = [reward.classifier(scores, labels > 0.5)[0], softplus([-2.0, -1.0, 0.5]).mean()]
        assert hard[0] == pytest.approx(hard[1], rel=1e-6)

    def test_the_reward_is_the_log_odds_of_the_wanted_class(self) -> None:
        logits = RNG.normal(0.0, 2.0, (3, 4)).astype(np.float32)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        for wanted in range(4):
            expected = np.log(p[:, wanted] / (1 - p[:, wanted]))
            np.testing.assert_allclose(
                reward.log_odds(logits, wanted=wanted), expected, rtol=1e-4, atol=1e-5
            )

    def test_of_two_classes_it_is_the_difference_of_their_logits(self) -> None:
        logits = jnp.array([[1.0, 3.5], [-3e4, 3e4]])
        np.testing.assert_array_equal(reward.log_odds(logits, wanted=1), [2.5, 6e4])
        np.testing.assert_array_equal(reward.log_odds(logits, wanted=0), [-2.5, -6e4])

    def test_the_wanted_class_is_traced(self) -> None:
        logits = np.float32([1.0, 3.5])
        odds = jax.jit(jax.vmap(lambda wanted: reward.log_odds(logits, wanted=wanted)))
        np.testing.assert_allclose(odds(jnp.arange(2)), [-2.5, 2.5])

    def test_one_class_has_no_odds(self) -> None:
        with pytest.raises(AssertionError):
            reward.log_odds(jnp.zeros((3, 1)), wanted=0)


class TestOrdinal:
    @staticmethod
    def each(scores: Any, levels: Any, thresholds: Any = THRESHOLDS) -> jax.Array:
        """-log P of every response."""
        return reward.ordinal(np.float32(scores), np.int32(levels), thresholds, reduce=masked.fill)[
            0
        ]

    def test_probabilities_are_steps_of_the_cumulative_ones(self) -> None:
        scores = np.linspace(-3.0, 3.0, 7)
        below = sigmoid(THRESHOLDS[:, None] - scores)
        steps = np.diff(np.vstack([np.zeros(7), below, np.ones(7)]), axis=0)
        for level, expected in enumerate(steps):
            given = np.exp(-self.each(scores, np.full(7, level)))
            np.testing.assert_allclose(given, expected, rtol=1e-5)

    def test_two_levels_are_a_classifier(self) -> None:
        scores, labels = np.float32([0.4, -2.0]), np.array([0, 1])
        loss, metrics = reward.ordinal(scores, labels, np.float32([0.0]))
        assert loss == pytest.approx(np.mean(softplus([0.4, 2.0])), rel=1e-6)
        assert metrics["accuracy"] == 0

    def test_a_response_is_right_between_the_thresholds_of_its_level(self) -> None:
        scores, levels = np.float32([-2.0, 0.0, 0.3, 0.5, 5.0]), np.array([0, 1, 1, 3, 3])
        _, metrics = reward.ordinal(scores, levels, THRESHOLDS)
        assert metrics["accuracy"] == pytest.approx(4 / 5)

    def test_scores_far_away_cost_their_distance(self) -> None:
        step = -np.log(1 - np.exp(-0.6))
        given = self.each([-1e4, 1e4, 1e4, 0.0], [3, 0, 2, 0])
        expected = [1e4 + 0.9, 1e4 + 1.0, 1e4 - 0.9 + step, softplus(1.0)]
        np.testing.assert_allclose(given, expected, rtol=1e-6)

    def test_gradients_are_finite_differences(self) -> None:
        scores, levels = FIRST[0], np.array([0, 1, 2, 3, 1])

        def loss_of(scores: Any, thresholds: Any) -> jax.Array:
            return reward.ordinal(scores, levels, thresholds)[0]

        def in_numpy(scores: np.ndarray, thresholds: np.ndarray) -> float:
            ends = np.concatenate([[-np.inf], thresholds, [np.inf]])
            p = 1 / (1 + np.exp(-(ends[levels + 1] - scores)))
            return float(-np.mean(np.log(p - 1 / (1 + np.exp(-(ends[levels] - scores))))))

        arrays = [scores.astype(np.float64), THRESHOLDS.astype(np.float64)]
        grads = jax.grad(loss_of, (0, 1))(scores, THRESHOLDS)
        for which, grad in enumerate(grads):
            for place in range(len(grad)):
                shifted = [[x.copy() for x in arrays] for _ in range(2)]
                shifted[0][which][place] += 1e-5
                shifted[1][which][place] -= 1e-5
                slope = (in_numpy(*shifted[0]) - in_numpy(*shifted[1])) / 2e-5
                assert grad[place] == pytest.approx(slope, rel=1e-3, abs=1e-5)

    @pytest.mark.parametrize("thresholds", [[0.0, 0.0], [1.0, -1.0]])
    def test_a_level_without_room_is_impossible(self, thresholds: list[float]) -> None:
        def loss_of(scores: jax.Array, thresholds: jax.Array) -> jax.Array:
            return reward.ordinal(scores, jnp.array([1]), thresholds)[0]

        loss, grads = jax.value_and_grad(loss_of, (0, 1))(jnp.zeros(1), jnp.array(thresholds))
        assert loss == np.inf
        assert all(np.isfinite(grad).all() for grad in grads)
        assert np.isfinite(self.each([0.3], [0], np.float32(thresholds))).all()

    def test_a_masked_level_may_be_anything(self) -> None:
        for garbage in (-1, 99, np.iinfo(np.int32).min):
            levels = np.where(MASK, LEVELS, np.int32(garbage))
            given = reward.ordinal(FIRST, levels, THRESHOLDS, MASK)
            expected = reward.ordinal(FIRST, LEVELS, THRESHOLDS, MASK)
            jax.tree.map(np.testing.assert_array_equal, given, expected)

    def test_without_thresholds_there_are_no_levels(self) -> None:
        with pytest.raises(AssertionError):
            self.each([0.3], [0], np.zeros(0, np.float32))


class TestPlackettLuce:
    def test_the_best_is_chosen_of_all_then_of_the_rest(self) -> None:
        weights = np.exp(FIRST[0].astype(np.float64))
        expected = -sum(np.log(weights[k] / weights[k:].sum()) for k in range(K))
        loss, _ = plackett_luce(FIRST[0])
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_the_probabilities_of_all_rankings_add_up_to_1(self) -> None:
        orders = np.array(list(permutations(range(4))))
        losses, _ = plackett_luce(FIRST[0][orders], reduce=masked.fill)
        assert np.exp(-losses).sum() == pytest.approx(1.0, rel=1e-5)

    def test_only_real_candidates_take_part(self) -> None:
        alone, _ = plackett_luce(FIRST[1][[0, 2, 3]])
        among, _ = plackett_luce(FIRST[1], MASK[1])
        assert among == pytest.approx(float(alone), rel=1e-6)

    def test_of_two_it_is_bradley_terry(self) -> None:
        losses, metrics = plackett_luce(FIRST[:, :2], reduce=masked.fill)
        np.testing.assert_allclose(losses, softplus(FIRST[:, 1] - FIRST[:, 0]), rtol=1e-5)
        assert metrics["accuracy"] == np.mean(FIRST[:, 0] > FIRST[:, 1])

    def test_candidates_far_behind_still_count(self) -> None:
        (loss, _), grad = jax.jit(jax.value_and_grad(ranking.plackett_luce, has_aux=True))(
            jnp.array([900.0, -300.0, -200.0])
        )
        assert loss == 100.0
        np.testing.assert_array_equal(grad, [0.0, -1.0, 1.0])


class TestBestOfN:
    def test_the_cross_entropy_of_the_choice(self) -> None:
        weights = np.exp(FIRST.astype(np.float64))
        expected = -np.log(weights[np.arange(B), BEST] / weights.sum(-1))
        losses, metrics = ranking.best_of_n(FIRST, BEST, reduce=masked.fill)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        assert metrics["accuracy"] == np.mean(FIRST.argmax(-1) == BEST)

    def test_only_real_candidates_take_part(self) -> None:
        alone, _ = ranking.best_of_n(FIRST[1][[0, 2, 3]], jnp.int32(1))
        among, _ = ranking.best_of_n(FIRST[1], jnp.int32(2), MASK[1])
        assert among == pytest.approx(float(alone), rel=1e-6)

    def test_a_choice_of_no_real_candidate_counts_nowhere(self) -> None:
        mask = jnp.array([[True, True, False], [True, True, False]])
        loss, metrics = ranking.best_of_n(jnp.zeros((2, 3)), jnp.array([2, 0]), mask)
        assert loss == pytest.approx(np.log(2.0)) and metrics["accuracy"] == 1


class TestPairs:
    def test_every_pair_of_a_ranking_the_better_one_first(self) -> None:
        better, worse, mask = ranking.ranked_pairs(jnp.array([[7, 3, 9], [1, 2, 0]]))
        np.testing.assert_array_equal(better, [[7, 7, 3], [1, 1, 2]])
        np.testing.assert_array_equal(worse, [[3, 9, 9], [2, 0, 0]])
        assert mask.shape == (2, 3) and mask.all()

    def test_pairs_are_real_when_both_are(self) -> None:
        _, _, mask = ranking.ranked_pairs(jnp.arange(3), jnp.array([True, False, True]))
        np.testing.assert_array_equal(mask, [False, True, False])

    def test_one_candidate_has_no_pairs(self) -> None:
        assert [x.shape for x in ranking.ranked_pairs(jnp.zeros((2, 1)))] == [(2, 0)] * 3

    def test_pairs_by_index(self) -> None:
        first, second = ranking.indexed_pairs(
            jnp.array([[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]]),
            jnp.array([[0, 2], [1, 1]]),
            jnp.array([[1, 0], [0, 2]]),
        )
        np.testing.assert_array_equal(first, [[0.5, 2.5], [4.5, 4.5]])
        np.testing.assert_array_equal(second, [[1.5, 0.5], [3.5, 5.5]])

    @staticmethod
    def by_loop() -> list[list[float]]:
        """Of every ranking the losses of its pairs, with β = 0.1."""
        found = []
        for scores, mask in zip(FIRST.astype(np.float64), MASK, strict=True):
            pairs = combinations(scores[mask], 2)
            found.append([softplus(w - b) + 0.05 * (b**2 + w**2) for b, w in pairs])
        return found

    def test_all_pairs_averaged_together(self) -> None:
        loss, _ = reward.pairwise(*ranking.ranked_pairs(FIRST, MASK), l2_coef=0.1)
        assert loss == pytest.approx(np.mean(np.concatenate(self.by_loop())), rel=1e-5)

    def test_averaged_by_prompt_and_then_over_prompts(self) -> None:
        loss, _ = reward.pairwise(
            *ranking.ranked_pairs(FIRST, MASK), l2_coef=0.1, reduce=reductions.sequence_mean
        )
        expected = np.mean([np.mean(losses) for losses in self.by_loop() if losses])
        assert loss == pytest.approx(expected, rel=1e-5)

    def test_a_ranking_of_ids_gives_the_same_pairs_as_scores_in_its_order(self) -> None:
        order = np.array([[2, 0, 1, 4, 3]] * B)
        better, worse, mask = ranking.ranked_pairs(order)
        by_index = reward.pairwise(*ranking.indexed_pairs(FIRST, better, worse), mask)
        in_order = reward.pairwise(*ranking.ranked_pairs(FIRST[:, order[0]]))
        jax.tree.map(np.testing.assert_array_equal, by_index, in_order)


@cache
def differentiated(name: str) -> tuple[Callable[..., Any], tuple[np.ndarray, ...]]:
    loss, arrays = LOSSES[name]
    return jax.jit(jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)), arrays


@each_loss
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_entries_are_ignored_to_the_last_bit(name: str, garbage: float) -> None:
    loss, arrays = differentiated(name)
    clean = loss(*(np.where(MASK, x, 0) for x in arrays), MASK)
    given = loss(*(np.where(MASK, x, np.float32(garbage)) for x in arrays), MASK)
    jax.tree.map(np.testing.assert_array_equal, given, clean)
    for grad in given[1]:
        assert np.isfinite(grad).all() and (np.asarray(grad)[~MASK] == 0).all()
    assert np.asarray(given[1][0]).any()


@each_loss
def test_with_nothing_real_loss_metrics_and_gradient_are_0(name: str) -> None:
    loss, arrays = differentiated(name)
    for array in jax.tree.leaves(loss(*arrays, np.zeros_like(MASK))):
        assert (np.asarray(array) == 0).all()


@each_loss
def test_no_mask_is_a_mask_of_ones(name: str) -> None:
    loss, arrays = LOSSES[name]
    jax.tree.map(np.testing.assert_array_equal, loss(*arrays), loss(*arrays, np.ones_like(MASK)))


@each_loss
def test_the_reduction_sees_the_losses_and_their_mask(name: str) -> None:
    loss, arrays = LOSSES[name]
    each, _ = loss(*arrays, MASK, reduce=masked.fill)
    counted = MASK.sum(-1) > 1 if name in BY_ROW else MASK
    assert each.shape == counted.shape and (each[~counted] == 0).all()
    mean, _ = jax.jit(loss)(*arrays, MASK)
    assert mean == pytest.approx(np.asarray(each)[counted].mean(), rel=1e-5)


@each_loss
def test_scores_get_a_gradient_and_labels_none(name: str) -> None:
    loss, arrays = differentiated(name)
    num_scores = 2 if name in {"pairwise", "comparison"} else 1
    _, grads = loss(*arrays, MASK)
    for place, grad in enumerate(grads):
        assert np.asarray(grad).any() == (place < num_scores)


@each_loss
def test_results_are_float32(name: str) -> None:
    loss, arrays = LOSSES[name]
    for array in jax.tree.leaves(loss(*(jnp.asarray(x, jnp.bfloat16) for x in arrays), MASK)):
        assert array.shape == () and array.dtype == jnp.float32


@each_loss
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    loss, arrays = LOSSES[name]
    with pytest.raises(AssertionError):
        loss(*arrays, MASK[:, :-1])
    with pytest.raises(AssertionError):
        loss(*arrays, MASK.astype(np.float32))


@pytest.mark.parametrize("wrong", [BEST[:-1], BEST.astype(np.float32)])
def test_a_choice_that_does_not_fit_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        ranking.best_of_n(FIRST, wrong)
