"""Ensembles, what their members disagree on, which pairs to ask about, and how far to trust."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rlhfjax.feedback import choice
from rlhfjax.models import linear_head

NAN, INF = math.nan, math.inf


def logit(p: float) -> float:
    return math.log(p / (1 - p))


class TestInformation:
    def test_bald_by_hand(self) -> None:
        # Members say 0.9 and 0.1: H[0.5] = log 2, each alone has H(0.9).
        entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
        # Members say 0.5 and 0.5: as uncertain, and nobody disagrees.
        d = jnp.array([[logit(0.9), 0.0], [logit(0.1), 0.0]])
        expected = [math.log(2) - entropy, 0.0]
        np.testing.assert_allclose(choice.mutual_information(d), expected, atol=1e-6)

    def test_disagreement_by_hand(self) -> None:
        d = jnp.array([[logit(0.9), 0.0], [logit(0.1), 0.0]])
        np.testing.assert_allclose(choice.disagreement(d), [0.4, 0.0], atol=1e-6)

    def test_the_order_within_a_pair_does_not_matter(self) -> None:
        d = jax.random.normal(jax.random.key(0), (5, 7)) * 4
        for measure in (choice.mutual_information, choice.disagreement):
            np.testing.assert_allclose(measure(d), measure(-d), atol=1e-6)

    def test_certain_members_give_finite_numbers(self) -> None:
        d = jnp.array([[300.0, 300.0, INF], [-300.0, 300.0, -INF]])
        expected = [math.log(2), 0.0, math.log(2)]
        np.testing.assert_allclose(choice.mutual_information(d), expected, atol=1e-6)

    @pytest.mark.parametrize("measure", [choice.mutual_information, choice.disagreement])
    @pytest.mark.parametrize("size", [0.0, 1.0, 90.0, 200.0, INF])
    def test_gradients_are_numbers(self, measure, size: float) -> None:
        # Members that agree, contradict each other, and of which one is undecided.
        d = size * jnp.array([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]) if size else jnp.zeros((3, 2))
        d = jnp.concatenate([d, d.at[0].set(0.0)], axis=1)
        slope = jax.grad(lambda x: measure(x).sum())(d)
        assert np.isfinite(measure(d)).all() and np.isfinite(slope).all()
        np.testing.assert_allclose(slope[:, 0], 0.0, atol=1e-6)

    @pytest.mark.parametrize("measure", [choice.mutual_information, choice.disagreement])
    def test_gradients_are_those_of_finite_differences(self, measure) -> None:
        check_grads(
            measure, (jax.random.normal(jax.random.key(0), (5, 3)),), 1, atol=1e-2, rtol=1e-2
        )

    def test_a_scalar_is_no_ensemble(self) -> None:
        with pytest.raises(AssertionError):
            choice.mutual_information(jnp.float32(1.0))


class TestMost:
    def test_greatest_first_and_ties_in_order(self) -> None:
        places, real = choice.most(jnp.array([1.0, 3.0, 2.0, 3.0, 2.0]), num=4)
        assert places.tolist() == [1, 3, 2, 4] and real.all()

    def test_masked_pairs_come_last_and_are_told(self) -> None:
        values = jnp.array([9.0, -INF, 2.0, NAN, 1.0])
        mask = jnp.array([False, True, True, True, False])
        places, real = choice.most(values, mask, num=5)
        assert places.tolist() == [2, 1, 3, 0, 4]
        assert real.tolist() == [True, True, True, False, False]

    @pytest.mark.parametrize("choose", [choice.most, choice.spread])
    def test_more_than_there_are_is_refused(self, choose) -> None:
        with pytest.raises(ValueError, match="4 pairs cannot be chosen from 3"):
            choose(jnp.zeros((2, 3))[0] if choose is choice.most else jnp.zeros((2, 3)), num=4)

    @pytest.mark.parametrize("choose", [choice.most, choice.spread])
    def test_fewer_than_none_is_refused(self, choose) -> None:
        with pytest.raises(ValueError, match="-1 pairs cannot be chosen"):
            choose(jnp.zeros(3) if choose is choice.most else jnp.zeros((2, 3)), num=-1)


class TestSpread:
    def test_equals_the_greedy_choice_by_conditional_covariance(self) -> None:
        d = np.random.default_rng(0).normal(size=(6, 9))
        covariance, expected = np.cov(d.T, ddof=0), []
        for _ in range(5):
            left = [i for i in range(9) if i not in expected]
            best = max(left, key=lambda i: covariance[i, i])
            expected.append(best)
            column = covariance[:, best]
            covariance = covariance - np.outer(column, column) / (column[best] + 2.0)
        places, real = choice.spread(jnp.float32(d), num=5, noise=2.0)
        assert places.tolist() == expected and real.all()

    def test_does_not_ask_the_same_twice(self) -> None:
        # Pairs 0 and 1 are one question; 2 is another of which less is unknown.
        d = jnp.array([[2.0, 2.0, 1.0], [-2.0, -2.0, 1.0], [2.0, 2.0, -1.0], [-2.0, -2.0, -1.0]])
        assert choice.spread(d, num=2, noise=0.1)[0].tolist() == [0, 2]
        assert choice.most(choice.disagreement(d), num=2)[0].tolist() == [0, 1]

    def test_what_may_not_be_chosen_comes_last_and_changes_nothing(self) -> None:
        d = jnp.array([[NAN, 1.0, 5.0, 2.0], [0.0, -1.0, -5.0, -2.0]])
        mask = jnp.array([True, True, False, True])
        places, real = choice.spread(d, mask, num=4)
        assert places.tolist() == [3, 1, 0, 2]
        assert real.tolist() == [True, True, False, False]

    def test_members_that_agree_choose_in_order(self) -> None:
        assert choice.spread(jnp.ones((3, 4)), num=3)[0].tolist() == [0, 1, 2]


class TestTrust:
    def test_lower_bound_by_hand(self) -> None:
        scores = jnp.array([[1.0, 2.0], [3.0, 2.0]])
        assert choice.lower_bound(scores, coef=0.5).tolist() == [1.5, 2.0]
        assert choice.lower_bound(scores, coef=0.0).tolist() == [2.0, 2.0]

    def test_members_that_agree_have_a_finite_gradient(self) -> None:
        gradient = jax.grad(lambda x: choice.lower_bound(x).sum())(jnp.ones((4, 2)))
        np.testing.assert_array_equal(gradient, np.full((4, 2), 0.25))


class TestMembers:
    def test_are_independent_and_their_backbone_is_computed_once(self) -> None:
        head = linear_head(3, stddev=1.0)
        heads = choice.members(head.init, jax.random.key(0), num_members=4)
        assert heads["kernel"].shape == (4, 3)
        assert len(np.unique(np.asarray(heads["kernel"])[:, 0])) == 4
        calls = []

        def score(params, x):
            calls.append(x.shape)
            return head.apply(params["head"], x @ params["backbone"])

        backbone, x = jnp.eye(3), jnp.arange(6.0).reshape(2, 3)
        params = {"backbone": backbone, "head": heads}
        told = choice.each(score, params, x)
        expected = np.asarray(heads["kernel"]) @ np.asarray(x).T
        np.testing.assert_allclose(told, expected, rtol=1e-6)
        text = str(jax.make_jaxpr(partial(choice.each, score))(params, x))
        # The product with the backbone has no axis of members.
        assert "f32[2,3] = dot_general" in text and len(calls) == 2

    def test_anchored_by_hand(self) -> None:
        params, anchors = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([0.0, 4.0])}
        assert choice.anchored(params, anchors, precision=3.0) == 0.5 * 3.0 * (1.0 + 4.0)
        with pytest.raises(AssertionError):
            choice.anchored(params, {"a": jnp.zeros(())}, precision=3.0)

    def test_anchored_members_are_draws_from_the_posterior(self) -> None:
        # One observation y = 2 of θ ~ N(0, 1) with noise variance 1: θ | y ~ N(1, ½). The minimum
        # of ½(θ - yₖ)² + ½(θ - θ₀)², of an answer yₖ with that noise, is (yₖ + θ₀)/2.
        noise, prior = jax.random.normal(jax.random.key(0), (2, 20_000))

        def loss(theta, answer, anchor):
            return 0.5 * (theta - answer) ** 2 + choice.anchored(theta, anchor, precision=1.0)

        gradient = jax.vmap(jax.grad(loss))
        begin = jnp.zeros(20_000)
        answers = 2.0 + noise
        # A quadratic: one step of Newton from 0 is its minimum.
        curvature = gradient(begin + 1, answers, prior) - gradient(begin, answers, prior)
        members = -gradient(begin, answers, prior) / curvature
        assert abs(members.mean() - 1.0) < 0.02 and abs(members.var() - 0.5) < 0.02
