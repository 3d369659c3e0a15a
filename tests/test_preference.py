"""Losses of preferences against loops over pairs, and their gradients against differences of those.

The loops are in float64 and written from the equations of the papers, pair by pair.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import (
    BETA,
    CHOSEN,
    LOSSES,
    MASK,
    OF_A_WHOLE_BATCH,
    PAIRS,
    REF_CHOSEN,
    REF_REJECTED,
    REJECTED,
    WEIGHTS,
    B,
    cross_entropy,
    each_loss,
    each_separable_loss,
    gradient_by_differences,
)

from rlhfjax import masked
from rlhfjax.losses import preference


@each_loss
def test_losses_and_gradients_are_those_of_the_loop(name: str) -> None:
    case = LOSSES[name]
    arrays = tuple(x[0] for x in case.arrays)

    def total(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, _ = case.loss(*arrays, reduce=masked.fill)
        return losses.sum(), losses

    grads, losses = jax.grad(total, tuple(range(len(arrays))), has_aux=True)(*arrays)
    np.testing.assert_allclose(losses, case.by_loop(*np.float64(arrays)), rtol=2e-5)
    trained, frozen = grads[: case.num_trained], grads[case.num_trained :]
    for grad, expected in zip(trained, gradient_by_differences(case, arrays), strict=True):
        np.testing.assert_allclose(grad, expected, rtol=2e-4, atol=1e-6)
    for grad in frozen:
        assert (np.asarray(grad) == 0).all()


@each_loss
def test_only_real_pairs_count_and_as_much_as_they_weigh(name: str) -> None:
    case, mask, weights = LOSSES[name], MASK[0], WEIGHTS[0]
    arrays = tuple(x[0] for x in case.arrays)
    if name in OF_A_WHOLE_BATCH:
        losses = case.by_loop(*(np.float64(x[mask]) for x in arrays))
    else:
        losses = np.array(case.by_loop(*np.float64(arrays)))[mask]
    plain, _ = jax.jit(case.loss)(*arrays, mask)
    np.testing.assert_allclose(plain, np.mean(losses), rtol=2e-5)
    weighted, _ = case.loss(*arrays, mask, weights=weights)
    np.testing.assert_allclose(weighted, np.mean(weights[mask] * losses), rtol=2e-5)
    assert jax.grad(lambda w: case.loss(*arrays, mask, weights=w)[0])(2.0) == 0


@each_loss
def test_masked_pairs_are_ignored_to_the_last_bit(name: str) -> None:
    case = LOSSES[name]

    def differentiated(garbage: list[float]) -> Any:
        *arrays, weights = (x.copy() for x in (*case.arrays, WEIGHTS))
        for shift, array in enumerate((*arrays, weights)):
            array[~MASK] = np.roll(garbage, shift)
        loss = functools.partial(case.loss, weights=weights)
        return jax.value_and_grad(loss, tuple(range(len(arrays))), has_aux=True)(*arrays, MASK)

    clean, given = differentiated([0.0] * 4), differentiated([np.nan, np.inf, -np.inf, 1e30])
    jax.tree.map(np.testing.assert_array_equal, given, clean)
    for grad in given[1]:
        assert np.isfinite(grad).all() and (np.asarray(grad)[~MASK] == 0).all()


@each_loss
def test_without_a_pair_loss_metrics_and_gradient_are_0(name: str) -> None:
    case = LOSSES[name]
    differentiated = jax.value_and_grad(case.loss, tuple(range(len(case.arrays))), has_aux=True)
    (loss, metrics), grads = differentiated(*case.arrays, np.zeros_like(MASK))
    for array in jax.tree.leaves((loss, metrics, grads)):
        assert (np.asarray(array) == 0).all()


@each_loss
def test_margins_of_2000_stay_finite(name: str) -> None:
    case = LOSSES[name]
    certain, hopeless, nothing = np.zeros(B), np.full(B, -2000.0 / BETA), np.zeros(B)
    for pair in (certain, hopeless), (hopeless, certain):
        arrays = tuple(jnp.asarray(x) for x in (*pair, nothing, nothing))[: len(case.arrays)]
        differentiated = jax.value_and_grad(case.loss, tuple(range(len(arrays))), has_aux=True)
        (loss, _), grads = differentiated(*arrays)
        assert np.isfinite([loss, *jnp.concatenate(grads)]).all()


@each_separable_loss
def test_vmapped_is_batched(name: str) -> None:
    case = LOSSES[name]
    mapped, _ = jax.vmap(case.loss)(*case.arrays, MASK)
    batched, _ = case.loss(*case.arrays, MASK)
    counts = MASK.sum(-1)
    np.testing.assert_allclose((mapped * counts).sum() / counts.sum(), batched, rtol=1e-5)


@pytest.mark.parametrize("loss", [preference.aot, preference.aot_unpaired])
def test_ranks_are_those_of_a_group(loss: Callable[..., Any]) -> None:
    loss = functools.partial(loss, beta=BETA, reduce=masked.fill)
    np.testing.assert_array_equal(loss(*PAIRS, MASK)[0], jax.vmap(loss)(*PAIRS, MASK)[0])


@each_loss
def test_results_are_float32(name: str) -> None:
    case = LOSSES[name]
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in case.arrays]
    given = case.loss(*rounded, MASK)
    for array in jax.tree.leaves(given):
        assert array.shape == () and array.dtype == jnp.float32
    expected = case.loss(*(x.astype(jnp.float32) for x in rounded), MASK)
    jax.tree.map(np.testing.assert_array_equal, given, expected)


@each_loss
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    case = LOSSES[name]
    for mask in (MASK[:, :-1], MASK.astype(np.float32)):
        with pytest.raises(AssertionError):
            case.loss(*case.arrays, mask)
    with pytest.raises(AssertionError):
        case.loss(case.arrays[0], case.arrays[1][:, :-1], *case.arrays[2:])


class TestMetrics:
    def test_of_pairs_by_hand(self) -> None:
        mask = jnp.array([True, True, False, True])
        chosen, rejected = jnp.array([1.0, 2.0, 9.0, -3.0]), jnp.array([0.0, 4.0, 0.0, -3.0])
        _, metrics = preference.dpo(
            chosen, rejected, jnp.array([0.0, 1.0, 0.0, 0.0]), jnp.zeros(4), mask, beta=0.5
        )
        expected = {"chosen": -1 / 6, "rejected": 1 / 6, "accuracies": 1 / 3, "margins": -1 / 3}
        assert metrics == {
            f"rewards/{name}": pytest.approx(value) for name, value in expected.items()
        }

    @each_loss
    def test_they_have_no_gradient(self, name: str) -> None:
        case = LOSSES[name]
        for grad in jax.grad(lambda *arrays: sum(case.loss(*arrays)[1].values()), (0, 1))(
            *case.arrays
        ):
            assert (np.asarray(grad) == 0).all()


class TestDpo:
    def test_at_the_reference(self) -> None:
        """Loss log 2, gradient ∓β/2; the common part of both log-probabilities is no matter."""
        refs = (REF_CHOSEN[0], REF_REJECTED[0])

        def loss_of(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
            return preference.dpo(chosen, rejected, *refs, beta=0.3, reduce=masked.sum)[0]

        loss, (chosen, rejected) = jax.value_and_grad(loss_of, (0, 1))(*refs)
        assert loss == pytest.approx(B * np.log(2.0))
        np.testing.assert_allclose(chosen, np.full(B, -0.15), rtol=1e-6)
        np.testing.assert_allclose(rejected, np.full(B, 0.15), rtol=1e-6)
        shifted = loss_of(refs[0] + 2.0, refs[1] + 2.0)
        assert shifted == pytest.approx(B * np.log(2.0), rel=1e-5)

    def test_without_smoothing_cdpo_and_robust_are_dpo(self) -> None:
        plain, _ = preference.dpo(*PAIRS, beta=BETA, reduce=masked.fill)
        for loss in (preference.cdpo, preference.robust):
            given, _ = loss(*PAIRS, beta=BETA, label_smoothing=0.0, reduce=masked.fill)
            np.testing.assert_allclose(given, plain, rtol=1e-6)

    def test_cdpo_with_half_of_the_labels_wrong_does_not_tell_the_responses_apart(self) -> None:
        loss = functools.partial(preference.cdpo, beta=BETA, label_smoothing=0.5)
        swapped = (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
        np.testing.assert_allclose(loss(*PAIRS)[0], loss(*swapped)[0], rtol=1e-6)

    @pytest.mark.parametrize("loss", [preference.cdpo, preference.exo])
    def test_the_minimum_is_where_the_policy_is_as_sure_as_the_labels(
        self, loss: Callable[..., Any]
    ) -> None:
        best = np.float32(np.log(0.8 / 0.2))

        def loss_of(margin: jax.Array) -> jax.Array:
            return loss(margin, 0 * margin, 0 * margin, 0 * margin, beta=1.0, label_smoothing=0.2)[
                0
            ]

        assert jax.grad(loss_of)(best) == pytest.approx(0.0, abs=1e-6)
        assert jax.grad(loss_of)(best - 0.1) < 0 < jax.grad(loss_of)(best + 0.1)

    def test_exo_is_0_at_its_minimum(self) -> None:
        margin = jnp.log(jnp.array([4.0]))
        loss, _ = preference.exo(
            margin, 0 * margin, 0 * margin, 0 * margin, beta=1.0, label_smoothing=0.2
        )
        assert loss == pytest.approx(0.0, abs=1e-6)

    @pytest.mark.parametrize("flipped", [0.1, 0.4])
    def test_robust_is_unbiased_under_flipped_labels(self, flipped: float) -> None:
        swapped = (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
        right, wrong = (
            preference.robust(*pairs, beta=BETA, label_smoothing=flipped, reduce=masked.fill)[0]
            for pairs in (PAIRS, swapped)
        )
        true, _ = preference.dpo(*PAIRS, beta=BETA, reduce=masked.fill)
        np.testing.assert_allclose((1 - flipped) * right + flipped * wrong, true, rtol=1e-4)

    def test_both_responses_pull_equally(self) -> None:
        for loss in (preference.dpo, preference.hinge, preference.ipo, preference.discopop):
            chosen, rejected = jax.grad(
                lambda *pairs, loss=loss: loss(*pairs, beta=BETA)[0], (0, 1)
            )(*PAIRS)
            np.testing.assert_allclose(chosen, -rejected, rtol=1e-6)

    def test_beta_is_traced(self) -> None:
        betas = jnp.array([0.1, 2.0])
        given = jax.jit(jax.vmap(lambda beta: preference.dpo(*PAIRS, beta=beta)[0]))(betas)
        log_ratios = np.float64(CHOSEN) - REF_CHOSEN - REJECTED + REF_REJECTED
        expected = [np.mean(cross_entropy(beta * log_ratios)) for beta in (0.1, 2.0)]
        np.testing.assert_allclose(given, expected, rtol=1e-5)


class TestIpo:
    def test_the_minimum_is_at_a_difference_of_1_over_2_beta(self) -> None:
        refs = (REF_CHOSEN, REF_REJECTED)
        loss_of = jax.value_and_grad(lambda c: preference.ipo(c, REF_REJECTED, *refs, beta=0.1)[0])
        loss, grad = loss_of(REF_CHOSEN + 5.0)
        assert loss == pytest.approx(0.0, abs=1e-8)
        np.testing.assert_allclose(grad, 0.0, atol=1e-5)

    def test_at_the_reference(self) -> None:
        refs = (REF_CHOSEN, REF_REJECTED)
        assert preference.ipo(*refs, *refs, beta=0.1)[0] == pytest.approx(25.0)


class TestFDivergences:
    LOG_RATIOS = np.array([-3.0, -0.1, 0.0, 0.2, 4.0], np.float32)

    def test_the_reverse_divergence_is_dpo(self) -> None:
        reverse = functools.partial(preference.alpha_derivative, alpha=1.0)
        given = preference.f_dpo(*PAIRS, beta=BETA, derivative=reverse)
        jax.tree.map(np.testing.assert_array_equal, given, preference.dpo(*PAIRS, beta=BETA))

    def test_alpha_near_1_is_near_the_reverse_divergence(self) -> None:
        given = preference.alpha_derivative(self.LOG_RATIOS, alpha=1.0 + 1e-5)
        np.testing.assert_allclose(given, self.LOG_RATIOS, rtol=1e-4)
        grad = jax.grad(lambda x: preference.alpha_derivative(x, alpha=1.0).sum())(self.LOG_RATIOS)
        np.testing.assert_array_equal(grad, np.ones(5))

    @pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
    def test_derivatives_are_those_of_the_divergence(self, alpha: float) -> None:
        u = np.exp(np.float64(self.LOG_RATIOS))
        expected = (u ** (alpha - 1) - 1) / (alpha - 1)
        given = preference.alpha_derivative(self.LOG_RATIOS, alpha=alpha)
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-7)
        given = preference.js_derivative(self.LOG_RATIOS) + np.log(2)
        np.testing.assert_allclose(given, np.log(2 * u / (1 + u)), rtol=1e-4, atol=1e-6)


class TestAot:
    def test_by_hand(self) -> None:
        """Margins 3, 1, 2 meet the reference's 0, 20, 10 in their order: 20, 0, 10."""
        zeros = jnp.zeros(3)
        given, _ = preference.aot(
            jnp.array([3.0, 1.0, 2.0]),
            zeros,
            jnp.array([0.0, 20.0, 10.0]),
            zeros,
            beta=0.1,
            reduce=masked.fill,
        )
        np.testing.assert_allclose(given, cross_entropy(np.array([-1.7, 0.1, -0.8])), rtol=1e-6)

    def test_where_every_pair_has_its_own_rank_it_is_dpo(self) -> None:
        arrays = [np.sort(x[0]) * sign for x, sign in zip(PAIRS, (1, -1, 1, -1), strict=True)]
        plain, _ = preference.dpo(*arrays, beta=BETA)
        np.testing.assert_allclose(preference.aot(*arrays, beta=BETA)[0], plain, rtol=1e-6)


class TestImplicitRewards:
    def test_by_hand(self) -> None:
        mask = jnp.array([True, False])
        new, ref = jnp.array([-1.0, jnp.nan]), jnp.array([-3.0, jnp.inf])
        rewards, grads = jax.value_and_grad(
            lambda *arrays: preference.implicit_rewards(*arrays, mask, beta=0.5).sum(), (0, 1)
        )(new, ref)
        assert rewards == 1.0
        np.testing.assert_array_equal(grads, [[0.5, 0.0], [0.0, 0.0]])
