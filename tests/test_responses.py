"""From the tokens of responses to what losses of preferences read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.losses import responses


class TestResponses:
    MASK = jnp.array([[False, True, True, False, True]])
    OTHER = jnp.array([[True, True, False]])
    LOG_PROBS = jnp.array([[jnp.nan, -1.0, -2.0, -jnp.inf, -4.0]])

    @pytest.mark.parametrize("coef, expected", [(1.0, -7.0), (0.5, -5.0), (0.0, -3.0)])
    def test_tokens_beyond_the_other_response_weigh_less(
        self, coef: float, expected: float
    ) -> None:
        def total(log_probs: jax.Array) -> jax.Array:
            return responses.length_desensitised(
                log_probs, self.MASK, self.OTHER, length_coef=coef
            ).sum()

        given, grad = jax.value_and_grad(total)(self.LOG_PROBS)
        assert given == expected
        np.testing.assert_array_equal(grad, [[0.0, 1.0, 1.0, 0.0, coef]])

    def test_a_longer_other_response_changes_nothing(self) -> None:
        given = responses.length_desensitised(
            self.LOG_PROBS, self.MASK, jnp.ones((1, 9), bool), length_coef=0.0
        )
        np.testing.assert_array_equal(given, [-7.0])

    def test_two_draws_collide_with_the_probability_of_the_sum_of_squares(self) -> None:
        logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]))
        given = responses.log_collision(logits)
        np.testing.assert_allclose(given, [np.log(0.375), 0.0], rtol=1e-6)
        large = responses.log_collision(jnp.full((1, 4), 3e4))
        np.testing.assert_allclose(large, [-np.log(4.0)], rtol=1e-6)

    def test_wpo_weights_by_hand(self) -> None:
        """exp(mean of (-1 - -2, -2 - -1.5)) · exp(-3 - -1)."""
        arrays = (
            jnp.array([[-1.0, -2.0, jnp.nan]]),
            jnp.array([[-3.0, jnp.inf]]),
            jnp.array([[-2.0, -1.5, jnp.nan]]),
            jnp.array([[-1.0, jnp.nan]]),
        )
        masks = (jnp.array([[True, True, False]]), jnp.array([[True, False]]))
        weights = responses.wpo_weights(*arrays, *masks)
        np.testing.assert_allclose(weights, [np.exp(0.25 - 2.0)], rtol=1e-6)
        grads = jax.grad(lambda *arrays: responses.wpo_weights(*arrays, *masks).sum(), (0, 1, 2))(
            *arrays[:3], arrays[3]
        )
        for grad in grads:
            assert (np.asarray(grad) == 0).all()
        nothing = tuple(jnp.zeros_like(mask) for mask in masks)
        np.testing.assert_array_equal(responses.wpo_weights(*arrays, *nothing), [1.0])
