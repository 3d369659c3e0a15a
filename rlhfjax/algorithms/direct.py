"""What the direct methods share: the responses of a preference batch, soft labels, the step.

A direct method is one function, `pair_loss(chosen, rejected, hyper, *, mask, weights)` of two
`Responses`; that of KTO is a function of single ones. There is no reward, nothing is sampled, and
nothing is static: no config.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import masked, sharding
from rlhfjax.algorithms import checks
from rlhfjax.algorithms.micro_batches import in_micro_batches
from rlhfjax.algorithms.train_state import TrainState, apply_gradients
from rlhfjax.log_probs import response_log_probs
from rlhfjax.losses import supervised
from rlhfjax.types import LabelledBatch, LanguageModel, Loss, Params, PreferenceBatch

Metrics = dict[str, Array]
PairLoss = Callable[..., Loss]


class Responses(NamedTuple):
    """Responses, such as one side of pairs, as the policy and the reference see them.

    Attributes:
      log_probs: [B, T] of the tokens under the policy, 0 where masked.
      ref_log_probs: [B, T] under the reference; 0 where there is none.
      mask: [B, T] bool.
    """

    log_probs: Array
    ref_log_probs: Array
    mask: Array

    @property
    def sums(self) -> tuple[Array, Array]:
        """log π and log π_ref of whole responses, [B] each."""
        return self.log_probs.sum(1), self.ref_log_probs.sum(1)

    @property
    def mean(self) -> Array:
        """[B] log π / tokens."""
        return masked.mean(self.log_probs, self.mask, axis=1)


def responses(
    params: Params,
    batch: PreferenceBatch | LabelledBatch,
    ref_params: Params | None,
    *,
    model: LanguageModel,
    num_micro_batches: int = 1,
) -> Responses:
    """The responses of a batch, in one pass of each model.

    Args:
      params: of the policy.
      batch: N responses, 2·B of B pairs.
      ref_params: of the reference; None for the methods that have none.
      model: both models.
      num_micro_batches: parts of the N responses that go through a model one after the other.

    Returns:
      N responses in the order of `batch.sequences`.

    Raises:
      ValueError: the prompts have no tokens, prompts with responses are longer than the context,
        or the micro-batches do not divide the responses.
    """
    start = batch.prompts.shape[1]
    if start == 0:
        raise ValueError(
            "prompts of 0 tokens: the first token of a response is predicted from what stands "
            "before it, so give each prompt at least a beginning-of-text token"
        )
    tokens, attention_mask = sharding.split_rows(batch.sequences)
    checks.context(tokens, model.context_length)
    mask = attention_mask[:, start:]

    log_probs_of = partial(response_log_probs, model, num_tokens=mask.shape[1])

    def under(params: Params) -> Array:
        passed = in_micro_batches(log_probs_of, num_micro_batches)
        return masked.fill(passed(params, tokens, attention_mask)[0], mask)

    ref_log_probs = jnp.zeros(mask.shape) if ref_params is None else under(ref_params)
    return Responses(under(params), jax.lax.stop_gradient(ref_log_probs), mask)


def both_orders(
    pair_loss: PairLoss,
    chosen: Responses,
    rejected: Responses,
    chosen_probs: Array | None = None,
) -> Loss:
    """p·loss(chosen, rejected) + (1 - p)·loss(rejected, chosen): labels that are probabilities.

    Args:
      pair_loss: `(chosen, rejected, *, mask, weights) -> (loss, metrics)`.
      chosen: the responses that are preferred with probability p.
      rejected: the others.
      chosen_probs: [B] p; None for 1, at half the work.

    Returns:
      the loss, and the metrics of the first order, with TRL's `logps/chosen` and
      `logps/rejected`, the mean log-probabilities of whole responses.
    """
    mask = chosen.mask.any(1) & rejected.mask.any(1)
    weights = 1.0 if chosen_probs is None else chosen_probs
    loss, metrics = pair_loss(chosen, rejected, mask=mask, weights=weights)
    if chosen_probs is not None:
        loss += pair_loss(rejected, chosen, mask=mask, weights=1.0 - chosen_probs)[0]
    whole = {
        "logps/chosen": masked.mean(chosen.sums[0], mask),
        "logps/rejected": masked.mean(rejected.sums[0], mask),
    }
    return loss, metrics | jax.lax.stop_gradient(whole)


def chosen_likelihood(chosen: Responses, mask: Array, weights: float | Array) -> Array:
    """-log π of the chosen responses, the weighted mean over their tokens.

    Args:
      chosen: the responses.
      mask: [B] bool, the rows that are pairs.
      weights: of pairs, broadcastable to [B].

    Returns:
      scalar float32.
    """
    weights = masked.fill(jnp.broadcast_to(weights, mask.shape), mask)[:, None]
    return supervised.language_model(weights * chosen.log_probs, chosen.mask & mask[:, None])


def loss(
    params: Params,
    batch: PreferenceBatch,
    ref_params: Params | None,
    hyper: Any,
    *,
    pair_loss: PairLoss,
    model: LanguageModel,
    num_micro_batches: int = 1,
) -> Loss:
    """The loss of a method on a batch.

    Args:
      params: of the policy.
      batch: B pairs.
      ref_params: of the reference, or None.
      hyper: the method's numbers.
      pair_loss: the method.
      model: both models.
      num_micro_batches: as in `responses`.

    Returns:
      the loss and its metrics.
    """
    of_pairs = partial(pair_loss, hyper=hyper)
    both = responses(params, batch, ref_params, model=model, num_micro_batches=num_micro_batches)
    chosen, rejected = (
        Responses(*side) for side in zip(*(jnp.split(x, 2) for x in both), strict=True)
    )
    return both_orders(of_pairs, chosen, rejected, batch.chosen_probs)


def maker(loss: Callable[..., Loss]) -> Callable[..., Any]:
    """`make_step` of a direct method.

    Args:
      loss: `(params, batch, ref_params, hyper, *, model, num_micro_batches) -> (loss, metrics)`.

    Returns:
      the function.
    """

    def make_step(
        model: LanguageModel,
        optimizer: optax.GradientTransformation,
        *,
        num_micro_batches: int = 1,
    ) -> Callable[..., tuple[TrainState, Metrics]]:
        """One compiled update from preferences.

        Args:
          model: the policy, and the reference.
          optimizer: any optax optimiser.
          num_micro_batches: parts of a batch that go through a model one after the other, for less
            memory and the same result; must divide the responses, 2·B of B pairs.

        Returns:
          `step(state, batch, ref_params, hyper) -> (state, metrics)`; `ref_params` is None for the
          methods that have no reference. The state is donated.
        """

        def with_value(*args: Any) -> Loss:
            value, metrics = loss(*args, model=model, num_micro_batches=num_micro_batches)
            return value, metrics | {"loss": value}

        def step(
            state: TrainState, batch: Any, ref_params: Params | None, hyper: Any
        ) -> tuple[TrainState, Metrics]:
            grads, metrics = jax.grad(with_value, has_aux=True)(
                state.params, batch, ref_params, hyper
            )
            state, counted = apply_gradients(state, grads, optimizer)
            return state, metrics | counted

        compiled = sharding.Step(step)
        return checks.Checked(compiled, "batch", vocab_size=model.vocab_size)

    return make_step
