"""Losses of pairs that hold each reward to an anchor, by hand."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from preference_cases import CHOSEN, REF_CHOSEN, REF_REJECTED

from rlhfjax import masked
from rlhfjax.losses import anchored


class TestAnchored:
    REFS = (REF_CHOSEN, REF_REJECTED)

    @pytest.mark.parametrize(
        "loss, at_reference, chosen, rejected",
        [
            # Per pair: the loss, and its derivatives by the two log-probabilities, β = 0.4.
            (anchored.nca, 2 * np.log(2), -0.1, 0.1),
            (anchored.apo_zero, 1.0, -0.1, 0.1),
            (anchored.apo_down, 1.0, 0.0, 0.1),
            (anchored.bco_pair, 2 * np.log(2), -0.2, 0.2),
            (anchored.kto_pair, 0.5, -0.05, 0.05),
            (anchored.sppo, 2 * 1.25**2, -2.5, 2.5),
        ],
    )
    def test_at_the_reference(
        self, loss: Callable[..., Any], at_reference: float, chosen: float, rejected: float
    ) -> None:
        def loss_of(*policy: jax.Array) -> jax.Array:
            return loss(*policy, *self.REFS, beta=0.4, reduce=masked.sum)[0]

        value, grads = jax.value_and_grad(loss_of, (0, 1))(*self.REFS)
        assert value == pytest.approx(at_reference * CHOSEN.size)
        np.testing.assert_allclose(grads[0], np.full_like(CHOSEN, chosen), rtol=1e-5, atol=1e-8)
        np.testing.assert_allclose(grads[1], np.full_like(CHOSEN, rejected), rtol=1e-5)

    def test_sppo_is_0_where_the_rewards_are_a_half_up_and_down(self) -> None:
        policy = (REF_CHOSEN + 2.0, REF_REJECTED - 2.0)
        assert anchored.sppo(*policy, *self.REFS, beta=0.25)[0] == pytest.approx(0.0, abs=1e-9)
