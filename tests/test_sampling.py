"""Filters against a sort in NumPy; samplers against the probabilities they must reproduce."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import sampling

NEVER = -np.inf
LOGITS = np.random.default_rng(0).normal(0.0, 2.0, (5, 11)).astype(np.float32)
MOST_PROBABLE = np.arange(11) == LOGITS.argmax(-1)[:, None]

Filter = Callable[[jax.Array], jax.Array]
FILTERS: dict[str, Filter] = {
    "top-k": lambda logits: sampling.top_k(logits, k=3),
    "top-p": lambda logits: sampling.top_p(logits, p=0.7),
    "min-p": lambda logits: sampling.min_p(logits, p=0.1),
}
each_filter = pytest.mark.parametrize("filter_", FILTERS.values(), ids=FILTERS)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def kept(filtered: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(filtered))


class TestTopK:
    @pytest.mark.parametrize("k", [1, 3, 11, 50])
    def test_the_k_largest_stay(self, k: int) -> None:
        ranks = (-LOGITS).argsort(-1).argsort(-1)
        filtered = sampling.top_k(LOGITS, k=k)
        np.testing.assert_array_equal(filtered, np.where(ranks < k, LOGITS, NEVER))

    def test_all_that_tie_with_the_kth_stay(self) -> None:
        filtered = sampling.top_k(jnp.array([1.0, 3.0, 1.0, 0.0, 1.0]), k=2)
        np.testing.assert_array_equal(filtered, [1.0, 3.0, 1.0, NEVER, 1.0])

    def test_keeping_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="k=0"):
            sampling.top_k(LOGITS, k=0)


class TestTopP:
    @pytest.mark.parametrize("p", [0.05, 0.3, 0.7, 0.95])
    def test_the_smallest_set_of_that_mass_stays(self, p: float) -> None:
        probabilities = softmax(LOGITS)
        for row, mine in zip(probabilities, kept(sampling.top_p(LOGITS, p=p)), strict=True):
            order, mass, expected = np.argsort(-row), 0.0, np.zeros(row.shape, bool)
            for token in order:
                expected[token] = True
                mass += row[token]
                if mass >= p:
                    break
            np.testing.assert_array_equal(mine, expected)

    def test_the_token_that_crosses_stays_and_at_the_exact_boundary_the_next_goes(self) -> None:
        logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
        np.testing.assert_array_equal(kept(sampling.top_p(logits, p=0.6)), [1, 1, 0, 0])
        np.testing.assert_array_equal(kept(sampling.top_p(logits, p=0.5)), [1, 0, 0, 0])

    def test_all_that_tie_with_the_last_one_stay(self) -> None:
        logits = jnp.array([0.0, 2.0, 0.0, 0.0, -5.0])
        np.testing.assert_array_equal(kept(sampling.top_p(logits, p=0.75)), [1, 1, 1, 1, 0])

    def test_p_0_keeps_the_most_probable_and_p_1_keeps_all(self) -> None:
        np.testing.assert_array_equal(kept(sampling.top_p(LOGITS, p=0.0)), MOST_PROBABLE)
        wide = jnp.array([100.0, 0.0, -50.0])
        np.testing.assert_array_equal(sampling.top_p(wide, p=1.0), wide)


class TestMinP:
    @pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
    def test_the_bound_is_relative_to_the_most_probable(self, p: float) -> None:
        probabilities = softmax(LOGITS)
        expected = probabilities >= p * probabilities.max(-1, keepdims=True)
        np.testing.assert_array_equal(kept(sampling.min_p(LOGITS, p=p)), expected)

    def test_the_ends(self) -> None:
        assert kept(sampling.min_p(LOGITS, p=0.0)).all()
        np.testing.assert_array_equal(kept(sampling.min_p(LOGITS, p=1.0)), MOST_PROBABLE)


@each_filter
def test_a_filter_only_removes(filter_: Filter) -> None:
    filtered = filter_(LOGITS)
    np.testing.assert_array_equal(np.asarray(filtered)[kept(filtered)], LOGITS[kept(filtered)])
    assert not np.isnan(filtered).any()
    assert 0 < kept(filtered).sum() < LOGITS.size


@each_filter
def test_a_filter_respects_what_was_removed_before(filter_: Filter) -> None:
    smaller = filter_(LOGITS[:, :7])
    removed = np.concatenate([LOGITS[:, :7], np.full((5, 4), NEVER, np.float32)], axis=1)
    np.testing.assert_array_equal(filter_(removed)[:, :7], smaller)
    np.testing.assert_array_equal(filter_(removed)[:, 7:], removed[:, 7:])


@each_filter
def test_a_row_without_a_possible_token_stays_one(filter_: Filter) -> None:
    row = jnp.full(4, NEVER)
    np.testing.assert_array_equal(filter_(row), row)


@each_filter
def test_the_order_of_the_vocabulary_has_no_say(filter_: Filter) -> None:
    tied = np.round(LOGITS)
    order = np.random.default_rng(1).permutation(tied.shape[-1])
    np.testing.assert_array_equal(filter_(tied[:, order]), filter_(tied)[:, order])


@each_filter
def test_a_filter_is_the_same_under_jit_and_vmap(filter_: Filter) -> None:
    expected = filter_(LOGITS)
    np.testing.assert_array_equal(jax.jit(filter_)(LOGITS), expected)
    np.testing.assert_array_equal(jax.vmap(filter_)(LOGITS), expected)
    assert filter_(jnp.asarray(LOGITS, jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("filter_", [sampling.top_p, sampling.min_p])
def test_p_is_traced(filter_: Callable[..., jax.Array]) -> None:
    ps = jnp.array([0.1, 0.5])
    both = jax.jit(jax.vmap(lambda p: filter_(LOGITS, p=p)))(ps)
    for given, p in zip(both, ps, strict=True):
        np.testing.assert_array_equal(given, filter_(LOGITS, p=float(p)))


class TestCategorical:
    # Sizes below, at and above a whole number of blocks.
    @pytest.mark.parametrize("vocab_size", [1, 2, 3, 7, 16, 17, 100, 1000])
    def test_a_grid_of_draws_reproduces_the_probabilities(self, vocab_size: int) -> None:
        num_draws = 20_000
        logits = np.random.default_rng(vocab_size).normal(0, 2, vocab_size).astype(np.float32)
        uniform = (np.arange(num_draws, dtype=np.float32) + 0.5) / num_draws
        tokens = sampling.categorical(jnp.broadcast_to(logits, (num_draws, vocab_size)), uniform)
        assert tokens.dtype == jnp.int32
        frequencies = np.bincount(tokens, minlength=vocab_size) / num_draws
        np.testing.assert_allclose(frequencies, softmax(logits), atol=1.5 / num_draws)

    def test_a_draw_at_a_boundary_belongs_to_the_token_above_it(self) -> None:
        logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.25])), (4, 3))
        tokens = sampling.categorical(logits, jnp.array([0.0, 0.499, 0.5, 0.75]))
        np.testing.assert_array_equal(tokens, [0, 0, 1, 2])

    @pytest.mark.parametrize("possible", [[0], [4], [99], [3, 64], [15, 16, 98]])
    def test_impossible_tokens_are_never_drawn(self, possible: list[int]) -> None:
        logits = np.full(100, NEVER, np.float32)
        logits[possible] = np.arange(len(possible))
        below_1 = np.nextafter(np.float32(1), np.float32(0))
        uniform = np.append(np.linspace(0, 0.999, 200, dtype=np.float32), below_1)
        tokens = sampling.categorical(jnp.broadcast_to(logits, (201, 100)), uniform)
        assert set(np.asarray(tokens).tolist()) == set(possible)

    def test_rounding_never_leaves_the_possible_tokens(self) -> None:
        """Sums of many weights round: draws next to 1 and next to the steps must still hit."""
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 1, (64, 50257)).astype(np.float32)
        logits[rng.random(logits.shape) < 0.5] = NEVER
        logits[:, -300:] = NEVER
        draws = np.linspace(0, 1, 64, endpoint=False, dtype=np.float32)
        draws[-8:] = np.nextafter(np.float32(1), np.float32(0))
        tokens = np.asarray(sampling.categorical(logits, draws))
        assert np.isfinite(logits[np.arange(64), tokens]).all()
        cumulative = np.cumsum(softmax(logits), axis=-1)
        np.testing.assert_allclose(cumulative[np.arange(64), tokens], draws, atol=1e-3)

    def test_a_prefix_sum_that_rises_at_an_impossible_token_does_not_select_it(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def parallel(weights: jax.Array, axis: int) -> jax.Array:
            return jnp.add.accumulate(weights, axis) + 1e-6 * (weights == 0)

        logits = jnp.array([0.0, NEVER, 0.0, NEVER, 0.0, NEVER, 0.0, NEVER])
        monkeypatch.setattr(jnp, "cumsum", parallel)
        assert sampling.categorical(logits, jnp.float32(0.25)) == 2
        assert sampling.categorical(logits, jnp.float32(0.75)) == 6

    def test_a_draw_of_1_is_the_last_possible_token(self) -> None:
        logits = jnp.array([0.0, 1.0, 2.0, NEVER])
        assert sampling.categorical(logits, jnp.float32(1.0)) == 2

    def test_a_constant_added_to_logits_changes_nothing(self) -> None:
        uniform = np.linspace(0, 0.99, 5, dtype=np.float32)
        tokens = sampling.categorical(LOGITS, uniform)
        np.testing.assert_array_equal(sampling.categorical(LOGITS + 1024.0, uniform), tokens)

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        uniform = np.linspace(0.05, 0.95, 5, dtype=np.float32)
        tokens = sampling.categorical(LOGITS, uniform)
        np.testing.assert_array_equal(jax.vmap(sampling.categorical)(LOGITS, uniform), tokens)
        np.testing.assert_array_equal(jax.jit(sampling.categorical)(LOGITS, uniform), tokens)
        polluted = np.where(np.arange(5)[:, None] == 2, LOGITS, np.nan)
        assert sampling.categorical(polluted, uniform)[2] == tokens[2]

    def test_any_number_of_axes(self) -> None:
        logits, uniform = LOGITS[:4].reshape(2, 2, 11), np.linspace(0, 0.9, 4, dtype=np.float32)
        deep = sampling.categorical(logits, uniform.reshape(2, 2))
        np.testing.assert_array_equal(deep.reshape(4), sampling.categorical(LOGITS[:4], uniform))

    def test_a_row_without_a_possible_token_gives_0(self) -> None:
        assert sampling.categorical(jnp.full(6, NEVER), jnp.float32(0.7)) == 0

    def test_one_draw_a_row(self) -> None:
        with pytest.raises(AssertionError):
            sampling.categorical(LOGITS, np.zeros(4, np.float32))


class TestGreedy:
    def test_the_first_of_the_largest_whatever_the_draw(self) -> None:
        logits = jnp.array([[0.0, 2.0, 2.0], [3.0, NEVER, 1.0]])
        for uniform in (jnp.zeros(2), jnp.full(2, 0.9)):
            tokens = sampling.greedy(logits, uniform)
            np.testing.assert_array_equal(tokens, [1, 0])
            assert tokens.dtype == jnp.int32
        np.testing.assert_array_equal(jax.jit(jax.vmap(sampling.greedy))(logits, uniform), [1, 0])

    def test_one_draw_a_row(self) -> None:
        with pytest.raises(AssertionError):
            sampling.greedy(LOGITS, np.zeros(4, np.float32))


class TestResponseMask:
    RESPONSES = jnp.array([[5, 9, 2, 7], [2, 2, 3, 4], [6, 7, 8, 9], [1, 1, 1, 2]])
    EXPECTED = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)

    def test_true_up_to_and_including_the_first_end_token(self) -> None:
        mask = sampling.response_mask(self.RESPONSES, end_token=2)
        np.testing.assert_array_equal(mask, self.EXPECTED)
        assert mask.dtype == jnp.bool_

    def test_without_an_end_token_all_are_real(self) -> None:
        assert sampling.response_mask(self.RESPONSES, end_token=None).all()

    def test_the_same_under_jit_and_vmap(self) -> None:
        def rows(responses: jax.Array, end_token: jax.Array) -> jax.Array:
            return jax.vmap(lambda row: sampling.response_mask(row, end_token=end_token))(responses)

        np.testing.assert_array_equal(jax.jit(rows)(self.RESPONSES, 2), self.EXPECTED)

    def test_tokens_are_integers(self) -> None:
        with pytest.raises(AssertionError):
            sampling.response_mask(self.RESPONSES.astype(jnp.float32), end_token=2)
