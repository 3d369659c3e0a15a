"""Reward models from what people said of responses.

What they said decides the objective: `pairs`, `rankings` or `plackett_luce`, `ratings`, `levels`.
Each is a function `(scores, batch) -> (loss, metrics)` of one score a response, so that whatever
it was trained on, a reward model is a `ScalarModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.algorithms import checks
from rlhfjax.algorithms.iteration import Reward
from rlhfjax.algorithms.micro_batches import in_micro_batches
from rlhfjax.algorithms.train_state import TrainState, apply_gradients, init
from rlhfjax.losses import ranking, reductions, reward
from rlhfjax.models.heads import last_value, same_vocabulary
from rlhfjax.types import (
    LabelledBatch,
    LanguageModel,
    Loss,
    Params,
    PreferenceBatch,
    Rollout,
    ScalarModel,
)

__all__ = [
    "Objective",
    "TrainState",
    "as_reward",
    "init",
    "level_thresholds",
    "levels",
    "loss",
    "make_step",
    "pairs",
    "plackett_luce",
    "rankings",
    "ratings",
    "score",
]

Metrics = dict[str, Array]
Objective = Callable[[Array, Any], Loss]
"""`(scores, batch) -> (loss, metrics)`; the scores have the shape of `batch.real`."""


def score(
    model: ScalarModel, params: Params, tokens: Array, attention_mask: Array, *, first: int = 0
) -> Array:
    """The reward of whole sequences, read at their last real token.

    Args:
      model: the reward model.
      params: its parameters.
      tokens: [B, S] int32.
      attention_mask: [B, S] bool, padded on either side.
      first: static; a position that no sequence ends before, such as the first one of responses.

    Returns:
      [B] float32.

    Raises:
      ValueError: the sequences are longer than the context.
    """
    checks.context(tokens, model.context_length)
    values = model.values(params, tokens, attention_mask, first=first)
    return last_value(values, attention_mask[:, first:])


def as_reward(scorer: ScalarModel, policy: LanguageModel) -> Reward:
    """`score` of prompts with their responses, as the reward of an algorithm.

    Args:
      scorer: the reward model.
      policy: whose responses it scores.

    Returns:
      `(reward_params, rollout) -> scores [B]`, which refuses sequences longer than the scorer's
      context.

    Raises:
      ValueError: their vocabularies differ.
    """
    same_vocabulary(policy, scorer)

    def reward_of(params: Params, samples: Rollout) -> Array:
        first = samples.prompts.shape[1]
        return score(scorer, params, samples.tokens, samples.attention_mask, first=first)

    return reward_of


def pairs(scores: Array, batch: PreferenceBatch) -> Loss:
    """-log σ(score(chosen) - score(rejected)), the mean over pairs; both orders at soft labels.

    Args:
      scores: [2, B].
      batch: B pairs.

    Returns:
      loss and metrics of `reward.pairwise`.

    References:
      Bradley and Terry 1952; Stiennon et al. 2020, Learning to Summarize from Human Feedback.
    """
    chosen, rejected = scores
    certain = 1.0 if batch.chosen_probs is None else batch.chosen_probs
    return reward.pairwise(chosen, rejected, batch.pairs, preference=certain)


def rankings(scores: Array, batch: LabelledBatch) -> Loss:
    """-log σ(difference of scores) of every two responses to a prompt, the greater label first.

    The mean over the pairs of a prompt, and then over prompts. Equal labels make no pair.

    Args:
      scores: [B, K].
      batch: labels are minus ranks, or anything of which more is better.

    Returns:
      loss and metrics of `reward.pairwise`.

    References:
      Ouyang et al. 2022, Training Language Models to Follow Instructions, eq. 1.
    """
    real, labels = batch.real, batch.labels
    ordered = labels[:, :, None] > labels[:, None, :]
    ordered &= real[:, :, None] & real[:, None, :]
    both = jnp.broadcast_arrays(scores[:, :, None], scores[:, None, :])
    better, worse, mask = (x.reshape(len(scores), -1) for x in (*both, ordered))
    return reward.pairwise(better, worse, mask, reduce=reductions.sequence_mean)


def plackett_luce(scores: Array, batch: LabelledBatch) -> Loss:
    """`ranking.plackett_luce`: the likelihood of the whole order of the responses to a prompt.

    A row with equal labels has no order and counts nowhere; `rankings` learns from the rest of it.

    Args:
      scores: [B, K].
      batch: labels as for `rankings`.

    Returns:
      loss and metrics of `ranking.plackett_luce`.
    """
    labels = masked.fill(batch.labels, batch.real, value=-jnp.inf)
    best_first = jnp.argsort(labels, axis=1, descending=True)
    labels, scores, real = (
        jnp.take_along_axis(x, best_first, axis=1) for x in (labels, scores, batch.real)
    )
    tied = ((labels[:, 1:] == labels[:, :-1]) & real[:, 1:]).any(1)
    return ranking.plackett_luce(scores, real & ~tied[:, None])


def ratings(scores: Array, batch: LabelledBatch) -> Loss:
    """(label - score)², the mean over responses.

    Args:
      scores: [B, K].
      batch: labels are ratings, of mean 0 and variance 1 over the data: so scores begin, and a head
        without a bias cannot well reach another mean.

    Returns:
      loss and metrics of `reward.rating`.
    """
    return reward.rating(scores, batch.labels, batch.real)


def levels(
    scores: Array,
    batch: LabelledBatch,
    *,
    thresholds: Sequence[float] | np.ndarray | Array = (0.0,),
) -> Loss:
    """-log P(label), P(label ≤ k) = σ(θₖ - score), the mean over responses: classes with an order.

    Of two classes, with θ = 0, the score is the log-odds of the better one. Of classes without an
    order choose the one that is wanted: labels that are 1 for it and 0 for all others.

    Args:
      scores: [B, K].
      batch: labels are levels 0 … L - 1.
      thresholds: [L - 1], θ, increasing, such as `level_thresholds`; bind them by `partial`.

    Returns:
      loss and metrics of `reward.ordinal`.
    """
    labels = batch.labels.astype(jnp.int32)
    return reward.ordinal(scores, labels, jnp.asarray(thresholds), batch.real)


def level_thresholds(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """θₖ = log(responses up to level k / responses above it): a score of 0 knows how many of each.

    Args:
      counts: [L] responses of each level in the data; half a one is added to each.

    Returns:
      [L - 1] float32, increasing.
    """
    counts = np.asarray(counts) + 0.5
    above = np.cumsum(counts[::-1])[::-1]
    return np.log(np.cumsum(counts)[:-1] / above[1:]).astype(np.float32)


def loss(
    params: Params,
    model: ScalarModel,
    batch: PreferenceBatch | LabelledBatch,
    *,
    objective: Objective = pairs,
    num_micro_batches: int = 1,
) -> Loss:
    """The objective of the scores of a batch.

    Args:
      params: the reward model's parameters.
      model: the reward model.
      batch: what the objective reads; what is padding counts nowhere.
      objective: one of those above.
      num_micro_batches: parts of the responses that go through the model one after the other.

    Returns:
      loss, scalar float32, and TRL's metrics: `loss`, `min_reward`, `mean_reward`, `max_reward`;
      `accuracy` and `margin` where the objective has them.
    """
    sequences = sharding.split_rows(batch.sequences)
    scores_of = partial(score, model, first=batch.prompts.shape[1])
    real = batch.real
    scores = in_micro_batches(scores_of, num_micro_batches)(params, *sequences).reshape(real.shape)
    value, metrics = objective(scores, batch)
    return value, metrics | {
        "loss": value,
        "min_reward": jnp.where(real, scores, jnp.inf).min(),
        "mean_reward": masked.mean(scores, real),
        "max_reward": jnp.where(real, scores, -jnp.inf).max(),
    }


def make_step(
    model: ScalarModel,
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective = pairs,
    num_micro_batches: int = 1,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """One compiled update of a reward model.

    Args:
      model: the reward model.
      optimizer: any optax optimiser.
      objective: one of those above.
      num_micro_batches: parts of a batch that go through the model one after the other, for less
        memory and the same result; must divide the responses, 2·B of B pairs.

    Returns:
      `step(state, batch) -> (state, metrics)`, see `loss`. The state is donated.
    """

    in_parts = partial(loss, objective=objective, num_micro_batches=num_micro_batches)

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        grads, metrics = jax.grad(in_parts, has_aux=True)(state.params, model, batch)
        state, counted = apply_gradients(state, grads, optimizer)
        return state, metrics | counted

    compiled = sharding.Step(step)
    return checks.Checked(compiled, "batch", vocab_size=model.vocab_size)
