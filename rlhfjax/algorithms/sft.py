"""Supervised fine-tuning: maximum likelihood of texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import chex
import jax
import optax
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.algorithms import checks
from rlhfjax.algorithms.micro_batches import in_micro_batches
from rlhfjax.algorithms.train_state import TrainState, apply_gradients, init
from rlhfjax.log_probs import token_log_probs_and_entropy
from rlhfjax.losses import supervised
from rlhfjax.types import LanguageModel, Params

__all__ = ["TrainState", "init", "loss", "make_step"]

Metrics = dict[str, Array]


def loss(
    params: Params,
    model: LanguageModel,
    tokens: Array,
    loss_mask: Array,
    attention_mask: Array,
    segment_ids: Array | None = None,
    *,
    num_micro_batches: int = 1,
) -> tuple[Array, Metrics]:
    """-mean over the tokens of `loss_mask` of log p(token | tokens before it).

    Args:
      params: the model's parameters.
      model: the language model.
      tokens: [B, S] int32.
      loss_mask: [B, S] bool, the tokens to be learned; the first column is never predicted.
      attention_mask: [B, S] bool, True at real tokens.
      segment_ids: [B, S] int32, 0 at padding, where a row holds several texts, as
        `data.packing` makes them; the first token of each is never predicted. The model must take
        them, see `LanguageModel.hidden`.
      num_micro_batches: parts of the batch that go through the model one after the other.

    Returns:
      loss, scalar float32, and TRL's metrics: `loss`, `entropy`, `num_tokens`.
    """
    segments = {} if segment_ids is None else {"segment_ids": segment_ids}
    chex.assert_equal_shape([tokens, loss_mask, attention_mask, *segments.values()])
    checks.context(tokens, model.context_length)
    tokens, loss_mask, attention_mask, segments = sharding.split_rows(
        (tokens, loss_mask, attention_mask, segments)
    )

    def log_probs_of(
        params: Params, tokens: Array, attention_mask: Array, segments: dict[str, Array]
    ) -> tuple[Array, Array]:
        before = {name: ids[:, :-1] for name, ids in segments.items()}
        hidden = model.hidden(params, tokens[:, :-1], attention_mask[:, :-1], **before)
        return token_log_probs_and_entropy(model.logits(params, hidden), tokens[:, 1:])

    log_probs, entropies = in_micro_batches(log_probs_of, num_micro_batches)(
        params, tokens, attention_mask, segments
    )
    mask = loss_mask[:, 1:] & attention_mask[:, 1:]
    for ids in segments.values():
        mask &= ids[:, 1:] == ids[:, :-1]
    value = supervised.language_model(log_probs, mask)
    metrics = {"loss": value, "entropy": masked.mean(entropies, mask), "num_tokens": mask.sum()}
    return value, metrics


def make_step(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    *,
    num_micro_batches: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """One compiled update of a language model.

    Args:
      model: the language model.
      optimizer: any optax optimiser.
      num_micro_batches: parts of a batch that go through the model one after the other, for less
        memory and the same result; must divide B.

    Returns:
      `step(state, tokens, loss_mask, attention_mask, segment_ids=None) -> (state, metrics)`, see
      `loss`. The state is donated.
    """

    in_parts = partial(loss, num_micro_batches=num_micro_batches)

    def step(
        state: TrainState,
        tokens: Array,
        loss_mask: Array,
        attention_mask: Array,
        segment_ids: Array | None = None,
    ) -> tuple[TrainState, Metrics]:
        grads, metrics = jax.grad(in_parts, has_aux=True)(
            state.params, model, tokens, loss_mask, attention_mask, segment_ids
        )
        state, counted = apply_gradients(state, grads, optimizer)
        return state, metrics | counted

    compiled = sharding.Step(step)
    return checks.Checked(compiled, "tokens", vocab_size=model.vocab_size)
