"""Supervised fine-tuning: maximum likelihood of texts."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import optax
from jax import Array

from rlhfjax import masked
from rlhfjax.algorithms.train_state import TrainState, apply_gradients, init
from rlhfjax.log_probs import token_log_probs_and_entropy
from rlhfjax.losses import supervised
from rlhfjax.types import LanguageModel, Params

__all__ = ["TrainState", "init", "loss", "make_step"]

Metrics = dict[str, Array]


def loss(
    params: Params, model: LanguageModel, tokens: Array, loss_mask: Array, attention_mask: Array
) -> tuple[Array, Metrics]:
    """-mean over the tokens of `loss_mask` of log p(token | tokens before it).

    Args:
      params: the model's parameters.
      model: the language model.
      tokens: [B, S] int32.
      loss_mask: [B, S] bool, the tokens to be learned; the first column is never predicted.
      attention_mask: [B, S] bool, True at real tokens.

    Returns:
      loss, scalar float32, and TRL's metrics: `loss`, `entropy`, `num_tokens`.
    """
    chex.assert_equal_shape([tokens, loss_mask, attention_mask])
    hidden = model.hidden(params, tokens[:, :-1], attention_mask[:, :-1])
    log_probs, entropies = token_log_probs_and_entropy(model.logits(params, hidden), tokens[:, 1:])
    mask = loss_mask[:, 1:] & attention_mask[:, 1:]
    value = supervised.language_model(log_probs, mask)
    metrics = {"loss": value, "entropy": masked.mean(entropies, mask), "num_tokens": mask.sum()}
    return value, metrics


def make_step(
    model: LanguageModel, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, Metrics]]:
    """One compiled update of a language model.

    Args:
      model: the language model.
      optimizer: any optax optimiser.

    Returns:
      `step(state, tokens, loss_mask, attention_mask) -> (state, metrics)`, see `loss`. The state
      is donated.
    """

    def step(
        state: TrainState, tokens: Array, loss_mask: Array, attention_mask: Array
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = jax.grad(loss, has_aux=True)(
            state.params, model, tokens, loss_mask, attention_mask
        )
        return apply_gradients(state, grads, optimizer), metrics

    return jax.jit(step, donate_argnums=0)
