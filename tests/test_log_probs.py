"""Log-probabilities and entropies against float64 NumPy, and the one response slice by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import bigram, chosen, log_softmax, recurrent

from rlhfjax import log_probs

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0.0, 2.0, (3, 4, 7)).astype(np.float32)
TOKENS = RNG.integers(0, 7, (3, 4)).astype(np.int32)
WEIGHTS = RNG.normal(size=(2, 3, 4))


def expected(logits: np.ndarray, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    log_p = log_softmax(logits, temperature=temperature)
    terms = np.where(np.isfinite(log_p), np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0), 0)
    return chosen(log_p, TOKENS), -terms.sum(-1)


def weighted(logits: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    both = log_probs.token_log_probs_and_entropy(logits, TOKENS, temperature=temperature)
    return jnp.sum(WEIGHTS[0] * both[0] + WEIGHTS[1] * both[1])


def weighted_in_numpy(logits: np.ndarray, temperature: float) -> float:
    both = expected(logits, temperature)
    return float((WEIGHTS[0] * both[0] + WEIGHTS[1] * both[1]).sum())


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
class TestAgainstNumPy:
    def test_values(self, temperature: float) -> None:
        both = log_probs.token_log_probs_and_entropy(LOGITS, TOKENS, temperature=temperature)
        for mine, theirs in zip(both, expected(LOGITS, temperature), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)

    def test_the_single_functions_give_the_same(self, temperature: float) -> None:
        one = log_probs.token_log_probs(LOGITS, TOKENS, temperature=temperature)
        other = log_probs.entropy(LOGITS, temperature=temperature)
        for mine, theirs in zip((one, other), expected(LOGITS, temperature), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)

    def test_gradients_are_finite_differences(self, temperature: float) -> None:
        grad = np.asarray(jax.grad(weighted)(LOGITS, temperature))
        exact, step = LOGITS.astype(np.float64), 1e-5
        for place in np.ndindex(LOGITS.shape):
            shift = np.zeros(LOGITS.shape)
            shift[place] = step
            up = weighted_in_numpy(exact + shift, temperature)
            down = weighted_in_numpy(exact - shift, temperature)
            assert grad[place] == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-4)

    def test_the_gradient_of_the_temperature_is_a_finite_difference(
        self, temperature: float
    ) -> None:
        grad = jax.grad(weighted, 1)(LOGITS, temperature)
        up, down = (weighted_in_numpy(LOGITS, temperature + s) for s in (1e-5, -1e-5))
        assert grad == pytest.approx((up - down) / 2e-5, rel=1e-3)


@pytest.mark.parametrize("part", [0, 1], ids=["log-probability", "entropy"])
def test_the_gradient_of_each_output_is_that_of_the_plain_formula(part: int) -> None:
    def plain(logits: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]
        return jnp.sum(WEIGHTS[part] * (picked, -(jnp.exp(log_p) * log_p).sum(-1))[part])

    def mine(logits: jax.Array) -> jax.Array:
        return jnp.sum(WEIGHTS[part] * log_probs.token_log_probs_and_entropy(logits, TOKENS)[part])

    np.testing.assert_allclose(
        jax.grad(mine)(LOGITS), jax.grad(plain)(LOGITS), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_token_outside_the_vocabulary_changes_nothing(temperature: float) -> None:
    wider = np.concatenate([LOGITS, np.full((3, 4, 2), -np.inf, np.float32)], -1)
    value, grad = jax.value_and_grad(weighted)(wider, temperature)
    clean_value, clean_grad = jax.value_and_grad(weighted)(LOGITS, temperature)
    assert value == pytest.approx(float(clean_value), rel=1e-6)
    np.testing.assert_allclose(grad[..., :7], clean_grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(grad[..., 7:], 0.0)


def test_choosing_a_token_outside_the_vocabulary_leaves_other_rows_alone() -> None:
    logits = jnp.array([[0.0, -jnp.inf], [1.0, 2.0]])

    def second(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        values = log_probs.token_log_probs(logits, jnp.array([1, 0]))
        return jnp.where(jnp.array([False, True]), values, 0.0).sum(), values

    grad, values = jax.grad(second, has_aux=True)(logits)
    assert values[0] == -np.inf
    sigmoid = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(grad, [[0, 0], [sigmoid, -sigmoid]], rtol=1e-6)


@pytest.mark.parametrize("offset", [3e4, -3e4])
def test_large_logits_lose_no_digit(offset: float) -> None:
    small = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
    tokens = np.array([1])
    far = log_probs.token_log_probs_and_entropy(small + np.float32(offset), tokens)
    near = log_probs.token_log_probs_and_entropy(small, tokens)
    np.testing.assert_allclose(far, near, rtol=1e-6)


def test_a_certain_token_has_no_entropy_and_no_gradient() -> None:
    logits = jnp.array([[3e4, 0.0, -3e4]])
    for token, value in ((0, 0.0), (1, -3e4), (2, -6e4)):
        log_prob, entropy = log_probs.token_log_probs_and_entropy(logits, jnp.array([token]))
        assert (log_prob[0], entropy[0]) == (value, 0.0)
    grad = jax.grad(lambda x: log_probs.entropy(x).sum())(logits)
    np.testing.assert_array_equal(grad, 0.0)


def test_a_uniform_row_has_the_entropy_log_v() -> None:
    assert log_probs.entropy(jnp.full((1, 7), 5.0))[0] == pytest.approx(np.log(7), rel=1e-6)


def test_batched_equals_vmapped_and_jitted() -> None:
    batched = log_probs.token_log_probs_and_entropy(LOGITS, TOKENS, temperature=0.7)

    @jax.jit
    @jax.vmap
    @jax.vmap
    def rows(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return log_probs.token_log_probs_and_entropy(logits, tokens, temperature=0.7)

    np.testing.assert_allclose(batched, rows(LOGITS, TOKENS), rtol=1e-6, atol=1e-6)
    grads = jax.jit(jax.vmap(jax.grad(lambda x: log_probs.entropy(x).sum())))(LOGITS)
    whole = jax.grad(lambda x: log_probs.entropy(x).sum())(LOGITS)
    np.testing.assert_allclose(grads, whole, rtol=1e-5, atol=1e-7)


def test_results_of_half_precision_are_float32() -> None:
    half = jnp.asarray(LOGITS, jnp.bfloat16)
    both = log_probs.token_log_probs_and_entropy(half, TOKENS)
    for mine, theirs in zip(both, expected(np.asarray(half, np.float64)), strict=True):
        assert mine.dtype == jnp.float32
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_tokens_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AssertionError):
        log_probs.token_log_probs(LOGITS, TOKENS[:, :-1])
    with pytest.raises(AssertionError):
        log_probs.token_log_probs(LOGITS, TOKENS.astype(np.float32))


def test_the_response_slice_by_hand() -> None:
    # P = 4 and T = 3: the states at 3, 4 and 5 emit the tokens at 4, 5 and 6.
    tokens = jnp.arange(10, 17)[None]
    mask = jnp.array([[False, True, True, True, True, True, False]])
    inputs = log_probs.response_inputs(tokens, mask, 3)
    np.testing.assert_array_equal(inputs["tokens"], [[10, 11, 12, 13, 14, 15]])
    np.testing.assert_array_equal(inputs["attention_mask"], mask[:, :-1])
    states = bigram(20).hidden({"table": jnp.arange(20.0)[:, None]}, **inputs)
    np.testing.assert_array_equal(states[0, :, 0], [13, 14, 15])


def test_response_log_probs_of_a_table() -> None:
    table = RNG.normal(0, 2, (7, 7))
    tokens = RNG.integers(0, 7, (5, 6)).astype(np.int32)
    mine, entropies = log_probs.response_log_probs(
        bigram(7), {"table": jnp.asarray(table, jnp.float32)}, tokens, tokens >= 0, 4,
        temperature=0.7,
    )  # fmt: skip
    log_p = log_softmax(table[tokens[:, 1:5]], temperature=0.7)
    np.testing.assert_allclose(mine, chosen(log_p, tokens[:, 2:]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(entropies, -(np.exp(log_p) * log_p).sum(-1), rtol=1e-4, atol=1e-5)


def test_response_log_probs_are_those_of_a_pass_over_everything() -> None:
    model = recurrent(11, 8)
    params = model.init(jax.random.key(0))
    tokens = RNG.integers(0, 11, (3, 9)).astype(np.int32)
    mask = np.arange(9) >= np.array([0, 2, 4])[:, None]
    mine, _ = jax.jit(log_probs.response_log_probs, static_argnums=(0, 4))(
        model, params, tokens, mask, 4
    )
    logits = jax.jit(lambda p: model.logits(p, model.hidden(p, tokens, mask)))(params)
    every = log_softmax(logits)
    assert every.std() > 0.5
    theirs = np.stack([chosen(every[:, t - 1], tokens[:, t]) for t in range(5, 9)], 1)
    np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-4)
