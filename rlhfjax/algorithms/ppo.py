"""Proximal policy optimisation under a KL penalty: one program from prompts to new parameters.

An iteration is `sample` → a reward → `learn`; `make_step` compiles the whole of it, `make_halves`
the two halves around a reward that is a Python function.  Every phase is public, takes what the
phase before it returned, and can be replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rlhfjax import advantages, kl, masked, rollout, sampling
from rlhfjax.log_probs import response_inputs, response_log_probs, token_log_probs_and_entropy
from rlhfjax.losses import policy, value
from rlhfjax.models.actor_critic import ActorCritic
from rlhfjax.types import Params, Rollout

Metrics = dict[str, Array]
Reward = Callable[[Params, Rollout], Array]
Learned = tuple[Params, optax.OptState]


@dataclass(frozen=True)
class Config:
    """What decides shapes and loops; static.

    Attributes:
      num_tokens: T, length of responses.
      pad_token: fills responses behind the end token.
      end_token: ends a response; None: every response has T tokens.
      num_epochs: passes over each batch of rollouts.
      num_minibatches: updates in each pass; must divide the batch.
      sampler: from logits and uniform numbers to tokens, see `rollout.generate`.
    """

    num_tokens: int
    pad_token: int
    end_token: int | None = None
    num_epochs: int = 4
    num_minibatches: int = 4
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
      step: [] int32, iterations done.
      kl_coef: [] float32, β.
    """

    params: Params
    opt_state: optax.OptState
    key: Array
    step: Array
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
    return State(params, optimizer.init(params), jnp.copy(key), jnp.int32(0), beta)


def _keys(state: State) -> tuple[Array, Array]:
    sample_key, shuffle_key = jax.random.split(jax.random.fold_in(state.key, state.step))
    return sample_key, shuffle_key


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
        _keys(state)[0],
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
) -> tuple[Experience, Metrics]:
    """Reference and value passes, token rewards r = -β·k1 + score, GAE, whitening.

    A sample whose score is not finite is taken out of every statistic, and counted.

    Args:
      params: of the `ActorCritic` at the time of sampling.
      samples: the rollout.
      scores: [B]
      ref_params: of the reference policy.
      hyper: the numbers.
      kl_coef: [] β.
      model: policy and value function.

    Returns:
      the experience, and the `objective/…` metrics.
    """
    num_tokens = samples.response_mask.shape[1]
    scored = jnp.isfinite(scores)
    scores = jnp.where(scored, scores, 0.0)
    mask = samples.response_mask & scored[:, None]
    samples = replace(samples, response_mask=mask)
    inputs = response_inputs(samples.tokens, samples.attention_mask, num_tokens)
    values = samples.values
    if values is None:
        values = model.outputs(params, **inputs)[1]
    ref_log_probs, _ = response_log_probs(
        model.policy,
        ref_params,
        samples.tokens,
        samples.attention_mask,
        num_tokens,
        temperature=hyper.temperature,
    )
    divergence = jnp.where(mask, kl.k1(samples.log_probs, ref_log_probs), 0.0)
    rewards = advantages.token_rewards(scores, divergence, mask, kl_coef=kl_coef)
    token_advantages, returns = advantages.gae(
        rewards, values, mask, gamma=hyper.gamma, gae_lambda=hyper.gae_lambda
    )
    mean_kl = masked.mean(divergence.sum(1), scored)
    mean_score = masked.mean(scores, scored)
    metrics = {
        "objective/kl": mean_kl,
        "objective/entropy": masked.mean(masked.sum(-samples.log_probs, mask, axis=1), scored),
        "objective/non_score_reward": -kl_coef * mean_kl,
        "objective/rlhf_reward": mean_score - kl_coef * mean_kl,
        "objective/scores": mean_score,
        "objective/kl_coef": kl_coef,
        "val/num_unscored": (~scored).sum(),
    }
    whitened = masked.whiten(token_advantages, mask)
    return Experience(samples, values, whitened, returns), metrics


def loss(
    params: Params, batch: Experience, hyper: Hyperparameters, *, model: ActorCritic
) -> tuple[Array, Metrics]:
    """Clipped policy loss + c_v · clipped value loss - c_e · entropy, token means.

    Args:
      params: of the `ActorCritic`.
      batch: a minibatch of experience.
      hyper: the numbers.
      model: policy and value function.

    Returns:
      the loss and the metrics of this minibatch.

    References:
      Schulman et al. 2017, Proximal Policy Optimization Algorithms, eq. 9.
    """
    samples, mask = batch.rollout, batch.rollout.response_mask
    inputs = response_inputs(samples.tokens, samples.attention_mask, mask.shape[1])
    hidden, values = model.outputs(params, **inputs)
    log_probs, entropies = token_log_probs_and_entropy(
        model.policy.logits(params["policy"], hidden),
        samples.responses,
        temperature=hyper.temperature,
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
      scores: [B] what the reward says of it.
      ref_params: of the reference policy.
      hyper: the numbers.
      model: policy and value function.
      optimizer: the optimiser that made the state.
      config: epochs, minibatches, tokens.

    Returns:
      the next state and the metrics of the iteration: means over its updates, and
      `ppo/first_ratio_error`, the largest |ratio - 1| before the first of them.

    Raises:
      ValueError: the minibatches do not divide the batch.
    """
    batch, parts = samples.tokens.shape[0], config.num_minibatches
    if batch % parts:
        raise ValueError(
            f"a batch of {batch} does not divide into num_minibatches={parts}: "
            "choose a divisor, or another number of prompts"
        )
    data, metrics = experience(
        state.params, samples, scores, ref_params, hyper, state.kl_coef, model=model
    )

    def update(carry: Learned, rows: Array) -> tuple[Learned, Metrics]:
        params, opt_state = carry
        minibatch = jax.tree.map(lambda x: x[rows], data)
        grads, measured = jax.grad(loss, has_aux=True)(params, minibatch, hyper, model=model)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), measured

    epoch_keys = jax.random.split(_keys(state)[1], config.num_epochs)
    rows = jax.vmap(lambda key: jax.random.permutation(key, batch))(epoch_keys)
    (params, opt_state), measured = jax.lax.scan(
        update, (state.params, state.opt_state), rows.reshape(-1, batch // parts)
    )
    ratio_error = measured.pop("ratio_error")
    metrics |= {name: x.mean() for name, x in measured.items()}
    metrics["ppo/first_ratio_error"] = ratio_error[0]
    if config.end_token is not None:
        ended = (samples.responses == config.end_token) & data.rollout.response_mask
        metrics["val/num_eos_tokens"] = ended.sum()
    kl_coef = kl.adaptive_coef(
        state.kl_coef,
        metrics["objective/kl"],
        target=hyper.kl_target,
        horizon=hyper.kl_horizon,
        num_samples=batch,
    )
    return State(params, opt_state, state.key, state.step + 1, kl_coef), metrics


def make_step(
    model: ActorCritic,
    reward: Reward,
    optimizer: optax.GradientTransformation,
    config: Config,
) -> Callable[..., tuple[State, Metrics]]:
    """A whole iteration as one compiled program, to scan over iterations or vmap over seeds.

    Args:
      model: policy and value function.
      reward: `(reward_params, rollout) -> scores [B]`, pure.
      optimizer: any optax optimiser; one update a minibatch.
      config: what is static.

    Returns:
      `step(state, prompts, prompt_mask, ref_params, reward_params, hyper) -> (state, metrics)`.
      The state is donated.
    """

    draw = partial(sample, model=model, config=config)
    update = partial(learn, model=model, optimizer=optimizer, config=config)

    def step(
        state: State,
        prompts: Array,
        prompt_mask: Array,
        ref_params: Params,
        reward_params: Params,
        hyper: Hyperparameters,
    ) -> tuple[State, Metrics]:
        samples = draw(state, prompts, prompt_mask, hyper)
        return update(state, samples, reward(reward_params, samples), ref_params, hyper)

    return jax.jit(step, donate_argnums=0)


def make_halves(
    model: ActorCritic, optimizer: optax.GradientTransformation, config: Config
) -> tuple[Callable[..., Rollout], Callable[..., tuple[State, Metrics]]]:
    """The same iteration as two compiled programs, for a reward that runs in Python.

    Args:
      model: policy and value function.
      optimizer: any optax optimiser.
      config: what is static.

    Returns:
      `sample(state, prompts, prompt_mask, hyper) -> rollout` and
      `learn(state, rollout, scores, ref_params, hyper) -> (state, metrics)`, which donates the
      state. `rewards.call` turns a Python function's answer into scores.
    """

    draw = partial(sample, model=model, config=config)
    update = partial(learn, model=model, optimizer=optimizer, config=config)
    return jax.jit(draw), jax.jit(update, donate_argnums=0)
