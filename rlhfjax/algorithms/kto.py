"""KTO from preference pairs: the chosen response is desirable, the rejected one is not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax.algorithms import direct, train_state
from rlhfjax.algorithms.direct import Responses
from rlhfjax.losses import unpaired
from rlhfjax.types import LanguageModel, Loss, Params, PreferenceBatch


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
    batch: PreferenceBatch,
    ref_params: Params,
    *,
    model: LanguageModel,
    num_micro_batches: int = 1,
) -> Array:
    """z: `unpaired.reference_kl` of the responses of each pair to the prompt of the next one.

    Args:
      params: of the policy.
      batch: B rows; the pairs among them should differ in prompt from their neighbours.
      ref_params: of the reference.
      model: both models.
      num_micro_batches: as in `direct.responses`.

    Returns:
      scalar float32, without a gradient.
    """
    pairs_first = jnp.argsort(~batch.pairs)
    batch = jax.tree.map(lambda x: jnp.take(x, pairs_first, axis=0), batch)
    following = (jnp.arange(len(pairs_first)) + 1) % jnp.maximum(batch.pairs.sum(), 1)
    mismatched = replace(
        batch, prompts=batch.prompts[following], prompt_mask=batch.prompt_mask[following]
    )
    sides = direct.responses(
        jax.lax.stop_gradient(params),
        mismatched,
        ref_params,
        model=model,
        num_micro_batches=num_micro_batches,
    )
    now, ref = (jnp.concatenate(x) for x in zip(*(side.sums for side in sides), strict=True))
    return unpaired.reference_kl(now, ref, jnp.tile(batch.pairs, 2))


def pair_loss(
    chosen: Responses,
    rejected: Responses,
    hyper: Hyperparameters,
    *,
    kl: Array,
    mask: Array,
    weights: float | Array,
) -> Loss:
    """`unpaired.kto` of sums over tokens.

    Args:
      chosen: the desirable responses.
      rejected: the undesirable ones.
      hyper: the numbers.
      kl: z.
      mask: [B] bool, the rows that are pairs.
      weights: of pairs.

    Returns:
      the loss and its metrics.

    References:
      Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, eq. 8.
    """
    now, ref = (jnp.stack(x) for x in zip(chosen.sums, rejected.sums, strict=True))
    return unpaired.kto(
        now,
        ref,
        jnp.broadcast_to(jnp.array([[True], [False]]), now.shape),
        kl,
        jnp.broadcast_to(mask, now.shape),
        beta=hyper.beta,
        desirable_weight=hyper.desirable_weight,
        undesirable_weight=hyper.undesirable_weight,
        weights=weights,
    )


def loss(
    params: Params,
    batch: PreferenceBatch,
    ref_params: Params,
    hyper: Hyperparameters,
    *,
    model: LanguageModel,
    num_micro_batches: int = 1,
) -> Loss:
    """The loss of a batch, z measured on the batch itself.

    Args:
      params: of the policy.
      batch: B pairs.
      ref_params: of the reference.
      hyper: the numbers.
      model: both models.
      num_micro_batches: as in `direct.responses`.

    Returns:
      the loss and its metrics.
    """
    kl = mismatched_kl(params, batch, ref_params, model=model, num_micro_batches=num_micro_batches)
    return direct.loss(
        params,
        batch,
        ref_params,
        hyper,
        pair_loss=partial(pair_loss, kl=kl),
        model=model,
        num_micro_batches=num_micro_batches,
    )


State = train_state.TrainState
init = train_state.init
make_step = direct.maker(loss)
