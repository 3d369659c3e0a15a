"""Filters against a sort in NumPy; samplers against the probabilities they must reproduce."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import log_probs, sampling

NEVER = -np.inf
LOGITS = np.random.default_rng(0).normal(0.0, 2.0, (5, 11)).astype(np.float32)
MOST_PROBABLE = np.arange(11) == LOGITS.argmax(-1)[:, None]

# One program of each, whatever the number; op by op there would be dozens.
top_k = jax.jit(sampling.top_k, static_argnames="k")
top_p = jax.jit(sampling.top_p, static_argnames="keep_crossing")
min_p = jax.jit(sampling.min_p)
penalty_on = jax.jit(sampling.repetition_penalty)
categorical = jax.jit(sampling.categorical)

Filter = Callable[[jax.Array], jax.Array]
FILTERS: dict[str, Filter] = {
    "top-k": partial(top_k, k=3),
    "top-p": partial(top_p, p=0.7),
    "top-p without crossing": partial(top_p, p=0.7, keep_crossing=False),
    "min-p": partial(min_p, p=0.1),
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
        filtered = top_k(LOGITS, k=k)
        np.testing.assert_array_equal(filtered, np.where(ranks < k, LOGITS, NEVER))

    def test_all_that_tie_with_the_kth_stay(self) -> None:
        filtered = top_k(jnp.array([1.0, 3.0, 1.0, 0.0, 1.0]), k=2)
        np.testing.assert_array_equal(filtered, [1.0, 3.0, 1.0, NEVER, 1.0])

    def test_the_vocabulary_is_not_sorted(self) -> None:
        def program(filter_: Filter) -> str:
            return jax.jit(filter_).lower(jnp.zeros((4, 1000))).compile().as_text()

        assert " sort(" in program(lambda logits: sampling.top_p(logits, p=0.5))
        assert " sort(" not in program(lambda logits: sampling.top_k(logits, k=50))

    def test_keeping_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="k=0"):
            sampling.top_k(LOGITS, k=0)


class TestTopP:
    @pytest.mark.parametrize("p", [0.05, 0.3, 0.7, 0.95])
    def test_the_smallest_set_of_that_mass_stays(self, p: float) -> None:
        probabilities = softmax(LOGITS)
        for row, mine in zip(probabilities, kept(top_p(LOGITS, p=p)), strict=True):
            order, mass, expected = np.argsort(-row), 0.0, np.zeros(row.shape, bool)
            for token in order:
                expected[token] = True
                mass += row[token]
                if mass >= p:
                    break
            np.testing.assert_array_equal(mine, expected)

    def test_the_token_that_crosses_stays_and_at_the_exact_boundary_the_next_goes(self) -> None:
        logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
        np.testing.assert_array_equal(kept(top_p(logits, p=0.6)), [1, 1, 0, 0])
        np.testing.assert_array_equal(kept(top_p(logits, p=0.5)), [1, 0, 0, 0])

    def test_all_that_tie_with_the_last_one_stay(self) -> None:
        logits = jnp.array([0.0, 2.0, 0.0, 0.0, -5.0])
        np.testing.assert_array_equal(kept(top_p(logits, p=0.75)), [1, 1, 1, 1, 0])

    def test_p_0_keeps_the_most_probable_and_p_1_keeps_all(self) -> None:
        np.testing.assert_array_equal(kept(top_p(LOGITS, p=0.0)), MOST_PROBABLE)
        wide = jnp.array([100.0, 0.0, -50.0])
        np.testing.assert_array_equal(top_p(wide, p=1.0), wide)

    @pytest.mark.parametrize("p", [0.05, 0.3, 0.7, 0.95])
    def test_without_the_crossing_token_the_mass_is_at_most_p(self, p: float) -> None:
        removed = kept(top_p(LOGITS, p=p, keep_crossing=False))
        for row, mine in zip(softmax(LOGITS), removed, strict=True):
            order = np.argsort(-row)
            count = max(int((np.cumsum(row[order]) <= p).sum()), 1)
            np.testing.assert_array_equal(np.flatnonzero(mine), np.sort(order[:count]))

    def test_at_the_exact_boundary_nothing_crosses(self) -> None:
        logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
        for p, expected in ((0.6, [1, 0, 0, 0]), (0.75, [1, 1, 0, 0]), (0.8, [1, 1, 0, 0])):
            both = top_p(logits, p=p, keep_crossing=False)
            np.testing.assert_array_equal(kept(both), expected)


class TestMinP:
    @pytest.mark.parametrize("p", [0.02, 0.1, 0.5])
    def test_the_bound_is_relative_to_the_most_probable(self, p: float) -> None:
        probabilities = softmax(LOGITS)
        expected = probabilities >= p * probabilities.max(-1, keepdims=True)
        np.testing.assert_array_equal(kept(min_p(LOGITS, p=p)), expected)

    def test_the_ends(self) -> None:
        assert kept(min_p(LOGITS, p=0.0)).all()
        np.testing.assert_array_equal(kept(min_p(LOGITS, p=1.0)), MOST_PROBABLE)


class TestTemper:
    def test_logits_are_divided(self) -> None:
        np.testing.assert_allclose(
            sampling.temper(LOGITS, temperature=0.7), LOGITS / 0.7, rtol=1e-6
        )

    def test_at_0_the_most_probable_stay(self) -> None:
        logits = jnp.array([[1.0, 3.0, 3.0, NEVER], [NEVER, NEVER, NEVER, NEVER]])
        cold = sampling.temper(logits, temperature=0.0)
        np.testing.assert_array_equal(cold, [[NEVER, 3.0, 3.0, NEVER], [NEVER] * 4])

    def test_each_row_may_have_its_own(self) -> None:
        degrees = np.float32([[0.5], [1.0], [2.0], [4.0], [8.0]])
        given = jax.jit(lambda t: sampling.temper(LOGITS, temperature=t))(degrees)
        np.testing.assert_array_equal(given, LOGITS / degrees)


class TestRepetitionPenalty:
    def test_positive_logits_are_divided_and_negative_ones_multiplied(self) -> None:
        penalised = penalty_on(
            jnp.array([[3.0, -3.0, 0.0, 1.0, -1.0, NEVER], [3.0, -3.0, 0.0, 1.0, -1.0, 2.0]]),
            jnp.array([[0, 1, 2, 5, 0], [4, 4, 0, 1, 2]]),
            jnp.array([[True] * 5, [True, True, False, False, False]]),
            penalty=1.5,
        )
        expected = [[2.0, -4.5, 0.0, 1.0, -1.0, NEVER], [3.0, -3.0, 0.0, 1.0, -1.5, 2.0]]
        np.testing.assert_array_equal(penalised, expected)

    def test_what_does_not_count_may_be_anything(self) -> None:
        tokens = jnp.array([2, -1, -100, 11, 2**31 - 1])
        penalised = penalty_on(LOGITS[0], tokens, jnp.arange(5) < 1, penalty=2.0)
        np.testing.assert_array_equal(np.flatnonzero(penalised != LOGITS[0]), [2])

    def test_of_a_text_without_tokens_nothing_changes(self) -> None:
        tokens = jnp.zeros((5, 0), jnp.int32)
        penalised = penalty_on(LOGITS, tokens, tokens > 0, penalty=2.0)
        np.testing.assert_array_equal(penalised, LOGITS)

    def test_any_number_of_axes_under_jit_and_vmap(self) -> None:
        tokens = np.random.default_rng(2).integers(0, 11, (5, 4))
        penalty = partial(sampling.repetition_penalty, penalty=1.3)
        rows = [penalty(*row) for row in zip(LOGITS, tokens, tokens > 3, strict=True)]
        np.testing.assert_array_equal(jax.jit(penalty)(LOGITS, tokens, tokens > 3), np.stack(rows))
        np.testing.assert_array_equal(jax.vmap(penalty)(LOGITS, tokens, tokens > 3), np.stack(rows))

    def test_arrays_that_do_not_fit_are_refused(self) -> None:
        tokens = np.zeros((5, 4), np.int32)
        for wrong in ((tokens[:4], tokens[:4] > 0), (tokens, tokens[:, 1:] > 0), (tokens, tokens)):
            with pytest.raises(AssertionError):
                sampling.repetition_penalty(LOGITS, *wrong, penalty=2.0)


class TestForbidEnd:
    def test_until_there_are_enough_tokens(self) -> None:
        for step, expected in ((0, NEVER), (2, NEVER), (3, LOGITS[0, 7]), (9, LOGITS[0, 7])):
            given = sampling.forbid_end(LOGITS, step, end_token=7, min_length=3)
            assert given[0, 7] == expected
            np.testing.assert_array_equal(np.delete(given, 7, 1), np.delete(LOGITS, 7, 1))

    def test_rows_of_different_lengths_and_several_end_tokens(self) -> None:
        step = jnp.array([0, 4, 1, 2, 3])
        given = jax.jit(sampling.forbid_end)(LOGITS, step, end_token=(0, 10), min_length=3)
        removed = np.zeros(LOGITS.shape, bool)
        removed[np.ix_([0, 2, 3], [0, 10])] = True
        np.testing.assert_array_equal(given, np.where(removed, NEVER, LOGITS))


class TestChain:
    WARM = partial(sampling.temper, temperature=2.0)
    NUCLEUS = partial(top_p, p=0.7)

    def test_from_left_to_right(self) -> None:
        warm_first = sampling.chain(self.WARM, self.NUCLEUS)(LOGITS)
        np.testing.assert_array_equal(warm_first, self.NUCLEUS(LOGITS / 2))
        warm_last = sampling.chain(self.NUCLEUS, self.WARM)(LOGITS)
        np.testing.assert_array_equal(warm_last, self.NUCLEUS(LOGITS) / 2)
        assert kept(warm_first).sum() > kept(warm_last).sum()

    def test_the_second_sees_the_distribution_that_the_first_left(self) -> None:
        logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
        both = sampling.chain(partial(top_k, k=2), partial(top_p, p=0.5))
        np.testing.assert_array_equal(kept(top_p(logits, p=0.5)), [1, 1, 0, 0])
        np.testing.assert_array_equal(kept(both(logits)), [1, 0, 0, 0])

    def test_of_nothing_changes_nothing(self) -> None:
        np.testing.assert_array_equal(sampling.chain()(LOGITS), LOGITS)

    def test_as_a_sampler_in_a_compiled_loop(self) -> None:
        filter_ = sampling.chain(self.WARM, partial(top_k, k=2))

        @jax.jit
        def draw(uniforms: jax.Array) -> jax.Array:
            return jax.lax.map(lambda u: categorical(filter_(LOGITS), u), uniforms)

        uniforms = np.linspace(0, 0.99, 50, dtype=np.float32)
        tokens = draw(np.broadcast_to(uniforms[:, None], (50, 5)))
        for row, drawn in zip(LOGITS, tokens.T, strict=True):
            assert set(np.asarray(drawn).tolist()) == set(np.argsort(-row)[:2].tolist())


class TestBehaviour:
    """The log-probability of a sampled token, before and after the filters."""

    LOGITS = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    FILTER = staticmethod(sampling.chain(partial(top_p, p=0.6)))

    def test_of_what_a_filter_left_the_rest_of_the_mass_is_shared_out(self) -> None:
        token = jnp.array([1])
        own = log_probs.token_log_probs(self.LOGITS, token)
        behaviour = log_probs.token_log_probs(self.FILTER(self.LOGITS), token)
        np.testing.assert_allclose(np.exp([own[0], behaviour[0]]), [0.3, 0.3 / 0.8], rtol=1e-6)

    def test_a_token_that_was_removed_is_impossible(self) -> None:
        behaviour = log_probs.token_log_probs(self.FILTER(self.LOGITS), jnp.array([2]))
        assert behaviour[0] == NEVER


@each_filter
def test_the_gradient_of_a_filtered_log_probability_is_finite(filter_: Filter) -> None:
    """Also of the numbers that change it, and where what they change was removed before."""
    tokens, least = LOGITS.argmax(-1), LOGITS.argmin(-1)
    removed = np.where(np.arange(11) == least[:, None], NEVER, LOGITS)
    text = np.stack([tokens, least], 1)

    def total(logits: jax.Array, degrees: jax.Array, penalty: jax.Array) -> jax.Array:
        penalise = partial(penalty_on, tokens=text, mask=text > 2, penalty=penalty)
        warm = partial(sampling.temper, temperature=degrees)
        return log_probs.token_log_probs(
            sampling.chain(penalise, warm, filter_)(logits), tokens
        ).sum()

    grad, *others = jax.grad(total, (0, 1, 2))(removed, 0.7, 1.2)
    assert np.isfinite(grad).all() and np.isfinite(others).all() and np.all(others)
    assert np.asarray(grad).any() and (grad[np.isneginf(removed)] == 0).all()


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
    with jax.disable_jit():
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
        tokens = categorical(jnp.broadcast_to(logits, (num_draws, vocab_size)), uniform)
        assert tokens.dtype == jnp.int32
        frequencies = np.bincount(tokens, minlength=vocab_size) / num_draws
        np.testing.assert_allclose(frequencies, softmax(logits), atol=1.5 / num_draws)

    def test_a_draw_at_a_boundary_belongs_to_the_token_above_it(self) -> None:
        logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.25, 0.25])), (4, 3))
        tokens = categorical(logits, jnp.array([0.0, 0.499, 0.5, 0.75]))
        np.testing.assert_array_equal(tokens, [0, 0, 1, 2])

    @pytest.mark.parametrize("possible", [[0], [4], [99], [3, 64], [15, 16, 98]])
    def test_impossible_tokens_are_never_drawn(self, possible: list[int]) -> None:
        logits = np.full(100, NEVER, np.float32)
        logits[possible] = np.arange(len(possible))
        below_1 = np.nextafter(np.float32(1), np.float32(0))
        uniform = np.append(np.linspace(0, 0.999, 200, dtype=np.float32), below_1)
        tokens = categorical(jnp.broadcast_to(logits, (201, 100)), uniform)
        assert set(np.asarray(tokens).tolist()) == set(possible)

    def test_rounding_never_leaves_the_possible_tokens(self) -> None:
        """Sums of many weights round: draws next to 1 and next to the steps must still hit."""
        rng = np.random.default_rng(0)
        logits = rng.normal(0, 1, (64, 50257)).astype(np.float32)
        logits[rng.random(logits.shape) < 0.5] = NEVER
        logits[:, -300:] = NEVER
        draws = np.linspace(0, 1, 64, endpoint=False, dtype=np.float32)
        draws[-8:] = np.nextafter(np.float32(1), np.float32(0))
        tokens = np.asarray(categorical(logits, draws))
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
        assert categorical(logits, jnp.float32(1.0)) == 2

    def test_a_constant_added_to_logits_changes_nothing(self) -> None:
        uniform = np.linspace(0, 0.99, 5, dtype=np.float32)
        tokens = categorical(LOGITS, uniform)
        np.testing.assert_array_equal(categorical(LOGITS + 1024.0, uniform), tokens)

    def test_a_row_does_not_depend_on_the_others(self) -> None:
        uniform = np.linspace(0.05, 0.95, 5, dtype=np.float32)
        tokens = categorical(LOGITS, uniform)
        np.testing.assert_array_equal(jax.vmap(categorical)(LOGITS, uniform), tokens)
        np.testing.assert_array_equal(sampling.categorical(LOGITS, uniform), tokens)
        polluted = np.where(np.arange(5)[:, None] == 2, LOGITS, np.nan)
        assert categorical(polluted, uniform)[2] == tokens[2]

    def test_any_number_of_axes(self) -> None:
        logits, uniform = LOGITS[:4].reshape(2, 2, 11), np.linspace(0, 0.9, 4, dtype=np.float32)
        deep = categorical(logits, uniform.reshape(2, 2))
        np.testing.assert_array_equal(deep.reshape(4), categorical(LOGITS[:4], uniform))

    def test_a_row_without_a_possible_token_gives_0(self) -> None:
        assert categorical(jnp.full(6, NEVER), jnp.float32(0.7)) == 0

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

    def test_any_of_several_end_tokens_ends(self) -> None:
        mask = sampling.response_mask(self.RESPONSES, end_token=(2, 7))
        expected = [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
        np.testing.assert_array_equal(mask, expected)

    def test_without_an_end_token_all_are_real(self) -> None:
        assert sampling.response_mask(self.RESPONSES, end_token=None).all()

    def test_the_same_under_jit_and_vmap(self) -> None:
        def rows(responses: jax.Array, end_token: jax.Array) -> jax.Array:
            return jax.vmap(lambda row: sampling.response_mask(row, end_token=end_token))(responses)

        np.testing.assert_array_equal(jax.jit(rows)(self.RESPONSES, 2), self.EXPECTED)

    def test_tokens_are_integers(self) -> None:
        with pytest.raises(AssertionError):
            sampling.response_mask(self.RESPONSES.astype(jnp.float32), end_token=2)
