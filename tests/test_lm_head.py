"""The chunked LM head against the whole matrix of logits, in numbers and in memory."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_close, chosen, log_softmax

from rlhfjax import lm_head, log_probs

RNG = np.random.default_rng(0)
V, D, D_REF = 37, 8, 5
HIDDEN, REF_HIDDEN = (RNG.normal(size=(3, 4, d)).astype(np.float32) for d in (D, D_REF))
HEAD, REF_HEAD = (RNG.normal(size=(V, d)).astype(np.float32) for d in (D, D_REF))
BIAS, REF_BIAS = RNG.normal(size=(2, V)).astype(np.float32)
TOKENS = RNG.integers(0, V, (3, 4)).astype(np.int32)
WEIGHTS = RNG.normal(size=(2, 3, 4)).astype(np.float32)
POLICY, REFERENCE = (HIDDEN, HEAD, BIAS), (REF_HIDDEN, REF_HEAD, REF_BIAS)

# One entry at a time, pieces that overlap, all but one entry, all of them, more than there are.
each_setting = pytest.mark.parametrize(
    "chunk_size, temperature",
    [(1, 1.0), (8, 0.4), (8, 1.0), (8, 2.5), (V - 1, 0.4), (V, 1.0), (100, 2.5)],
)
small = partial(lm_head.token_log_probs_and_entropy, chunk_size=8)
small_kl = partial(lm_head.kl, chunk_size=8)


def log_p_of(hidden, head, bias, temperature: float = 1.0) -> jax.Array:
    """All log-probabilities at once, in the words of the definition."""
    return jax.nn.log_softmax((hidden @ head.T + bias) / temperature)


def dense(hidden, head, bias, temperature=1.0) -> jax.Array:
    """A weighted sum of log-probabilities and entropies, differentiable."""
    log_p = log_p_of(hidden, head, bias, temperature)
    picked = jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]
    return jnp.sum(WEIGHTS[0] * picked - WEIGHTS[1] * (jnp.exp(log_p) * log_p).sum(-1))


def chunked(hidden, head, bias, temperature=1.0, chunk_size: int = 8) -> jax.Array:
    """The same sum through the function under test."""
    both = lm_head.token_log_probs_and_entropy(
        hidden, head, TOKENS, bias, chunk_size=chunk_size, temperature=temperature
    )
    return jnp.sum(WEIGHTS[0] * both[0] + WEIGHTS[1] * both[1])


def dense_kl(policy, reference, temperature=1.0) -> jax.Array:
    log_p, log_ref = (log_p_of(*p, temperature) for p in (policy, reference))
    return jnp.sum(WEIGHTS[0] * (jnp.exp(log_p) * (log_p - log_ref)).sum(-1))


def chunked_kl(policy, reference, temperature=1.0, chunk_size: int = 8) -> jax.Array:
    (hidden, head, bias), (ref_hidden, ref_head, ref_bias) = policy, reference
    divergence = lm_head.kl(
        hidden, head, ref_hidden, ref_head, bias, ref_bias,
        chunk_size=chunk_size, temperature=temperature,
    )  # fmt: skip
    return jnp.sum(WEIGHTS[0] * divergence)


of_dense = jax.jit(jax.value_and_grad(dense, (0, 1, 2, 3)))
of_dense_kl, of_chunked_kl = (jax.jit(jax.value_and_grad(f)) for f in (dense_kl, chunked_kl))


def widened(policy: tuple, places: slice) -> tuple:
    """The policy with NaN for entries outside the vocabulary, and where the others are."""
    hidden, head, bias = policy
    new = np.zeros(V + 11, bool)
    new[places] = True
    assert new.sum() == 11
    wide_head = np.full((V + 11, head.shape[1]), np.nan, np.float32)
    wide_bias = np.full(V + 11, -np.inf, np.float32)
    wide_head[~new], wide_bias[~new] = head, bias
    return (hidden, wide_head, wide_bias), np.flatnonzero(~new)


each_place = pytest.mark.parametrize(
    "places", [slice(11), slice(-11, None), slice(1, 45, 4)], ids=["first", "last", "scattered"]
)


class TestLogProbsAndEntropy:
    @each_setting
    def test_values_are_those_of_float64(self, chunk_size: int, temperature: float) -> None:
        mine = lm_head.token_log_probs_and_entropy(
            HIDDEN, HEAD, TOKENS, BIAS, chunk_size=chunk_size, temperature=temperature
        )
        logits = HIDDEN.astype(np.float64) @ HEAD.T.astype(np.float64) + BIAS
        log_p = log_softmax(logits, temperature=temperature)
        assert_close(mine, (chosen(log_p, TOKENS), -(np.exp(log_p) * log_p).sum(-1)), atol=1e-5)

    @each_setting
    def test_gradients_are_those_of_the_definition(
        self, chunk_size: int, temperature: float
    ) -> None:
        in_chunks = partial(chunked, chunk_size=chunk_size)
        mine = jax.jit(jax.grad(in_chunks, (0, 1, 2, 3)))(*POLICY, temperature)
        theirs = of_dense(*POLICY, temperature)[1]
        assert_close(mine, theirs, atol=1e-5)

    def test_it_is_the_dense_function_of_the_library(self) -> None:
        mine = lm_head.token_log_probs_and_entropy(HIDDEN, HEAD, TOKENS)
        theirs = log_probs.token_log_probs_and_entropy(jnp.asarray(HIDDEN @ HEAD.T), TOKENS)
        assert_close(mine, theirs, atol=1e-5)

    @each_place
    def test_entries_outside_the_vocabulary_change_nothing(self, places: slice) -> None:
        wide, kept = widened(POLICY, places)

        def of(hidden, head, bias, temperature, tokens) -> jax.Array:
            both = small(hidden, head, tokens, bias, temperature=temperature)
            return jnp.sum(WEIGHTS[0] * both[0] + WEIGHTS[1] * both[1])

        run = jax.jit(jax.value_and_grad(of, (0, 1, 2, 3)))
        loss, grads = run(*wide, 0.7, kept[TOKENS])
        clean_loss, clean_grads = of_dense(*POLICY, 0.7)
        narrow = (grads[0], grads[1][kept], grads[2][kept], grads[3])
        assert_close((loss, narrow), (clean_loss, clean_grads), atol=1e-5)
        for grad in grads[1:3]:
            assert (np.delete(grad, kept, axis=0) == 0).all()

    def test_a_token_outside_the_vocabulary_leaves_the_others_alone(self) -> None:
        bias = jnp.asarray(BIAS).at[TOKENS[0, 0]].set(-jnp.inf)
        outside = np.equal(TOKENS, TOKENS[0, 0])
        assert not outside.all()

        def loss(hidden, head, function) -> jax.Array:
            return jnp.where(outside, 0.0, function(hidden, head)).sum()

        def theirs(hidden, head) -> jax.Array:
            log_p = log_p_of(hidden, head, jnp.maximum(bias, -1e9))
            return jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0]

        mine = small(HIDDEN, HEAD, TOKENS, bias)[0]
        np.testing.assert_array_equal(mine == -np.inf, outside)
        grads = [
            jax.value_and_grad(loss, (0, 1))(HIDDEN, HEAD, function)
            for function in (lambda h, w: small(h, w, TOKENS, bias)[0], theirs)
        ]
        assert_close(*grads, atol=1e-5)

    @pytest.mark.parametrize("offset", [3e4, -3e4])
    def test_large_logits_lose_no_digit(self, offset: float) -> None:
        # Logits are multiples of 1/16, which float32 still holds beside the offset.
        bias = np.round(BIAS * 16).astype(np.float32) / 16
        hidden, head = jnp.zeros((1, 2)), jnp.zeros((V, 2))
        near, far = (
            small(hidden, head, jnp.array([3]), bias + shift) for shift in (0, np.float32(offset))
        )
        assert_close(far, near, atol=2e-6)

    def test_a_certain_token_has_no_entropy_and_no_gradient(self) -> None:
        bias = jnp.full(V, -3e4).at[5].set(3e4)
        hidden, head = jnp.ones((2, D)), jnp.zeros((V, D))
        tokens = jnp.array([5, 6])

        def loss(hidden, head, bias) -> tuple[jax.Array, tuple]:
            both = small(hidden, head, tokens, bias)
            return both[0][0] + both[1].sum(), both

        grads, both = jax.grad(loss, (0, 1, 2), has_aux=True)(hidden, head, bias)
        np.testing.assert_array_equal(both, [[0.0, -6e4], [0.0, 0.0]])
        for grad in grads:
            np.testing.assert_array_equal(grad, 0.0)


class TestKl:
    @each_setting
    def test_values_are_those_of_float64(self, chunk_size: int, temperature: float) -> None:
        mine = lm_head.kl(
            HIDDEN, HEAD, REF_HIDDEN, REF_HEAD, BIAS, REF_BIAS,
            chunk_size=chunk_size, temperature=temperature,
        )  # fmt: skip
        log_p, log_ref = (
            log_softmax(h.astype(np.float64) @ w.T.astype(np.float64) + b, temperature=temperature)
            for h, w, b in (POLICY, REFERENCE)
        )
        assert_close(mine, (np.exp(log_p) * (log_p - log_ref)).sum(-1), atol=1e-5)

    @each_setting
    def test_gradients_are_those_of_the_definition(
        self, chunk_size: int, temperature: float
    ) -> None:
        in_chunks = partial(chunked_kl, chunk_size=chunk_size)
        mine = jax.jit(jax.grad(in_chunks))(POLICY, REFERENCE, temperature)
        theirs = of_dense_kl(POLICY, REFERENCE, temperature)[1]
        assert_close(mine, theirs, atol=1e-5)

    def test_equal_heads_have_none_and_no_gradient(self) -> None:
        divergence = small_kl(HIDDEN, HEAD, HIDDEN, HEAD, BIAS, BIAS)
        np.testing.assert_array_equal(divergence, 0.0)
        for grad in of_chunked_kl(POLICY, POLICY)[1]:
            np.testing.assert_allclose(grad, 0.0, atol=1e-6)

    def test_the_reference_and_the_temperature_are_constants(self) -> None:
        grads = jax.grad(chunked_kl, (1, 2))(POLICY, REFERENCE, 0.7)
        for grad in jax.tree.leaves(grads):
            np.testing.assert_array_equal(grad, 0.0)

    @each_place
    def test_entries_outside_both_vocabularies_change_nothing(self, places: slice) -> None:
        (wide, kept), (wide_ref, _) = (widened(p, places) for p in (POLICY, REFERENCE))
        loss, grads = of_chunked_kl(wide, wide_ref, 0.7)
        clean_loss, clean_grads = of_dense_kl(POLICY, REFERENCE, 0.7)
        narrow = (grads[0], grads[1][kept], grads[2][kept])
        assert_close((loss, narrow), (clean_loss, clean_grads), atol=1e-5)
        for grad in grads[1:]:
            assert (np.delete(grad, kept, axis=0) == 0).all()

    @each_place
    def test_what_only_the_policy_excludes_adds_nothing(self, places: slice) -> None:
        wide, kept = widened(POLICY, places)
        head = RNG.normal(size=(V + 11, D_REF)).astype(np.float32)
        reference = (REF_HIDDEN, head, np.zeros(V + 11, np.float32))

        def theirs(policy: tuple) -> jax.Array:
            log_p, log_ref = log_p_of(*policy), log_p_of(*reference)[..., kept]
            return jnp.sum(WEIGHTS[0] * (jnp.exp(log_p) * (log_p - log_ref)).sum(-1))

        loss, grads = of_chunked_kl(wide, reference)
        narrow = (grads[0], grads[1][kept], grads[2][kept])
        assert_close((loss, narrow), jax.value_and_grad(theirs)(POLICY), atol=1e-5)

    @each_place
    def test_what_only_the_reference_excludes_makes_it_infinite(self, places: slice) -> None:
        wide, _ = widened(REFERENCE, places)
        policy = (HIDDEN, np.ones((V + 11, D), np.float32), np.zeros(V + 11, np.float32))
        (hidden, head, bias), (ref_hidden, ref_head, ref_bias) = policy, wide
        divergence = small_kl(hidden, head, ref_hidden, ref_head, bias, ref_bias)
        np.testing.assert_array_equal(divergence, np.inf)
        for grad in of_chunked_kl(policy, wide)[1]:
            np.testing.assert_array_equal(grad, 0.0)


LOSSES = {
    "log-probabilities and entropy": (chunked, POLICY),
    "divergence": (lambda *policy: chunked_kl(policy, REFERENCE), POLICY),
}
each_loss = pytest.mark.parametrize("loss, policy", LOSSES.values(), ids=LOSSES)


@each_loss
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_transformed_equals_eager(
    loss: Callable[..., jax.Array], policy: tuple, transform: Callable
) -> None:
    mine = jax.value_and_grad(transform(loss), (0, 1, 2))(*policy)
    assert_close(mine, jax.value_and_grad(loss, (0, 1, 2))(*policy), atol=1e-6)


@each_loss
def test_mapped_over_policies_and_scanned_over_them(
    loss: Callable[..., jax.Array], policy: tuple
) -> None:
    both = [policy, tuple(0.5 * np.flip(x, 0) for x in policy)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *both)
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *(run(*p) for p in both))
    assert_close(jax.vmap(run)(*stacked), expected, atol=1e-5)
    _, scanned = jax.lax.scan(lambda _, p: (None, run(*p)), None, stacked)
    assert_close(scanned, expected, atol=1e-5)


def test_batched_equals_vmapped_over_tokens() -> None:
    def one(hidden: jax.Array, token: jax.Array) -> jax.Array:
        return jnp.stack(small(hidden, HEAD, token, BIAS))

    rows = jax.vmap(jax.vmap(one))(HIDDEN, TOKENS)
    assert_close(jnp.stack(small(HIDDEN, HEAD, TOKENS, BIAS), -1), rows, atol=1e-6)
    rows = jax.vmap(lambda h, r: small_kl(h, HEAD, r, REF_HEAD))(HIDDEN, REF_HIDDEN)
    assert_close(small_kl(HIDDEN, HEAD, REF_HIDDEN, REF_HEAD), rows, atol=1e-6)


def test_temperatures_are_traced() -> None:
    temperatures = jnp.array([0.5, 1.0, 2.0])
    mine = jax.jit(jax.vmap(lambda t: chunked(*POLICY, t)))(temperatures)
    assert_close(mine, jnp.stack([dense(*POLICY, t) for t in temperatures]), atol=1e-5)


class TestHalfPrecision:
    HALVES = tuple(jnp.asarray(x, jnp.bfloat16) for x in (HIDDEN, HEAD))

    @pytest.mark.parametrize(
        "hidden, head",
        [HALVES, (HALVES[0], HEAD), (HIDDEN, HALVES[1])],
        ids=["both", "hidden", "head"],
    )
    def test_statistics_are_float32_of_exact_products(
        self, hidden: jax.Array, head: jax.Array
    ) -> None:
        both = small(hidden, head, TOKENS, BIAS)
        assert {x.dtype for x in both} == {jnp.dtype(jnp.float32)}
        log_p = log_softmax(np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T + BIAS)
        assert_close(both, (chosen(log_p, TOKENS), -(np.exp(log_p) * log_p).sum(-1)), atol=1e-5)

    def test_gradients_have_the_precision_of_their_arrays(self) -> None:
        mine = jax.grad(chunked, (0, 1, 2))(*self.HALVES, BIAS)
        exact = (x.astype(jnp.float32) for x in self.HALVES)
        theirs = jax.grad(dense, (0, 1, 2))(*exact, BIAS)
        assert [x.dtype for x in mine] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
        for one, other in zip(mine, theirs, strict=True):
            bound = 0.01 * np.abs(other).max()
            np.testing.assert_allclose(one.astype(jnp.float32), other, rtol=0.01, atol=bound)


class TestMemory:
    N, V, D = 512, 8192, 32
    SHAPES = (
        jax.ShapeDtypeStruct((8, 64, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((8, 64), jnp.int32),
    )

    def compiled(self, function: Callable[..., tuple[jax.Array, jax.Array]]) -> jax.stages.Compiled:
        def loss(hidden, head, tokens) -> jax.Array:
            both = function(hidden, head, tokens)
            return both[0].mean() + 0.01 * both[1].mean()

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*self.SHAPES).compile()

    def largest(self, program: jax.stages.Compiled) -> int:
        """Elements of the largest float array that the compiled program names."""
        shapes = re.findall(r"\bb?f\d+\[([\d,]+)\]", program.as_text())
        return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)

    @pytest.mark.parametrize("chunk_size", [256, 250])
    def test_the_logits_never_exist(self, chunk_size: int) -> None:
        program = self.compiled(partial(lm_head.token_log_probs_and_entropy, chunk_size=chunk_size))
        assert self.largest(program) < self.N * self.V
        assert program.memory_analysis().temp_size_in_bytes < self.N * self.V * 4 / 4

    def test_nor_do_they_for_the_divergence(self) -> None:
        def both(hidden, head, tokens) -> tuple[jax.Array, jax.Array]:
            divergence = lm_head.kl(hidden, head, 2 * hidden, head, chunk_size=256)
            return divergence, divergence

        program = self.compiled(both)
        assert self.largest(program) < self.N * self.V
        assert program.memory_analysis().temp_size_in_bytes < self.N * self.V * 4 / 4

    def test_without_pieces_they_do(self) -> None:
        program = self.compiled(
            lambda hidden, head, tokens: log_probs.token_log_probs_and_entropy(
                hidden @ head.T, tokens
            )
        )
        assert self.largest(program) >= self.N * self.V
        assert program.memory_analysis().temp_size_in_bytes >= self.N * self.V * 4


def test_shapes_that_do_not_fit_are_refused() -> None:
    for arrays in (
        (HIDDEN, HEAD, TOKENS[:, :-1]),
        (HIDDEN, HEAD, TOKENS.astype(np.float32)),
        (HIDDEN, HEAD.T, TOKENS),
        (HIDDEN, HEAD, TOKENS, BIAS[:-1]),
    ):
        with pytest.raises(AssertionError):
            lm_head.token_log_probs_and_entropy(*arrays)
    for arrays in (
        (HIDDEN, HEAD, REF_HIDDEN[:, :-1], REF_HEAD),
        (HIDDEN, HEAD, REF_HIDDEN, REF_HEAD[:-1]),
        (HIDDEN, HEAD, REF_HIDDEN, HEAD),
        (HIDDEN, HEAD, REF_HIDDEN, REF_HEAD, BIAS, REF_BIAS[:-1]),
    ):
        with pytest.raises(AssertionError):
            lm_head.kl(*arrays)
