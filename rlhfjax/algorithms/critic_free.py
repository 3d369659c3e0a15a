"""What the algorithms without a critic share: all but the advantages and the loss.

An algorithm is two functions. `estimate(experience, hyper) -> experience` fills in `advantages`;
`loss(log_probs [B, T], experience, hyper) -> (loss, metrics)` says how a minibatch is learned from.
With them, `learn` is the second half of an iteration and `sample` the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import kl, masked, rollout, sampling, sharding
from rlhfjax.algorithms import checks, iteration
from rlhfjax.algorithms.iteration import Metrics, State
from rlhfjax.algorithms.micro_batches import in_micro_batches, of_whole_batch
from rlhfjax.algorithms.train_state import descend, over_updates
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import LanguageModel, Loss, Params, Rollout


@dataclass(frozen=True)
class Config:
    """What decides shapes and loops; static.

    Attributes:
      num_tokens: T, length of responses.
      pad_token: fills responses behind the end token.
      end_token: ends a response, or several of which any does; None: every response has T tokens.
      group_size: G, responses to each prompt.
      num_epochs: passes over each batch of rollouts.
      num_minibatches: updates in each pass, of whole groups; must divide the number of prompts.
      num_micro_batches: parts of a minibatch that go through the model one after the other, for
        less memory and the same result; must divide the rows of a minibatch.
      sampler: from logits and uniform numbers to tokens, see `rollout.generate`.
    """

    num_tokens: int
    pad_token: int
    end_token: int | tuple[int, ...] | None = None
    group_size: int = 1
    num_epochs: int = 1
    num_minibatches: int = 1
    num_micro_batches: int = 1
    sampler: Callable[[Array, Array], Array] = sampling.categorical
    smallest_group: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.group_size < self.smallest_group:
            raise ValueError(
                f"group_size={self.group_size}: this algorithm needs at least "
                f"{self.smallest_group} of each prompt"
            )


@dataclass(frozen=True)
class GroupConfig(Config):
    """`Config` of the algorithms that compare the responses to a prompt: G is at least 2."""

    group_size: int = 8
    smallest_group: ClassVar[int] = 2


class Hyperparameters(Protocol):
    """The numbers that every algorithm has."""

    @property
    def temperature(self) -> float | Array:
        """Of sampling, and of every log-probability."""

    @property
    def kl_coef(self) -> float | Array:
        """β, the weight of the divergence from the reference."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """A rollout with all that the updates need to know about it.

    Attributes:
      rollout: N·G samples, those without a score not in its `response_mask`.
      rewards: [N·G, T] of tokens, 0 where masked.
      ref_log_probs: [N·G, T] under the reference, 0 where masked.
      advantages: [N·G] or [N·G, T], what the algorithm's loss reads.
      group_size: G, static.
    """

    rollout: Rollout
    rewards: Array
    ref_log_probs: Array
    advantages: Array
    group_size: int = field(metadata={"static": True})

    @property
    def mask(self) -> Array:
        """[N·G, T] bool, the tokens to be learned from."""
        return self.rollout.response_mask

    @property
    def scores(self) -> Array:
        """[N·G], Σ rewards of a response; 0 where there is no score."""
        return self.rewards.sum(1)

    @property
    def scored(self) -> Array:
        """[N·G] bool."""
        return self.mask.any(1)

    def by_group(self, function: Callable[..., Array], *columns: Array) -> Array:
        """`function(*columns [G], group_ids [G])` of each group, [N·G].

        The functions of `advantages` that compare responses compare all with all; this way they
        compare G at a time.
        """
        one_group = jnp.zeros(self.group_size, int)
        groups = (x.reshape(-1, self.group_size) for x in columns)
        return jax.vmap(lambda *group: function(*group, one_group))(*groups).ravel()


Estimate = Callable[[Experience, Any], Experience]
ExperienceLoss = Callable[[Array, Experience, Any], Loss]


def sample(
    state: State,
    prompts: Array,
    prompt_mask: Array,
    hyper: Hyperparameters,
    *,
    model: LanguageModel,
    config: Config,
) -> Rollout:
    """The first phase: G responses of the current policy to each prompt, side by side.

    Args:
      state: the state at the start of the iteration.
      prompts: [N, P] int32, left-padded.
      prompt_mask: [N, P] bool.
      hyper: the numbers.
      model: the policy.
      config: lengths and tokens.

    Returns:
      a `Rollout` of N·G rows.
    """
    return rollout.generate(
        model,
        state.params,
        jnp.repeat(prompts, config.group_size, axis=0),
        jnp.repeat(prompt_mask, config.group_size, axis=0),
        iteration.keys(state)[0],
        num_tokens=config.num_tokens,
        pad_token=config.pad_token,
        end_token=config.end_token,
        temperature=hyper.temperature,
        sampler=config.sampler,
    )


def experience(
    samples: Rollout,
    scores: Array,
    ref_params: Params,
    hyper: Hyperparameters,
    *,
    model: LanguageModel,
    group_size: int,
    num_micro_batches: int = 1,
) -> Experience:
    """The reference pass. A sample whose score is not finite is left out of everything.

    Args:
      samples: the rollout.
      scores: [N·G], or [N·G, T] rewards of tokens, such as `Episodes.token_rewards`.
      ref_params: of the reference policy.
      hyper: the numbers.
      model: the policy.
      group_size: G.
      num_micro_batches: parts of the batch that go through the model one after the other.

    Returns:
      the experience, its advantages still 0.
    """
    checks.context(samples.tokens, model.context_length)
    samples, rewards = iteration.leave_out_unscored(samples, scores)
    mask = samples.response_mask
    log_probs_of = partial(
        response_log_probs, model, num_tokens=mask.shape[1], temperature=hyper.temperature
    )
    ref_log_probs, _ = in_micro_batches(log_probs_of, num_micro_batches)(
        ref_params, samples.tokens, samples.attention_mask
    )
    ref_log_probs = masked.fill(ref_log_probs, mask)
    return Experience(samples, rewards, ref_log_probs, jnp.zeros(mask.shape), group_size)


def learn(
    state: State,
    samples: Rollout,
    scores: Array,
    ref_params: Params,
    hyper: Hyperparameters,
    *,
    estimate: Estimate,
    loss: ExperienceLoss,
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    config: Config,
    sampled: slice = slice(None),
) -> tuple[State, Metrics]:
    """The last phase: experience, advantages, then epochs × minibatches of updates.

    Args:
      state: the state that `samples` was sampled from.
      samples: the rollout.
      scores: [N·G] what the reward says of it, or [N·G, T] of its tokens: algorithms with
        returns-to-go credit what comes behind a token, the others the sum.
      ref_params: of the reference policy.
      hyper: the numbers.
      estimate: fills in the advantages; may leave rows of each group out.
      loss: of a minibatch.
      model: the policy.
      optimizer: the optimiser that made the state.
      config: epochs, minibatches, group size.
      sampled: which rows the policy sampled; the `objective/…` metrics are of these.

    Returns:
      the next state and the metrics: `objective/…` of the samples, means over the updates made of
      the others; `val/first_ratio_error`, the largest |π/π_old - 1| before the first update; and
      `val/num_skipped`, how many updates were left out because a gradient was not finite.

    Raises:
      ValueError: the minibatches do not divide the prompts, or the micro-batches a minibatch.
    """
    samples, scores = sharding.split_rows((samples, scores))
    num_parts = of_whole_batch(config.num_minibatches, config.num_micro_batches)
    batch = experience(
        samples,
        scores,
        ref_params,
        hyper,
        model=model,
        group_size=config.group_size,
        num_micro_batches=num_parts,
    )
    own = jax.tree.map(lambda x: x[sampled], batch)
    divergence = kl.k1(own.rollout.log_probs, own.ref_log_probs)
    metrics = iteration.objective_metrics(own.rollout, own.scores, divergence, hyper.kl_coef)
    batch = estimate(batch, hyper)

    def of_groups(params: Params, groups: Experience) -> Loss:
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), groups)
        return _loss(
            params,
            sharding.split_rows(rows),
            hyper,
            model=model,
            loss=loss,
            num_micro_batches=config.num_micro_batches,
        )

    num_prompts = len(scores) // config.group_size
    groups = jax.tree.map(lambda x: x.reshape(num_prompts, -1, *x.shape[1:]), batch)
    params, opt_state, measured = descend(
        of_groups,
        state.params,
        state.opt_state,
        groups,
        iteration.keys(state)[1],
        wanted=lambda groups: groups.mask.any(),
        optimizer=optimizer,
        num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
    )
    metrics["val/first_ratio_error"] = measured.pop("ratio_error")[0]
    metrics |= over_updates(measured)
    num_skipped = state.num_skipped + metrics["val/num_skipped"]
    return State(params, opt_state, state.key, state.step + 1, num_skipped), metrics


_METRIC_NAMES = {
    "approx_kl": "policy/approxkl_avg",
    "clip_fraction": "policy/clipfrac_avg",
    "ratio": "val/ratio",
    "ratio_var": "val/ratio_var",
}


def _loss(
    params: Params,
    batch: Experience,
    hyper: Hyperparameters,
    *,
    model: LanguageModel,
    loss: ExperienceLoss,
    num_micro_batches: int,
) -> Loss:
    """The forward pass of a minibatch, the algorithm's loss, and what is measured of both."""
    samples, mask = batch.rollout, batch.mask
    log_probs_of = partial(
        response_log_probs, model, num_tokens=mask.shape[1], temperature=hyper.temperature
    )
    log_probs, entropies = in_micro_batches(log_probs_of, num_micro_batches)(
        params, samples.tokens, samples.attention_mask
    )
    log_probs = masked.fill(log_probs, mask)
    value, metrics = loss(log_probs, batch, hyper)
    log_ratio = jax.lax.stop_gradient(log_probs) - masked.fill(samples.log_probs, mask)
    metrics = {_METRIC_NAMES.get(name, name): x for name, x in metrics.items()} | {
        "loss/policy_avg": value,
        "policy/entropy_avg": masked.mean(entropies, mask),
        "ratio_error": jnp.abs(jnp.expm1(log_ratio)).max(),
    }
    return value, jax.lax.stop_gradient(metrics)
