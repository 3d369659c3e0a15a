"""Policy and value function over one tree, with one trunk or two."""

import jax
import jax.numpy as jnp
import numpy as np
from small_models import assert_same, left_padded, recurrent

from rlhfjax import models

TOKENS, MASK = left_padded(np.random.default_rng(0), [6, 4, 1], 6, 0, 7)
POLICY = recurrent(7, 5)
HEAD = models.linear_head(5, stddev=0.7)
VALUE = models.scalar_model(recurrent(7, 5), HEAD)
SEPARATE, SHARED = models.separate_trunks(POLICY, VALUE), models.shared_trunk(POLICY, HEAD)
KEY = jax.random.key(3)


def total_value(model: models.ActorCritic):
    return lambda params: model.outputs(params, TOKENS, MASK)[1].sum()


class TestSeparateTrunks:
    def test_outputs_are_the_policys_states_and_the_value_models_values(self) -> None:
        params = SEPARATE.init(KEY)
        hidden, values = SEPARATE.outputs(params, TOKENS, MASK, first=2)
        assert_same(hidden, POLICY.hidden(params["policy"], TOKENS, MASK, first=2))
        assert_same(values, VALUE.values(params["value"], TOKENS, MASK, first=2))
        assert (hidden.shape, values.shape) == ((3, 4, 5), (3, 4))

    def test_values_pull_at_the_value_model_only(self) -> None:
        grads = jax.grad(total_value(SEPARATE))(SEPARATE.init(KEY))
        assert not any(leaf.any() for leaf in jax.tree.leaves(grads["policy"]))
        assert grads["value"]["backbone"]["mixing"].any()

    def test_the_trunks_start_apart_and_values_cannot_be_read_while_decoding(self) -> None:
        params = SEPARATE.init(KEY)
        apart = params["policy"]["mixing"] != params["value"]["backbone"]["mixing"]
        assert apart.all()
        assert SEPARATE.value_of is None


class TestSharedTrunk:
    def test_values_are_the_head_on_the_policys_states(self) -> None:
        params = SHARED.init(KEY)
        hidden, values = SHARED.outputs(params, TOKENS, MASK, first=2)
        assert_same(hidden, POLICY.hidden(params["policy"], TOKENS, MASK, first=2))
        expected = hidden @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)

    def test_values_read_from_a_state_are_those_of_the_whole_pass(self) -> None:
        params = SHARED.init(KEY)
        hidden, values = SHARED.outputs(params, TOKENS, MASK)
        assert SHARED.value_of is not None
        one_by_one = [SHARED.value_of(params, hidden[:, t]) for t in range(6)]
        np.testing.assert_allclose(values, jnp.stack(one_by_one, 1), rtol=1e-6, atol=1e-6)

    def test_values_pull_at_the_policys_trunk(self) -> None:
        grads = jax.grad(total_value(SHARED))(SHARED.init(KEY))
        assert grads["policy"]["mixing"].any()
        assert not grads["policy"]["head"].any()
