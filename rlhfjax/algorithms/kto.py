"""KTO: from responses that are desirable or not, of pairs the chosen and the rejected one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.algorithms import direct, train_state
from rlhfjax.algorithms.direct import Responses
from rlhfjax.losses import unpaired
from rlhfjax.types import LabelledBatch, LanguageModel, Loss, Params, PreferenceBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced.

    Attributes:
      beta: β of the implicit reward.
      desirable_weight: λ_d.
      undesirable_weight: λ_u.
    """

    beta: float | Array = 0.1
    desirable_weight: float | Array = 1.0
    undesirable_weight: float | Array = 1.0


def mismatched_kl(
    params: Params,
    batch: LabelledBatch,
    ref_params: Params,
    *,
    model: LanguageModel,
    num_micro_batches: int = 1,
) -> Array:
    """z: `unpaired.reference_kl` of the responses of each row to the prompt of the next one.

    Args:
      params: of the policy.
      batch: B rows, of which at least two should have a response; neighbours should differ in their
        prompts.
      ref_params: of the reference.
      model: both models.
      num_micro_batches: as in `direct.responses`.

    Returns:
      scalar float32, without a gradient.

    References:
      TRL's `_get_kl_dataset`.
    """
    rows = batch.real.any(1)
    # Sorted, rows with a response come first; up to itself, each counts the place of the next.
    following = jnp.argsort(~rows)[jnp.cumsum(rows) % jnp.maximum(rows.sum(), 1)]
    prompts, prompt_mask = (
        jnp.take(x, following, axis=0) for x in (batch.prompts, batch.prompt_mask)
    )
    mismatched = replace(batch, prompts=prompts, prompt_mask=prompt_mask)
    responses = direct.responses(
        jax.lax.stop_gradient(params),
        mismatched,
        ref_params,
        model=model,
        num_micro_batches=num_micro_batches,
    )
    return unpaired.reference_kl(*responses.sums, batch.real.ravel())


def response_loss(
    responses: Responses, labels: Array, hyper: Hyperparameters, *, kl: Array, mask: Array
) -> Loss:
    """y·(the loss of a desirable response) + (1 - y)·(that of another), `unpaired.kto` of sums.

    Args:
      responses: N of them.
      labels: [N], y, the probability that a response is desirable: bool, 0 and 1, or between.
      hyper: the numbers.
      kl: z.
      mask: [N] bool, the responses that count.

    Returns:
      the loss and its metrics: those of `unpaired.kto`, and TRL's `logps/chosen` and
      `logps/rejected`, where a response is chosen if y > ½.

    References:
      Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, eq. 8.
    """
    now, ref = responses.sums
    desirable = labels > 0.5
    certainty = jnp.where(desirable, labels, 1.0 - labels)

    def said(desirable: Array, weights: Array) -> Loss:
        return unpaired.kto(
            now,
            ref,
            desirable,
            kl,
            mask,
            beta=hyper.beta,
            desirable_weight=hyper.desirable_weight,
            undesirable_weight=hyper.undesirable_weight,
            weights=weights,
        )

    value, metrics = said(desirable, certainty)
    value += said(~desirable, 1.0 - certainty)[0]
    whole = {
        "logps/chosen": masked.mean(now, mask & desirable),
        "logps/rejected": masked.mean(now, mask & ~desirable),
    }
    return value, metrics | jax.lax.stop_gradient(whole)


def loss(
    params: Params,
    batch: LabelledBatch | PreferenceBatch,
    ref_params: Params,
    hyper: Hyperparameters,
    *,
    model: LanguageModel,
    num_micro_batches: int = 1,
) -> Loss:
    """The loss of a batch, z measured on the batch itself.

    Args:
      params: of the policy.
      batch: B rows of responses that are labelled as in `response_loss`, or B pairs.
      ref_params: of the reference.
      hyper: the numbers.
      model: both models.
      num_micro_batches: as in `direct.responses`.

    Returns:
      the loss and its metrics.
    """
    batch = batch.labelled if isinstance(batch, PreferenceBatch) else batch
    given = (params, batch, ref_params)
    kl = mismatched_kl(*given, model=model, num_micro_batches=num_micro_batches)
    responses = direct.responses(*given, model=model, num_micro_batches=num_micro_batches)
    return response_loss(responses, batch.labels.ravel(), hyper, kl=kl, mask=batch.real.ravel())


State = train_state.TrainState
init = train_state.init
make_step = direct.maker(loss)
