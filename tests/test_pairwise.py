"""The loss of pairs by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import reward


class TestPairwise:
    CHOSEN, REJECTED = jnp.array([1.0, 0.0, -2.0]), jnp.array([0.0, 0.0, 1.0])

    def test_by_hand(self) -> None:
        loss, metrics = reward.pairwise(self.CHOSEN, self.REJECTED)
        expected = np.mean([np.log1p(np.exp(-1.0)), np.log(2.0), np.log1p(np.exp(3.0))])
        assert loss == pytest.approx(expected, rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(1 / 3)
        assert metrics["margin"] == pytest.approx(-2 / 3)

    def test_the_margin_is_asked_of_each_pair(self) -> None:
        margin = jnp.array([1.0, 0.0, -3.0])
        loss, metrics = reward.pairwise(self.CHOSEN, self.REJECTED, margin=margin)
        assert loss == pytest.approx(np.log(2.0), rel=1e-6)
        assert metrics["accuracy"] == pytest.approx(1 / 3)

    def test_centring_adds_the_mean_square_of_the_sums(self) -> None:
        plain, _ = reward.pairwise(self.CHOSEN, self.REJECTED)
        centred, _ = reward.pairwise(self.CHOSEN, self.REJECTED, center_coef=0.3)
        assert centred - plain == pytest.approx(0.3 * (1 + 0 + 1) / 3, rel=1e-5)

    def test_large_differences_stay_finite(self) -> None:
        (loss, _), grad = jax.value_and_grad(reward.pairwise, has_aux=True)(
            jnp.array([-1000.0]), jnp.array([1000.0])
        )
        assert loss == 2000.0 and grad == -1.0

    def test_rows_that_fill_a_batch_do_not_count(self) -> None:
        short = reward.pairwise(self.CHOSEN[:2], self.REJECTED[:2], center_coef=0.1)
        filled = reward.pairwise(
            self.CHOSEN, self.REJECTED, jnp.array([True, True, False]), center_coef=0.1
        )
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), filled, short)
