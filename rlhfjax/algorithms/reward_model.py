"""Reward models from human preferences: the Bradley-Terry likelihood of the choices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.algorithms import checks
from rlhfjax.algorithms.micro_batches import in_micro_batches
from rlhfjax.algorithms.train_state import TrainState, apply_gradients, init
from rlhfjax.losses import reward
from rlhfjax.models.heads import last_value
from rlhfjax.types import Params, PreferenceBatch, ScalarModel

__all__ = ["TrainState", "init", "loss", "make_step", "score"]

Metrics = dict[str, Array]


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


def loss(
    params: Params, model: ScalarModel, batch: PreferenceBatch, *, num_micro_batches: int = 1
) -> tuple[Array, Metrics]:
    """-mean over pairs of log σ(score(chosen) - score(rejected)); of both orders at soft labels.

    Args:
      params: the reward model's parameters.
      model: the reward model.
      batch: B pairs; rows of padding count nowhere.
      num_micro_batches: parts of the 2·B responses that go through the model one after the other.

    Returns:
      loss, scalar float32, and TRL's metrics: `loss`, `accuracy`, `margin`, `min_reward`,
      `mean_reward`, `max_reward`.

    References:
      Bradley and Terry 1952; Stiennon et al. 2020, Learning to Summarize from Human Feedback.
    """
    sequences = sharding.split_rows(batch.sequences)
    scores_of = partial(score, model, first=batch.prompts.shape[1])
    scores = in_micro_batches(scores_of, num_micro_batches)(params, *sequences)
    chosen, rejected = jnp.split(scores, 2)
    certain = 1.0 if batch.chosen_probs is None else batch.chosen_probs
    value, metrics = reward.pairwise(chosen, rejected, batch.pairs, preference=certain)
    every = jnp.tile(batch.pairs, 2)
    metrics |= {
        "loss": value,
        "min_reward": jnp.where(every, scores, jnp.inf).min(),
        "mean_reward": masked.mean(scores, every),
        "max_reward": jnp.where(every, scores, -jnp.inf).max(),
    }
    return value, metrics


def make_step(
    model: ScalarModel,
    optimizer: optax.GradientTransformation,
    *,
    num_micro_batches: int = 1,
) -> Callable[[TrainState, PreferenceBatch], tuple[TrainState, Metrics]]:
    """One compiled update of a reward model.

    Args:
      model: the reward model.
      optimizer: any optax optimiser.
      num_micro_batches: parts of a batch that go through the model one after the other, for less
        memory and the same result; must divide the 2·B responses.

    Returns:
      `step(state, batch) -> (state, metrics)`, see `loss`. The state is donated.
    """

    in_parts = partial(loss, num_micro_batches=num_micro_batches)

    def step(state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        grads, metrics = jax.grad(in_parts, has_aux=True)(state.params, model, batch)
        state, counted = apply_gradients(state, grads, optimizer)
        return state, metrics | counted

    compiled = sharding.Step(step)
    return checks.Checked(compiled, "batch", vocab_size=model.vocab_size)
