"""Reward models from human preferences: the Bradley-Terry likelihood of the choices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import masked
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
    """
    values = model.values(params, tokens, attention_mask, first=first)
    return last_value(values, attention_mask[:, first:])


def loss(params: Params, model: ScalarModel, batch: PreferenceBatch) -> tuple[Array, Metrics]:
    """-mean over pairs of log σ(score(chosen) - score(rejected)); of both orders at soft labels.

    Args:
      params: the reward model's parameters.
      model: the reward model.
      batch: pairs; rows of padding count nowhere.

    Returns:
      loss, scalar float32, and TRL's metrics: `loss`, `accuracy`, `margin`, `min_reward`,
      `mean_reward`, `max_reward`.

    References:
      Bradley and Terry 1952; Stiennon et al. 2020, Learning to Summarize from Human Feedback.
    """
    scores = score(model, params, *batch.sequences, first=batch.prompts.shape[1])
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
    model: ScalarModel, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, PreferenceBatch], tuple[TrainState, Metrics]]:
    """One compiled update of a reward model.

    Args:
      model: the reward model.
      optimizer: any optax optimiser.

    Returns:
      `step(state, batch) -> (state, metrics)`, see `loss`. The state is donated.
    """

    def step(state: TrainState, batch: PreferenceBatch) -> tuple[TrainState, Metrics]:
        grads, metrics = jax.grad(loss, has_aux=True)(state.params, model, batch)
        return apply_gradients(state, grads, optimizer), metrics

    return jax.jit(step, donate_argnums=0)
