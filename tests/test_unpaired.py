"""Losses of single responses, desirable or not, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from preference_cases import BETA, CHOSEN, DESIRABLE, REF_CHOSEN, B

from rlhfjax import masked
from rlhfjax.losses import preference, unpaired


class TestUnpaired:
    def test_kl_of_mismatched_responses(self) -> None:
        new, ref = jnp.array([1.0, 2.0, 9.0]), jnp.array([0.0, 4.0, 0.0])
        assert unpaired.reference_kl(new, ref) == pytest.approx(8 / 3)
        assert unpaired.reference_kl(new, ref, jnp.array([True, True, False])) == 0
        assert unpaired.reference_kl(new, ref, jnp.array([True, False, False])) == 1
        assert unpaired.reference_kl(new, ref, jnp.zeros(3, bool)) == 0

    def test_kto_at_the_reference(self) -> None:
        def loss_of(log_probs: jax.Array) -> tuple[jax.Array, dict]:
            return unpaired.kto(
                log_probs,
                REF_CHOSEN[0],
                DESIRABLE,
                jnp.zeros(()),
                beta=0.4,
                desirable_weight=1.5,
                reduce=masked.sum,
            )

        (loss, metrics), grad = jax.value_and_grad(loss_of, has_aux=True)(REF_CHOSEN[0])
        assert loss == pytest.approx(3 * 0.75 + 3 * 0.5)
        np.testing.assert_allclose(grad, np.where(DESIRABLE, -0.15, 0.1), rtol=1e-6)
        assert metrics == {
            "rewards/chosen": 0,
            "rewards/rejected": 0,
            "rewards/margins": 0,
            "kl": 0,
        }

    def test_the_reference_point_of_kto_has_no_gradient(self) -> None:
        def loss_of(log_probs: jax.Array) -> jax.Array:
            kl = unpaired.reference_kl(log_probs, REF_CHOSEN[0])
            return unpaired.kto(CHOSEN[0], REF_CHOSEN[0], np.ones(B, bool), kl, beta=BETA)[0]

        higher = REF_CHOSEN[0] + 1.0
        assert abs(loss_of(higher) - loss_of(REF_CHOSEN[0])) > 0.01
        assert (np.asarray(jax.grad(loss_of)(higher)) == 0).all()

    def test_the_shift_of_bco_has_no_gradient(self) -> None:
        def loss_of(log_probs: jax.Array) -> jax.Array:
            rewards = preference.implicit_rewards(log_probs, REF_CHOSEN[0], beta=BETA)
            return unpaired.bco(CHOSEN[0], REF_CHOSEN[0], DESIRABLE, rewards.mean(), beta=BETA)[0]

        assert (np.asarray(jax.grad(loss_of)(CHOSEN[0])) == 0).all()

    def test_metrics_by_hand(self) -> None:
        arrays = (jnp.array([1.0, 2.0, 3.0, 99.0]), jnp.zeros(4))
        desirable, mask = jnp.array([True, False, True, True]), jnp.array([True, True, True, False])
        _, metrics = unpaired.kto(*arrays, desirable, jnp.float32(0.25), mask, beta=0.5)
        assert metrics == {
            "rewards/chosen": 1.0,
            "rewards/rejected": 1.0,
            "rewards/margins": 0.0,
            "kl": 0.25,
        }
        _, metrics = unpaired.bco(*arrays, jnp.ones(4, bool), jnp.float32(0.0), mask, beta=0.5)
        assert metrics == {
            "rewards/chosen": 1.0,
            "rewards/rejected": 0.0,
            "rewards/margins": 1.0,
        }

    def test_labels_must_be_bool(self) -> None:
        for loss in (unpaired.kto, unpaired.bco):
            with pytest.raises(AssertionError):
                loss(CHOSEN[0], REF_CHOSEN[0], DESIRABLE.astype(np.int32), 0.0, beta=BETA)
