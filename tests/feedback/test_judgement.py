"""What a judge's answers mean: by hand, and against a judge that is computed row by row."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_models import bigram, left_padded, log_softmax, numbers, recurrent

from rlhfjax import models
from rlhfjax.algorithms import ppo
from rlhfjax.feedback import judgement
from rlhfjax.feedback.templates import Question, Template, select_question
from rlhfjax.types import Rollout

VOCAB = 12
JUDGE = recurrent(VOCAB, 5)
PARAMS = JUDGE.init(jax.random.key(1))
ANSWERS = jax.jit(partial(judgement.answer_log_probs, JUDGE))
COMPARE = jax.jit(partial(judgement.compare, JUDGE))
INF = float("inf")


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def template(names: tuple[str, ...], *pieces: np.ndarray) -> Template:
    return Template(pieces, tuple(np.ones(piece.shape, bool) for piece in pieces), names)


def question(names: tuple[str, ...], *pieces: np.ndarray, answers: list[list[int]]) -> Question:
    longest = max(map(len, answers))
    padded = [[*answer, *[0] * (longest - len(answer))] for answer in answers]
    mask = [[i < len(answer) for i in range(longest)] for answer in answers]
    return Question(template(names, *pieces), ids(*map(tuple, padded)), np.array(mask))


WHICH = question(("first", "second"), ids(7), ids(8, 9), ids(10), answers=[[3], [4, 5]])
WHETHER = question(("response",), ids(7), ids(11), answers=[[1], [2]])


def log_prob(text: list[int], answer: list[int]) -> float:
    """log p(answer | text) of the recurrent judge, token by token in NumPy."""
    weights = {name: np.asarray(x, np.float64) for name, x in numbers(PARAMS).items()}
    state, total = np.zeros(5), 0.0
    for place, token in enumerate([*text, *answer]):
        if place >= len(text):
            total += log_softmax(state @ weights["head"])[token]
        state = np.tanh(weights["embedding"][token] + state @ weights["mixing"])
    return total


class TestLogOdds:
    def test_by_hand(self) -> None:
        log_probs = jnp.log(jnp.array([[0.2, 0.1], [0.02, 0.06]]))
        found = judgement.log_odds(log_probs)
        np.testing.assert_allclose(found, np.log([2.0, 1 / 3]), rtol=1e-5)
        three = jnp.log(jnp.array([0.2, 0.1, 0.3]))
        np.testing.assert_allclose(judgement.log_odds(three, wanted=2), 0.0, atol=1e-6)

    @pytest.mark.parametrize(
        ("log_probs", "prob"), [((-INF, -1.0), 0.0), ((-1.0, -INF), 1.0), ((-INF, -INF), 0.5)]
    )
    def test_an_answer_that_cannot_be_given(self, log_probs, prob) -> None:
        def of(x):
            return jax.nn.sigmoid(judgement.log_odds(x))

        value, slope = jax.value_and_grad(of)(jnp.array(log_probs))
        assert float(value) == prob
        assert np.isfinite(judgement.log_odds(jnp.array(log_probs)))
        assert np.isfinite(slope).all()

    def test_is_float32(self) -> None:
        assert judgement.log_odds(jnp.zeros((3, 2), jnp.bfloat16)).dtype == jnp.float32


class TestBothOrders:
    def test_by_hand(self) -> None:
        given, swapped = jnp.log(jnp.array([4.0])), jnp.log(jnp.array([1.0]))
        # 4:1 and then 1:1 for what stands first, which is the second response.
        np.testing.assert_allclose(judgement.mean_of_probs(given, swapped), (0.8 + 0.5) / 2)
        # √(4 · 1) : 1.
        np.testing.assert_allclose(judgement.mean_of_log_odds(given, swapped), 2 / 3, rtol=1e-6)

    @pytest.mark.parametrize("mean", [judgement.mean_of_probs, judgement.mean_of_log_odds])
    def test_what_only_likes_the_first_place_says_nothing(self, mean) -> None:
        always = jnp.array([0.3, 5.0, 60.0, -2.0])
        np.testing.assert_allclose(mean(always, always), 0.5, atol=1e-6)

    @pytest.mark.parametrize("mean", [judgement.mean_of_probs, judgement.mean_of_log_odds])
    def test_a_swapped_pair_has_the_other_probability(self, mean) -> None:
        given, swapped = jax.random.normal(jax.random.key(0), (2, 50)) * 10
        np.testing.assert_allclose(mean(given, swapped) + mean(swapped, given), 1.0, atol=1e-6)

    def test_a_sway_that_adds_to_the_log_odds_cancels(self) -> None:
        opinion, sway = np.linspace(-3, 3, 7), 1.7
        given, swapped = jnp.asarray(opinion + sway), jnp.asarray(-opinion + sway)
        exact = 1 / (1 + np.exp(-opinion))
        np.testing.assert_allclose(judgement.mean_of_log_odds(given, swapped), exact, rtol=1e-5)
        timid = judgement.mean_of_probs(given, swapped)
        assert (np.abs(timid - 0.5) < np.abs(exact - 0.5))[opinion != 0].all()

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(AssertionError):
            judgement.mean_of_probs(jnp.zeros(3), jnp.zeros((3, 1)))


class TestPositionBias:
    def test_by_hand(self) -> None:
        given, swapped = jnp.array([0.9, 0.7, 0.2, 0.6]), jnp.array([0.9, 0.3, 0.4, 0.1])
        # Sway: 0.8, 0.0, -0.4, -0.3; only of the first and the third the verdict is another.
        found = judgement.position_bias(given, swapped)
        np.testing.assert_allclose(found["bias"], 0.1 / 8, atol=1e-7)
        np.testing.assert_allclose(found["distance"], 1.5 / 4, rtol=1e-6)
        assert found["flips"] == 0.5

    def test_a_tie_is_no_flip(self) -> None:
        given, swapped = jnp.array([0.5, 0.5, 0.4, 0.2]), jnp.array([0.5, 0.1, 0.5, 0.1])
        assert judgement.position_bias(given, swapped)["flips"] == 0.25

    def test_rows_that_are_none(self) -> None:
        given, swapped = jnp.array([0.9, jnp.nan]), jnp.array([0.7, jnp.inf])
        found = judgement.position_bias(given, swapped, jnp.array([True, False]))
        np.testing.assert_allclose(found["bias"], 0.3, rtol=1e-6)
        none = judgement.position_bias(given, swapped, jnp.zeros(2, bool))
        assert {name: float(x) for name, x in none.items()} == dict.fromkeys(found, 0.0)


class TestPrinciples:
    def test_an_average_by_hand(self) -> None:
        probs = jnp.array([[0.2, 0.6, 0.4], [1.0, 0.0, jnp.nan]])
        np.testing.assert_allclose(judgement.over_principles(probs[:1]), [0.4], rtol=1e-6)
        found = judgement.over_principles(probs, jnp.array([3.0, 1.0, 0.0]))
        np.testing.assert_allclose(found, [0.3, 0.75], rtol=1e-6)

    def test_where_none_applies_nobody_has_said_anything(self) -> None:
        """0 would say that the second response is better for certain."""
        probs, weights = jnp.array([[0.2, 0.6], [1.0, 0.5]]), jnp.array([[0.0, 0.0], [0.0, 2.0]])
        found, slope = jax.value_and_grad(
            lambda x: jnp.nansum(judgement.over_principles(x, weights))
        )(probs)
        np.testing.assert_array_equal(judgement.over_principles(probs, weights), [np.nan, 0.5])
        assert found == 0.5 and slope.tolist() == [[0.0, 0.0], [0.0, 1.0]]

    def test_one_for_each_pair(self) -> None:
        weights = [3.0, 0.0, 1.0]
        drawn = judgement.draw_principles(jax.random.key(0), 2000, weights)
        shares = np.bincount(drawn, minlength=3) / 2000
        assert shares[1] == 0 and abs(shares[0] - 0.75) < 0.04
        few = judgement.draw_principles(jax.random.key(0), 20, weights)
        np.testing.assert_array_equal(few, drawn[:20])


class TestAnswers:
    def test_each_is_the_sum_of_its_tokens(self) -> None:
        tokens, mask = left_padded(np.random.default_rng(0), [1, 4, 6], 6, 0, VOCAB)
        answers, answer_mask = ids((3, 0), (4, 5)), np.array([[True, False], [True, True]])
        found = ANSWERS(PARAMS, tokens, mask, answers, answer_mask)
        expected = [
            [log_prob(row[-n:].tolist(), answer) for answer in ([3], [4, 5])]
            for row, n in zip(tokens, [1, 4, 6], strict=True)
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        single = ANSWERS(PARAMS, tokens, mask, ids((3,), (4,)), np.ones((2, 1), bool))
        np.testing.assert_allclose(single[:, 0], found[:, 0], rtol=1e-5)

    @pytest.mark.parametrize("size", [1, 2])
    def test_each_row_may_have_its_own(self, size: int) -> None:
        tokens, mask = left_padded(np.random.default_rng(0), [2, 3], 3, 0, VOCAB)
        answers = np.arange(4 * size, dtype=np.int32).reshape(2, 2, size)
        every = np.ones(answers.shape, bool)
        found = ANSWERS(PARAMS, tokens, mask, answers, every)
        for row, n in ((0, 2), (1, 3)):
            expected = [log_prob(tokens[row, -n:].tolist(), list(each)) for each in answers[row]]
            np.testing.assert_allclose(found[row], expected, rtol=1e-5)

    def test_nothing_under_a_mask_counts(self) -> None:
        tokens, mask = left_padded(np.random.default_rng(0), [2], 3, 0, VOCAB)
        answers, answer_mask = ids((3, 0), (4, 5)), np.array([[True, False], [True, True]])
        found = ANSWERS(PARAMS, tokens, mask, answers, answer_mask)
        tokens[0, 0], answers[0, 1] = 9, 999
        again = ANSWERS(PARAMS, tokens, mask, answers, answer_mask)
        np.testing.assert_array_equal(found, again)

    def test_texts_that_are_too_long_are_refused(self) -> None:
        short = bigram(VOCAB, context_length=4)
        tokens, mask = np.zeros((1, 4), np.int32), np.ones((1, 4), bool)
        one = (ids((1,), (2,)), np.ones((2, 1), bool))
        params = short.init(jax.random.key(0))
        judgement.answer_log_probs(short, params, tokens, mask, *one)
        with pytest.raises(ValueError, match="context of 4 cannot read texts of 4 tokens"):
            two = (ids((1, 1), (2, 2)), np.ones((2, 2), bool))
            judgement.answer_log_probs(short, params, tokens, mask, *two)


class TestAsking:
    def test_both_orders_row_by_row(self) -> None:
        rng = np.random.default_rng(3)
        first, second = (left_padded(rng, lengths, 4, 0, VOCAB) for lengths in ([1, 4], [3, 2]))
        given, swapped = COMPARE(PARAMS, WHICH, first, second)
        for row in range(2):
            one, other = (tokens[row][mask[row]].tolist() for tokens, mask in (first, second))
            for found, (a, b) in ((given, (one, other)), (swapped, (other, one))):
                text = [7, *a, 8, 9, *b, 10]
                expected = log_prob(text, [3]) - log_prob(text, [4, 5])
                np.testing.assert_allclose(found[row], expected, rtol=1e-4)

    def test_a_principle_of_its_own_for_each_row(self) -> None:
        rng = np.random.default_rng(3)
        first, second = (left_padded(rng, lengths, 4, 0, VOCAB) for lengths in ([1, 4], [3, 2]))
        other = question(("first", "second"), ids(), ids(1), ids(2, 3, 4), answers=[[6], [5]])
        alone = [COMPARE(PARAMS, q, first, second) for q in (WHICH, other)]
        index = jnp.array([1, 0])
        drawn = select_question([WHICH, other], index)
        found = COMPARE(PARAMS, drawn, first, second)
        for order in range(2):
            expected = [alone[1][order][0], alone[0][order][1]]
            np.testing.assert_allclose(found[order], expected, rtol=1e-5)

    @pytest.mark.parametrize("common", ["answers", "text"])
    def test_rows_may_have_the_text_or_the_answers_in_common(self, common: str) -> None:
        rng = np.random.default_rng(3)
        first, second = (left_padded(rng, lengths, 4, 0, VOCAB) for lengths in ([1, 4], [3, 2]))
        other = question(("first", "second"), ids(), ids(1), ids(2, 3, 4), answers=[[6], [5]])
        drawn = select_question([other, WHICH], jnp.array([0, 1]))
        texts = [((), (1,), (2, 3, 4)), ((7,), (8, 9), (10,))]
        answers = [([6], [5]), ([3], [4, 5])]
        if common == "answers":
            drawn, answers[0] = replace(drawn, answers=WHICH.answers, mask=WHICH.mask), answers[1]
        else:
            drawn, texts[0] = replace(drawn, template=WHICH.template), texts[1]
        found = COMPARE(PARAMS, drawn, first, second)
        for row, ((begin, between, end), (wanted, unwanted)) in enumerate(
            zip(texts, answers, strict=True)
        ):
            a, b = (tokens[row][mask[row]].tolist() for tokens, mask in (first, second))
            for odds, (one, two) in zip(found, ((a, b), (b, a)), strict=True):
                text = [*begin, *one, *between, *two, *end]
                expected = log_prob(text, wanted) - log_prob(text, unwanted)
                np.testing.assert_allclose(odds[row], expected, rtol=1e-4)

    def test_a_judge_is_a_reward_within_the_step(self) -> None:
        """A policy that samples one token: the judge's log-odds of yes are the scores."""
        policy = bigram(VOCAB)
        reward = judgement.as_reward(JUDGE, policy, WHETHER, drop=(0,))
        tokens = ids((0, 5, 6, 3), (0, 4, 0, 0))
        mask = np.array([[True, True, True, True], [False, True, True, False]])
        samples = Rollout(jnp.array(tokens), jnp.array(mask), jnp.array(mask[:, 2:]), jnp.zeros(()))
        expected = [log_prob(text, [1]) - log_prob(text, [2]) for text in ([7, 6, 3, 11], [7, 11])]
        np.testing.assert_allclose(jax.jit(reward)(PARAMS, samples), expected, rtol=1e-4)
        value = models.scalar_model(policy, models.linear_head(VOCAB, stddev=0.0))
        config = ppo.Config(num_tokens=1, pad_token=0, num_epochs=1, num_minibatches=1)
        actor, optimizer = models.separate_trunks(policy, value), optax.sgd(0.0)
        step = ppo.make_step(actor, reward, optimizer, config)
        params = actor.init(jax.random.key(0))
        # After the token 1 this policy always says 5.
        params["policy"]["table"] = params["policy"]["table"].at[1, 5].set(1e4)
        state = ppo.init(params, optimizer, jax.random.key(0), kl_coef=0.0)
        prompts = jnp.ones((2, 1), jnp.int32)
        hyper = ppo.Hyperparameters()
        _, metrics = step(state, prompts, prompts > 0, params["policy"], PARAMS, hyper)
        said = log_prob([7, 5, 11], [1]) - log_prob([7, 5, 11], [2])
        np.testing.assert_allclose(metrics["objective/scores"], said, rtol=1e-4)

    def test_another_vocabulary_is_refused(self) -> None:
        with pytest.raises(ValueError, match="vocabulary of 13 tokens and the judge one of 12"):
            judgement.as_reward(JUDGE, bigram(13), WHETHER, drop=())

    @pytest.mark.parametrize(
        ("pieces", "answers", "message"),
        [
            ((ids(7), ids(12)), [[1], [2]], "token 12 of the question"),
            ((ids(-1), ids(7)), [[1], [2]], "token -1 of the question"),
            ((ids(7), ids(8)), [[1, 3], [99]], "token 99 of the answers"),
        ],
    )
    def test_a_token_beyond_the_vocabulary_is_refused(self, pieces, answers, message) -> None:
        asked = question(("response",), *pieces, answers=answers)
        field = np.zeros((1, 2), np.int32), np.ones((1, 2), bool)
        with pytest.raises(ValueError, match=f"{message} is not in the judge's vocabulary of 12"):
            judgement.ask(JUDGE, PARAMS, asked, {"response": field})
        with pytest.raises(ValueError, match=message):
            judgement.as_reward(JUDGE, bigram(VOCAB), asked, drop=())

    def test_under_the_mask_a_token_does_not_matter(self) -> None:
        asked = question(("response",), ids(7), ids(8), answers=[[1], [2, 3]])
        asked.answers[0, 1] = 99
        judgement.as_reward(JUDGE, bigram(VOCAB), asked, drop=())


def test_a_judge_can_be_taught() -> None:
    """Gradients reach its parameters, and the right answer becomes the more probable one."""
    tokens, mask = left_padded(np.random.default_rng(0), [2, 3], 3, 0, VOCAB)
    answers, every = ids((1,), (2,)), np.ones((2, 1), bool)

    @jax.jit
    def slope(params):
        def loss(params):
            found = judgement.answer_log_probs(JUDGE, params, tokens, mask, answers, every)
            return -judgement.log_odds(found).mean()

        return jax.value_and_grad(loss)(params)

    before, grads = slope(PARAMS)
    stepped = jax.tree.map(lambda x, g: x - 0.01 * g, PARAMS, grads)
    assert slope(stepped)[0] < before
