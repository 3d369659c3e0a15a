"""What a judge thinks: from the log-probabilities of its answers to preferences.

A judge is any `LanguageModel`. It is asked a `Question`, and the log-odds of the first answer
against the others are its judgement: of one response (is it so? yes, no), or of two (which one is
better? the first, the second). Which of two stands first sways a judge, so it is asked in both
orders, and one of `mean_of_probs` and `mean_of_log_odds` takes the sway out again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.feedback import templates
from rlhfjax.feedback.templates import Field, Question
from rlhfjax.log_probs import response_log_probs
from rlhfjax.losses import reward
from rlhfjax.types import LanguageModel, Params, Rollout

LEAST = -1e30
"""Stands for the logarithm of 0: the difference of two infinities would be no number."""


def log_odds(log_probs: Array, *, wanted: int | Array = 0) -> Array:
    """log p(wanted) - log Σ p(other answers).

    It does not matter how much of the probability other texts than the answers have.

    Args:
      log_probs: [..., K], K ≥ 2; -inf for an answer that cannot be given.
      wanted: which answer.

    Returns:
      [...] float32, finite where no log-probability is NaN; 0 if neither of two can be given.

    Raises:
      AssertionError: fewer than two answers.

    References:
      Kadavath et al. 2022, Language Models (Mostly) Know What They Know (P(True)).
    """
    return reward.log_odds(jnp.maximum(jnp.asarray(log_probs, jnp.float32), LEAST), wanted=wanted)


def mean_of_probs(given: Array, swapped: Array) -> Array:
    """p = ½·(σ(given) + σ(-swapped)): the two verdicts count alike, however sure either is.

    A judge that always prefers what stands first gives ½. p and that of the swapped pair sum to 1.

    Args:
      given: [...], log-odds that the first response is better, as it stands first.
      swapped: [...], log-odds that the second one is better, as it stands first.

    Returns:
      [...] float32, the probability that the first response is better.

    Raises:
      AssertionError: shapes differ.

    References:
      Lee et al. 2023, RLAIF: Scaling Reinforcement Learning from Human Feedback with AI Feedback.
    """
    chex.assert_equal_shape([given, swapped])
    given, swapped = given.astype(jnp.float32), swapped.astype(jnp.float32)
    return 0.5 * (jax.nn.sigmoid(given) + jax.nn.sigmoid(-swapped))


def mean_of_log_odds(given: Array, swapped: Array) -> Array:
    """p = σ(½·(given - swapped)): a sway b that adds to the log-odds cancels to nothing.

    With given = s + b and swapped = -s + b this is σ(s), where `mean_of_probs` is nearer to ½. A
    judge that is very sure in one order outweighs itself in the other.

    Args:
      given: [...], log-odds that the first response is better, as it stands first.
      swapped: [...], log-odds that the second one is better, as it stands first.

    Returns:
      [...] float32, the probability that the first response is better.

    Raises:
      AssertionError: shapes differ.
    """
    chex.assert_equal_shape([given, swapped])
    return jax.nn.sigmoid(0.5 * (given.astype(jnp.float32) - swapped.astype(jnp.float32)))


def position_bias(given: Array, swapped: Array, mask: Array | None = None) -> dict[str, Array]:
    """How much standing first sways a judge, over pairs that it was shown in both orders.

    Args:
      given: [B], the probability that what stands first is better.
      swapped: [B], the same with the pair swapped; 1 - given for a judge that nothing sways.
      mask: [B] bool, False for rows that only fill a batch; None when all are pairs.

    Returns:
      `bias`, the mean of ½·(given + swapped) - ½, from -½ (the second always wins) to ½;
      `distance`, the mean of |given + swapped - 1|, which a bias of either sign adds to;
      `flips`, the share of pairs whose verdict is another in the other order; ½ is no verdict.

    Raises:
      AssertionError: shapes differ or `mask` is not bool.
    """
    mask = jnp.ones(jnp.shape(given), bool) if mask is None else mask
    given, swapped = masked.fill(given, mask), masked.fill(swapped, mask)
    sway = given + swapped - 1.0
    return {
        "bias": 0.5 * masked.mean(sway, mask),
        "distance": masked.mean(jnp.abs(sway), mask),
        "flips": masked.mean((given - 0.5) * (swapped - 0.5) > 0, mask),
    }


def over_principles(probs: Array, weights: Array | None = None) -> Array:
    """Σ wₖ·pₖ / Σ wₖ: what several principles say together.

    Args:
      probs: [..., K], the preference under each; probabilities, or log-odds to be averaged.
      weights: broadcastable to [..., K], ≥ 0; None for equal ones.

    Returns:
      [...] float32; NaN where all weights are 0: no principle applies, nobody has said anything,
      and `stages.soft_pairs` makes no pair of it. What has the weight 0 does not matter.

    Raises:
      AssertionError: the weights do not broadcast.
    """
    weights = jnp.ones(()) if weights is None else jnp.asarray(weights, jnp.float32)
    chex.assert_is_broadcastable(weights.shape, probs.shape)
    weights = jnp.broadcast_to(weights, probs.shape)
    total = weights.sum(-1)
    weighted = weights * masked.fill(probs, weights > 0)
    mean = weighted.sum(-1) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, mean, jnp.nan)


def draw_principles(key: Array, num_rows: int, weights: Array) -> Array:
    """A principle for each pair, k with probability wₖ / Σ w; see `templates.select_question`.

    Args:
      key: a typed key; consumed. A row's principle does not depend on the number of rows.
      num_rows: B.
      weights: [K], ≥ 0, one of them positive.

    Returns:
      [B] int32.

    References:
      Bai et al. 2022, Constitutional AI: a principle at random for each comparison.
    """
    weights = jnp.asarray(weights, jnp.float32)
    chex.assert_rank(weights, 1)
    logits = jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_rows))
    return jax.vmap(lambda key: jax.random.categorical(key, logits))(keys).astype(jnp.int32)


def answer_log_probs(
    model: LanguageModel,
    params: Params,
    tokens: Array,
    attention_mask: Array,
    answers: Array,
    answer_mask: Array,
) -> Array:
    """log p(answer | text), the sum over the tokens of each answer.

    Answers of one token each take one pass over the texts. Of longer ones each is read behind each
    text.

    Args:
      model: the judge.
      params: its parameters.
      tokens: [B, S] int32, left-padded.
      attention_mask: [B, S] bool.
      answers: [K, A] int32, or [B, K, A].
      answer_mask: its shape, bool, right-padded.

    Returns:
      [B, K] float32; 0 for an answer without a token.

    Raises:
      ValueError: text and answer are longer than the context.
      AssertionError: shapes or dtypes are off.
    """
    chex.assert_rank([tokens, attention_mask], 2)
    chex.assert_equal_shape([tokens, attention_mask])
    chex.assert_equal_shape([answers, answer_mask])
    chex.assert_type([tokens, attention_mask, answers, answer_mask], [int, bool, int, bool])
    (batch, size), (num_answers, num_tokens) = tokens.shape, answers.shape[-2:]
    if size + num_tokens - 1 > model.context_length:
        raise ValueError(
            f"a judge with a context of {model.context_length} cannot read texts of {size} tokens "
            f"with answers of {num_tokens}: shorten what goes into the blanks, or the question"
        )
    answers, answer_mask = (
        jnp.broadcast_to(x, (batch, num_answers, num_tokens)) for x in (answers, answer_mask)
    )
    answers = jnp.where(answer_mask, answers, 0)
    if num_tokens == 1:
        hidden = model.hidden(params, tokens, attention_mask, first=size - 1)[:, 0]
        log_p = jax.nn.log_softmax(model.logits(params, hidden).astype(jnp.float32))
        return masked.fill(jnp.take_along_axis(log_p, answers[..., 0], 1), answer_mask[..., 0])

    def rows(text: Array, answer: Array) -> Array:
        each = jnp.repeat(text, num_answers, axis=0)
        return jnp.concatenate([each, answer.reshape(-1, num_tokens).astype(text.dtype)], axis=1)

    whole, mask = rows(tokens, answers), rows(attention_mask, answer_mask)
    whole, mask = sharding.split_rows((whole, mask))
    log_probs, _ = response_log_probs(model, params, whole, mask, num_tokens)
    return masked.sum(log_probs, mask[:, -num_tokens:], axis=1).reshape(batch, num_answers)


def ask(
    model: LanguageModel, params: Params, question: Question, fields: Mapping[str, Field]
) -> Array:
    """Log-odds of the first answer to a question about each row.

    Args:
      model: the judge.
      params: its parameters.
      question: asked of every row, or one of its own for each.
      fields: what goes into the blanks, see `templates.fill`.

    Returns:
      [B] float32.

    Raises:
      ValueError: a blank without a field, a text that is longer than the judge's context, or a
        token of the question that is not in its vocabulary; a traced one is not looked at.
    """
    _known(question, model.vocab_size)
    tokens, mask = sharding.split_rows(templates.fill(question.template, fields))
    answers = jnp.asarray(question.answers), jnp.asarray(question.mask)
    return log_odds(answer_log_probs(model, params, tokens, mask, *answers))


def compare(
    model: LanguageModel,
    params: Params,
    question: Question,
    first: Field,
    second: Field,
    fields: Mapping[str, Field] | None = None,
) -> tuple[Array, Array]:
    """Log-odds that what stands first is better, in both orders, in one pass over 2·B texts.

    Args:
      model: the judge.
      params: its parameters.
      question: with the blanks `{first}` and `{second}`, its first answer for what stands first;
        text and answers are those of all rows, or of each its own.
      first: tokens [B, L] and mask, as long as `second`.
      second: tokens [B, L] and mask.
      fields: for further blanks, such as `prompt`.

    Returns:
      as given and swapped, [B] float32 each: the arguments of `mean_of_probs` and
      `mean_of_log_odds`.

    Raises:
      ValueError: as `ask`.
    """

    # The two orders of a pair stand side by side, so that on a mesh no row changes its device.
    def both(one: Array, other: Array) -> Array:
        return jnp.stack([one, other], axis=1).reshape(-1, *one.shape[1:])

    def orders(one: Field, other: Field) -> Field:
        return both(one[0], other[0]), both(one[1], other[1])

    # Each of text and answers has a rank less where all rows have the same.
    def own(tree: Any, *, rank: int) -> Any:
        return jax.tree.map(lambda x: both(x, x) if jnp.ndim(x) == rank else x, tree)

    asked = {name: orders(field, field) for name, field in (fields or {}).items()}
    asked |= {"first": orders(first, second), "second": orders(second, first)}
    question = Question(
        own(question.template, rank=2), own(question.answers, rank=3), own(question.mask, rank=3)
    )
    odds = ask(model, params, question, asked).reshape(-1, 2)
    return odds[:, 0], odds[:, 1]


def as_reward(
    judge: LanguageModel, policy: LanguageModel, question: Question, *, drop: Sequence[int]
) -> Callable[[Params, Rollout], Array]:
    """The log-odds of the first answer about each sample, as the reward of an algorithm.

    The judge reads samples within the compiled step that drew them.

    Args:
      judge: any language model.
      policy: whose responses it reads.
      question: with the blank `{response}`, and `{prompt}` if it likes.
      drop: tokens that are no part of a text, such as those that begin and end one: within the
        judge's text the end of a response would be the end of all.

    Returns:
      `(judge_params, rollout) -> scores [B]`.

    Raises:
      ValueError: their vocabularies differ, or the question has a token that is not in them.
    """
    if judge.vocab_size != policy.vocab_size:
        raise ValueError(
            f"the policy has a vocabulary of {policy.vocab_size} tokens and the judge one of "
            f"{judge.vocab_size}: the same number would mean another token to it; use models with "
            "the same tokenizer, or judge texts (`rewards.call`)"
        )
    _known(question, judge.vocab_size)

    def reward_of(params: Params, samples: Rollout) -> Array:
        return ask(judge, params, question, templates.fields_of(samples, drop=drop))

    return reward_of


def _known(question: Question, vocab_size: int) -> None:
    """A lookup of a token that is not in the table gives NaN, or another row, and no error."""
    template = question.template
    texts = [("question", *pair) for pair in zip(template.pieces, template.masks, strict=True)]
    for name, tokens, mask in (*texts, ("answers", question.answers, question.mask)):
        if isinstance(tokens, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
            continue
        tokens = np.asarray(tokens)
        unknown = tokens[np.asarray(mask) & ((tokens < 0) | (tokens >= vocab_size))]
        if len(unknown):
            raise ValueError(
                f"token {unknown[0]} of the {name} is not in the judge's vocabulary of "
                f"{vocab_size} tokens, 0 to {vocab_size - 1}: encode questions with the judge's "
                "own tokenizer and its vocab_size (`templates.vocabulary`)"
            )
