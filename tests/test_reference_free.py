"""Losses of pairs without a reference, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import BETA, CHOSEN, MEANS, REJECTED, sigmoid

from rlhfjax import masked
from rlhfjax.losses import preference, reference_free


class TestReferenceFree:
    def test_simpo_by_hand(self) -> None:
        loss, metrics = reference_free.simpo(
            jnp.array([-0.5]), jnp.array([-1.5]), beta=2.0, margin=0.5
        )
        assert loss == pytest.approx(np.log1p(np.exp(-1.5)), rel=1e-6)
        assert metrics["rewards/chosen"] == -1.0 and metrics["rewards/rejected"] == -3.0

    def test_a_ratio_of_margin_and_beta_is_a_constant_reference(self) -> None:
        ratio = jnp.full_like(CHOSEN, 0.3)
        given, _ = reference_free.simpo(*MEANS, beta=2.0, margin=0.6)
        expected, _ = preference.dpo(*MEANS, ratio, jnp.zeros_like(ratio), beta=2.0)
        np.testing.assert_allclose(given, expected, rtol=1e-5)

    def test_cpo_is_dpo_with_a_reference_that_knows_nothing(self) -> None:
        nothing = jnp.zeros_like(CHOSEN)
        given, _ = reference_free.cpo(CHOSEN, REJECTED, beta=BETA)
        expected, _ = preference.dpo(CHOSEN, REJECTED, nothing, nothing, beta=BETA)
        np.testing.assert_allclose(given, expected, rtol=1e-6)

    def test_slic_by_hand(self) -> None:
        given, _ = reference_free.slic(
            jnp.array([-3.0, -1.0]), jnp.array([-4.0, -1.5]), margin=0.75, reduce=masked.fill
        )
        np.testing.assert_allclose(given, [0.0, 0.25])

    def test_alpha_rewards(self) -> None:
        log_probs = jnp.log(jnp.array([0.25, 1.0]))
        given = reference_free.alpha_rewards(log_probs, alpha=0.5)
        np.testing.assert_allclose(given, [(1 - 2.0) / 0.5, 0.0], rtol=1e-6)
        np.testing.assert_allclose(reference_free.alpha_rewards(log_probs, alpha=0.0), log_probs)
        certain = jnp.array([-3000.0])
        rewards, grad = jax.value_and_grad(
            lambda x: reference_free.alpha_rewards(x, alpha=0.5).sum()
        )(certain)
        assert np.isfinite(rewards) and grad == 0


class TestOrpo:
    def test_by_hand(self) -> None:
        """Odds of 4 against odds of 1."""
        loss, metrics = reference_free.orpo(
            jnp.log(jnp.array([0.8])), jnp.log(jnp.array([0.5])), beta=0.1
        )
        assert loss == pytest.approx(0.1 * np.log(1.25), rel=1e-5)
        assert metrics["odds_ratio"] == pytest.approx(4.0, rel=1e-5)
        assert metrics["log_odds_chosen"] == pytest.approx(np.log(4.0), rel=1e-5)
        assert metrics["log_odds_ratio"] == pytest.approx(-np.log(1.25), rel=1e-5)
        assert metrics["rewards/chosen"] == pytest.approx(0.1 * np.log(0.8), rel=1e-5)

    @pytest.mark.parametrize("log_prob", [-1e-6, -1e-3, -0.69, -0.7, -3.0, -60.0])
    def test_log_odds_keep_their_digits(self, log_prob: float) -> None:
        def loss_of(chosen: jax.Array) -> tuple[jax.Array, dict]:
            return reference_free.orpo(chosen, jnp.log(jnp.array([0.5])), beta=1.0)

        (_, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(
            jnp.array([log_prob], jnp.float32)
        )
        exact = np.float64(np.float32(log_prob))
        odds = np.exp(exact) / -np.expm1(exact)
        assert metrics["log_odds_chosen"] == pytest.approx(np.log(odds), rel=1e-5, abs=1e-6)
        slope = -sigmoid(-np.log(odds)) / -np.expm1(exact)
        np.testing.assert_allclose(grad, slope, rtol=2e-5)

    def test_a_certain_response_has_finite_odds_and_no_gradient(self) -> None:
        for pair in ([0.0], [-1.0]), ([-1.0], [0.0]), ([0.0], [0.0]):
            arrays = tuple(jnp.array(x) for x in pair)
            (loss, metrics), grads = jax.value_and_grad(
                lambda *pair: reference_free.orpo(*pair, beta=0.1), (0, 1), has_aux=True
            )(*arrays)
            assert np.isfinite([loss, *metrics.values(), *grads[0], *grads[1]]).all()
            for array, grad in zip(arrays, grads, strict=True):
                assert (array == 0) <= (grad == 0)
        bound = np.log(1e-3)
        _, metrics = reference_free.orpo(
            jnp.zeros(1), jnp.log(jnp.array([0.5])), beta=0.1, log_prob_max=np.log1p(-1e-3)
        )
        assert metrics["log_odds_chosen"] == pytest.approx(np.log(0.999) - bound, rel=1e-4)
