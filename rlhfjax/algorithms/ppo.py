"""Proximal policy optimisation under a KL penalty: one program from prompts to new parameters.

An iteration is `sample` → a reward → `learn`; `make_step` compiles the whole of it, `make_halves`
the two halves around a reward that is a Python function.  Every phase is public, takes what the
phase before it returned, and can be replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import advantages, kl, masked, rollout, sampling, sharding
from rlhfjax.algorithms import checks, iteration
from rlhfjax.algorithms.iteration import Metrics
from rlhfjax.algorithms.micro_batches import in_micro_batches, of_whole_batch
from rlhfjax.algorithms.train_state import descend, over_updates
from rlhfjax.log_probs import response_inputs, response_log_probs, token_log_probs_and_entropy
from rlhfjax.losses import policy, value
from rlhfjax.models.actor_critic import ActorCritic
from rlhfjax.types import Params, Rollout


@dataclass(frozen=True)
class Config:
    """What decides shapes and loops; static.

    Attributes:
      num_tokens: T, length of responses.
      pad_token: fills responses behind the end token.
      end_token: ends a response, or several of which any does; None: every response has T tokens.
      num_epochs: passes over each batch of rollouts.
      num_minibatches: updates in each pass; must divide the batch.
      num_micro_batches: parts of a minibatch that go through the models one after the other, for
        less memory and the same result; must divide the minibatch.
      sampler: from logits and uniform numbers to tokens, see `rollout.generate`.
    """

    num_tokens: int
    pad_token: int
    end_token: int | tuple[int, ...] | None = None
    num_epochs: int = 4
    num_minibatches: int = 4
    num_micro_batches: int = 1
    sampler: Callable[[Array, Array], Array] = sampling.categorical


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hyperparameters:
    """What is only a number; traced, so one program can be vmapped over any of them.

    Attributes:
      temperature: of sampling, and of every log-probability.
      gamma: discount of a token.
      gae_lambda: λ of GAE.
      clip_range: ε of the ratio.
      value_clip_range: ε of the values.
      value_coef: weight of the value loss.
      entropy_coef: weight of the entropy bonus.
      kl_target: the KL that the coefficient is adapted to, nats a response.
      kl_horizon: samples in which the coefficient may change e-fold at an error of 1; infinite:
        the coefficient stays.
    """

    temperature: float | Array = 1.0
    gamma: float | Array = 1.0
    gae_lambda: float | Array = 0.95
    clip_range: float | Array = 0.2
    value_clip_range: float | Array = 0.2
    value_coef: float | Array = 0.1
    entropy_coef: float | Array = 0.0
    kl_target: float | Array = 6.0
    kl_horizon: float | Array = 10_000.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that changes.

    Attributes:
      params: of the `ActorCritic`.
      opt_state: the optimiser's state.
      key: typed key; iteration i uses `fold_in(key, i)`, the key itself never changes.
      step: [] int32, iterations done, whether or not any of their updates was left out.
      num_skipped: [] int32, updates left out because a gradient was not finite.
      kl_coef: [] float32, β.
    """

    params: Params
    opt_state: optax.OptState
    key: Array
    step: Array
    num_skipped: Array
    kl_coef: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """A rollout with all that the updates need to know about it.

    Attributes:
      rollout: what was sampled, with `log_probs` of the sampling policy.
      values: [B, T] at the time of sampling.
      advantages: [B, T] whitened.
      returns: [B, T]
    """

    rollout: Rollout
    values: Array
    advantages: Array
    returns: Array


def init(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    kl_coef: float | Array,
) -> State:
    """The state before the first iteration.

    Args:
      params: of the `ActorCritic`. Copied, because steps donate their state.
      optimizer: any optax optimiser; `optax.inject_hyperparams` makes its numbers traced too.
      key: a typed key.
      kl_coef: β of the first iteration.

    Returns:
      a `State`.
    """
    params = jax.tree.map(jnp.copy, params)
    beta = jnp.asarray(kl_coef, jnp.float32)
    return State(params, optimizer.init(params), jnp.copy(key), jnp.int32(0), jnp.int32(0), beta)


def sample(
    state: State,
    prompts: Array,
    prompt_mask: Array,
    hyper: Hyperparameters,
    *,
    model: ActorCritic,
    config: Config,
) -> Rollout:
    """The first phase: responses of the current policy.

    Args:
      state: the state at the start of the iteration.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool.
      hyper: the numbers.
      model: policy and value function.
      config: lengths and tokens.

    Returns:
      a `Rollout`, with values where the trunk is shared.
    """
    value_of = model.value_of
    return rollout.generate(
        model.policy,
        state.params["policy"],
        prompts,
        prompt_mask,
        iteration.keys(state)[0],
        num_tokens=config.num_tokens,
        pad_token=config.pad_token,
        end_token=config.end_token,
        temperature=hyper.temperature,
        sampler=config.sampler,
        value_of=None if value_of is None else lambda hidden: value_of(state.params, hidden),
    )


def experience(
    params: Params,
    samples: Rollout,
    scores: Array,
    ref_params: Params,
    hyper: Hyperparameters,
    kl_coef: Array,
    *,
    model: ActorCritic,
    num_micro_batches: int = 1,
) -> tuple[Experience, Metrics]:
    """Reference and value passes, token rewards r = -β·k1 + score, GAE, whitening.

    A sample whose score is not finite is taken out of every statistic, and counted.

    Args:
      params: of the `ActorCritic` at the time of sampling.
      samples: the rollout.
      scores: [B], or [B, T] rewards of tokens, such as `Episodes.token_rewards`.
      ref_params: of the reference policy.
      hyper: the numbers.
      kl_coef: [] β.
      model: policy and value function.
      num_micro_batches: parts of the batch that go through the models one after the other.

    Returns:
      the experience, and the `objective/…` metrics.
    """
    num_tokens = samples.response_mask.shape[1]
    checks.context(samples.tokens, model.policy.context_length)
    samples, rewards = iteration.leave_out_unscored(samples, scores)
    mask = samples.response_mask
    rows = samples.tokens, samples.attention_mask

    def values_of(params: Params, tokens: Array, attention_mask: Array) -> Array:
        return model.outputs(params, **response_inputs(tokens, attention_mask, num_tokens))[1]

    values = samples.values
    if values is None:
        values = in_micro_batches(values_of, num_micro_batches)(params, *rows)
    log_probs_of = partial(
        response_log_probs, model.policy, num_tokens=num_tokens, temperature=hyper.temperature
    )
    ref_log_probs, _ = in_micro_batches(log_probs_of, num_micro_batches)(ref_params, *rows)
    divergence = jnp.where(mask, kl.k1(samples.log_probs, ref_log_probs), 0.0)
    penalised = advantages.penalize_kl(rewards, divergence, mask, kl_coef=kl_coef)
    token_advantages, returns = advantages.gae(
        penalised, values, mask, gamma=hyper.gamma, gae_lambda=hyper.gae_lambda
    )
    metrics = iteration.objective_metrics(samples, rewards.sum(1), divergence, kl_coef)
    whitened = masked.whiten(token_advantages, mask)
    return Experience(samples, values, whitened, returns), metrics


def loss(
    params: Params,
    batch: Experience,
    hyper: Hyperparameters,
    *,
    model: ActorCritic,
    num_micro_batches: int = 1,
) -> tuple[Array, Metrics]:
    """Clipped policy loss + c_v · clipped value loss - c_e · entropy, token means.

    Args:
      params: of the `ActorCritic`.
      batch: a minibatch of experience.
      hyper: the numbers.
      model: policy and value function.
      num_micro_batches: parts of the minibatch that go through the models one after the other.

    Returns:
      the loss and the metrics of this minibatch.

    References:
      Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 9.
    """
    samples, mask = batch.rollout, batch.rollout.response_mask
    num_tokens = mask.shape[1]

    def outputs_of(
        params: Params, tokens: Array, attention_mask: Array
    ) -> tuple[Array, Array, Array]:
        inputs = response_inputs(tokens, attention_mask, num_tokens)
        hidden, values = model.outputs(params, **inputs)
        log_probs, entropies = token_log_probs_and_entropy(
            model.policy.logits(params["policy"], hidden),
            tokens[:, -num_tokens:],
            temperature=hyper.temperature,
        )
        return values, log_probs, entropies

    values, log_probs, entropies = in_micro_batches(outputs_of, num_micro_batches)(
        params, samples.tokens, samples.attention_mask
    )
    policy_loss, of_policy = policy.ppo_clip(
        log_probs, samples.log_probs, batch.advantages, mask, clip_range=hyper.clip_range
    )
    value_loss, of_value = value.clipped_value_loss(
        values, batch.values, batch.returns, mask, clip_range=hyper.value_clip_range
    )
    entropy = masked.mean(entropies, mask)
    log_ratio = jnp.where(mask, jax.lax.stop_gradient(log_probs) - samples.log_probs, 0.0)
    metrics = {
        "policy/approxkl_avg": of_policy["approx_kl"],
        "policy/clipfrac_avg": of_policy["clip_fraction"],
        "policy/entropy_avg": entropy,
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        "val/clipfrac_avg": of_value["clip_fraction"],
        "val/ratio": of_policy["ratio"],
        "val/ratio_var": of_policy["ratio_var"],
        "ratio_error": jnp.abs(jnp.expm1(log_ratio)).max(),
    }
    return policy_loss + hyper.value_coef * value_loss - hyper.entropy_coef * entropy, metrics


def learn(
    state: State,
    samples: Rollout,
    scores: Array,
    ref_params: Params,
    hyper: Hyperparameters,
    *,
    model: ActorCritic,
    optimizer: optax.GradientTransformation,
    config: Config,
) -> tuple[State, Metrics]:
    """The last phase: experience, then epochs × minibatches of updates, then the next β.

    Args:
      state: the state that `samples` was sampled from.
      samples: the rollout.
      scores: [B] what the reward says of it, or [B, T] of its tokens.
      ref_params: of the reference policy.
      hyper: the numbers.
      model: policy and value function.
      optimizer: the optimiser that made the state.
      config: epochs, minibatches, tokens.

    Returns:
      the next state and the metrics of the iteration: means over the updates made;
      `ppo/first_ratio_error`, the largest |ratio - 1| before the first of them; and
      `val/num_skipped`, how many were left out because a gradient was not finite. β stays where
      no sample has a score, or the divergence is not a number.

    Raises:
      ValueError: the minibatches do not divide the batch, or the micro-batches a minibatch.
    """
    samples, scores = sharding.split_rows((samples, scores))
    num_parts = of_whole_batch(config.num_minibatches, config.num_micro_batches)
    data, metrics = experience(
        state.params,
        samples,
        scores,
        ref_params,
        hyper,
        state.kl_coef,
        model=model,
        num_micro_batches=num_parts,
    )
    params, opt_state, measured = descend(
        lambda params, minibatch: loss(
            params, minibatch, hyper, model=model, num_micro_batches=config.num_micro_batches
        ),
        state.params,
        state.opt_state,
        data,
        iteration.keys(state)[1],
        wanted=lambda minibatch: minibatch.rollout.response_mask.any(),
        optimizer=optimizer,
        num_epochs=config.num_epochs,
        num_minibatches=config.num_minibatches,
    )
    metrics["ppo/first_ratio_error"] = measured.pop("ratio_error")[0]
    metrics |= over_updates(measured)
    if config.end_token is not None:
        ended = (samples.responses[..., None] == jnp.asarray(config.end_token)).any(-1)
        metrics["val/num_eos_tokens"] = (ended & data.rollout.response_mask).sum()
    kl_coef = kl.adaptive_coef(
        state.kl_coef,
        metrics["objective/kl"],
        target=hyper.kl_target,
        horizon=hyper.kl_horizon,
        num_samples=metrics["val/num_scored"],
    )
    kl_coef = jnp.where(jnp.isnan(kl_coef), state.kl_coef, kl_coef)
    num_skipped = state.num_skipped + metrics["val/num_skipped"]
    return State(params, opt_state, state.key, state.step + 1, num_skipped, kl_coef), metrics


make_step, make_halves = iteration.makers(sample, learn, policy_of=lambda model: model.policy)
