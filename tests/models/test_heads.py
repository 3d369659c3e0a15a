"""Scalar heads by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import bigram, recurrent

from rlhfjax import models

RNG = np.random.default_rng(0)
HEAD = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array(0.25)}


class TestLinearHead:
    def test_by_hand(self) -> None:
        hidden = jnp.array([[[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]])
        values = models.linear_head(3, stddev=1.0).apply(HEAD, hidden)
        np.testing.assert_array_equal(values, [[-0.75, 0.25]])

    def test_half_precision_states_give_float32(self) -> None:
        values = models.linear_head(3, stddev=1.0).apply(HEAD, jnp.ones((2, 3), jnp.bfloat16))
        assert values.dtype == jnp.float32

    def test_a_head_of_deviation_0_says_0(self) -> None:
        head = models.linear_head(8, stddev=0.0)
        values = head.apply(head.init(jax.random.key(0)), jnp.ones((2, 8)))
        np.testing.assert_array_equal(values, 0.0)

    def test_the_deviation_of_the_initial_weights(self) -> None:
        params = models.linear_head(10_000, stddev=0.3).init(jax.random.key(0))
        # Four standard errors of a deviation from 10,000 draws.
        assert params["kernel"].std() == pytest.approx(0.3, abs=4 * 0.3 / np.sqrt(2 * 10_000))
        assert params["bias"] == 0.0


def test_rescale_by_hand() -> None:
    # v = 1·1 - 2·2 + 0.5·4 + 0.25 = -0.75, and (-0.75 - 0.5) / 2.
    head = models.linear_head(3, stddev=1.0)
    value = head.apply(models.rescale(HEAD, mean=0.5, std=2.0), jnp.array([1.0, 2.0, 4.0]))
    assert value == -0.625


def test_rescaled_by_its_own_statistics_a_head_has_mean_0_and_variance_1() -> None:
    head, hidden = models.linear_head(3, stddev=1.0), RNG.normal(3, 2, (50, 3)).astype(np.float32)
    values = head.apply(HEAD, hidden)
    scaled = head.apply(models.rescale(HEAD, mean=values.mean(), std=values.std()), hidden)
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scaled.std()) == pytest.approx(1, abs=1e-5)


class TestScalarModel:
    def test_it_is_the_head_on_the_states(self) -> None:
        model = models.scalar_model(bigram(3), models.linear_head(3, stddev=1.0))
        table = RNG.normal(size=(3, 3)).astype(np.float32)
        tokens = np.array([[0, 2, 1, 1]])
        params = {"backbone": {"table": table}, "head": HEAD}
        values = model.values(params, tokens, tokens >= 0)
        expected = table[tokens[0]] @ np.array([1.0, -2.0, 0.5]) + 0.25
        np.testing.assert_allclose(values[0], expected, rtol=1e-6, atol=1e-6)
        tail = model.values(params, tokens, tokens >= 0, first=3)
        np.testing.assert_allclose(tail[0], expected[3:], rtol=1e-6, atol=1e-6)

    def test_backbone_and_head_start_from_keys_of_their_own(self) -> None:
        backbone = recurrent(5, 4)
        model = models.scalar_model(backbone, models.linear_head(4, stddev=1.0))
        params, other = (model.init(jax.random.key(seed)) for seed in (0, 1))
        assert jax.tree.structure(params["backbone"]) == jax.tree.structure(
            backbone.init(jax.random.key(0))
        )
        for leaf, others in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
            assert leaf.ndim == 0 or (leaf != others).all()


class TestLastValue:
    VALUES = jnp.arange(20.0).reshape(4, 5) + 1

    def test_padding_on_either_side_and_gaps(self) -> None:
        mask = jnp.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0]], bool)
        np.testing.assert_array_equal(models.last_value(self.VALUES, mask), [3, 10, 14, 0])

    @pytest.mark.parametrize("garbage", [np.nan, np.inf])
    def test_padding_is_not_read(self, garbage: float) -> None:
        mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
        polluted = jnp.where(mask, self.VALUES, garbage)
        scores, pull = jax.vjp(lambda v: models.last_value(v, jnp.asarray(mask)), polluted)
        np.testing.assert_array_equal(scores, [3, 10, 12, 0])
        expected = np.zeros((4, 5))
        expected[0, 2] = expected[1, 4] = expected[2, 1] = 1
        np.testing.assert_array_equal(pull(jnp.ones(4))[0], expected)
