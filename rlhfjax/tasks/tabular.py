"""P prompts, V tokens, responses of T tokens: few enough (V^T) that everything can be enumerated.

The objective is J(π) = mean over prompts of E_π[r] - β·KL(π ‖ π_ref), its only maximiser
π*(y) ∝ π_ref(y)·exp(r(y)/β). Responses are enumerated with the first token slowest. A distribution
over them is given by log-probabilities [P, N], N = V^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import kl, masked
from rlhfjax.log_probs import response_log_probs
from rlhfjax.types import LanguageModel, Params, Rollout, ScalarModel


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Task:
    """A table of rewards.

    Attributes:
      prompts: [P, K] int32, the prompt's number in K digits of base V.
      responses: [N, T] int32, all of them.
      rewards: [P, N] float32.
    """

    prompts: Array
    responses: Array
    rewards: Array

    @property
    def vocab_size(self) -> int:
        """V, of which N = V^T."""
        num_responses, length = self.responses.shape
        return round(num_responses ** (1 / length))


def draw(key: Array, *, num_prompts: int, vocab_size: int, length: int) -> Task:
    """A task with standard normal rewards.

    Args:
      key: a typed key; consumed.
      num_prompts: P.
      vocab_size: V, at least 2.
      length: T.

    Returns:
      a `Task` of V^T responses a prompt.

    Raises:
      ValueError: no prompt, fewer than two tokens, or no length.
    """
    if num_prompts < 1 or vocab_size < 2 or length < 1:
        raise ValueError(
            f"num_prompts={num_prompts}, vocab_size={vocab_size}, length={length}: at least 1, 2 "
            "and 1 are needed"
        )
    num_digits = _num_digits(num_prompts, vocab_size)
    responses = _digits(jnp.arange(vocab_size**length), vocab_size, length)
    return Task(
        prompts=_digits(jnp.arange(num_prompts), vocab_size, num_digits),
        responses=responses,
        rewards=jax.random.normal(key, (num_prompts, len(responses))),
    )


def logit_table(*, num_prompts: int, vocab_size: int, length: int) -> LanguageModel:
    """The policy that can be anything: one logit for every prompt, prefix and next token.

    Its parameters are `{"logits": [P, M, V]}` for the M prefixes of fewer than T tokens, standard
    normal. Prefixes are numbered level by level: the empty one is 0, that of n and a token a is
    n·V + 1 + a. Prompts must be those of the task, without padding.

    Args:
      num_prompts: P.
      vocab_size: V.
      length: T.

    Returns:
      a `LanguageModel`; its hidden states are logits.
    """
    num_digits = _num_digits(num_prompts, vocab_size)
    num_prefixes = (vocab_size**length - 1) // (vocab_size - 1)

    def init(key: Array) -> Params:
        return {"logits": jax.random.normal(key, (num_prompts, num_prefixes, vocab_size))}

    def rows(params: Params, prompt: Array, prefix: Array) -> Array:
        # A whole response is no prefix: it has no row, and nobody asks for what follows it.
        return params["logits"].at[prompt, prefix].get(mode="fill", fill_value=0.0)

    def hidden(params: Params, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        prompt, prefixes = _prefixes(tokens, num_digits, vocab_size)
        states = rows(params, prompt[:, None], prefixes)
        return jnp.pad(states, ((0, 0), (num_digits - 1, 0), (0, 0)))[:, first:]

    def start(prompts: Array) -> tuple[Array, Array]:
        return _number(prompts, vocab_size), jnp.zeros(len(prompts), jnp.int32)

    def prefill(
        params: Params, prompts: Array, mask: Array, *, length: int
    ) -> tuple[Array, tuple[Array, Array]]:
        cache = start(prompts)
        return rows(params, *cache), cache

    def decode(
        params: Params, cache: tuple[Array, Array], tokens: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        prompt, prefix = cache[0], _extended(cache[1], tokens, vocab_size)
        return rows(params, prompt, prefix), (prompt, prefix)

    def logits(params: Params, hidden: Array) -> Array:
        return hidden

    return LanguageModel(
        init, hidden, prefill, decode, logits, vocab_size, context_length=num_digits + length
    )


def value_table(*, num_prompts: int, vocab_size: int, length: int) -> ScalarModel:
    """The value function that can be anything: one number for every prompt and prefix.

    Its parameters are `{"values": [P, M]}`, all 0, with the prefixes of `logit_table`.

    Args:
      num_prompts: P.
      vocab_size: V.
      length: T.

    Returns:
      a `ScalarModel`.
    """
    num_digits = _num_digits(num_prompts, vocab_size)
    num_prefixes = (vocab_size**length - 1) // (vocab_size - 1)

    def init(key: Array) -> Params:
        return {"values": jnp.zeros((num_prompts, num_prefixes))}

    def values(params: Params, tokens: Array, attention_mask: Array, *, first: int = 0) -> Array:
        prompt, prefixes = _prefixes(tokens, num_digits, vocab_size)
        found = params["values"].at[prompt[:, None], prefixes].get(mode="fill", fill_value=0.0)
        return jnp.pad(found, ((0, 0), (num_digits - 1, 0)))[:, first:]

    return ScalarModel(init, values, vocab_size, context_length=num_digits + length)


def log_probs(model: LanguageModel, params: Params, task: Task) -> Array:
    """log π(y | x) of every response to every prompt.

    Args:
      model: any language model over the task's tokens.
      params: its parameters.
      task: P prompts and N responses.

    Returns:
      [P, N] float32.
    """
    return token_log_probs(model, params, task).sum(-1)


def token_log_probs(model: LanguageModel, params: Params, task: Task) -> Array:
    """log π(yₜ | x, y₍₁…ₜ₋₁₎) of every token of every response to every prompt.

    Args:
      model: any language model over the task's tokens.
      params: its parameters.
      task: P prompts and N responses of T tokens.

    Returns:
      [P, N, T] float32.
    """
    (num_prompts, num_digits), (num_responses, length) = task.prompts.shape, task.responses.shape
    whole = (num_prompts, num_responses, num_digits + length)
    prompts = jnp.broadcast_to(task.prompts[:, None], (*whole[:2], num_digits))
    responses = jnp.broadcast_to(task.responses, (*whole[:2], length))
    tokens = jnp.concatenate([prompts, responses], axis=-1).reshape(-1, whole[2])
    scored, _ = response_log_probs(model, params, tokens, jnp.ones(tokens.shape, bool), length)
    return scored.reshape(num_prompts, num_responses, length)


def score(task: Task, samples: Rollout) -> Array:
    """The reward of sampled responses.

    Args:
      task: the rewards.
      samples: responses of T tokens to the task's prompts.

    Returns:
      [B] float32.
    """
    return task.rewards[numbers(task, samples)]


def numbers(task: Task, samples: Rollout) -> tuple[Array, Array]:
    """Where samples stand in tables [P, N].

    Args:
      task: the prompts and responses.
      samples: responses of T tokens to the task's prompts.

    Returns:
      the number of each prompt [B] and of each response [B].
    """
    base = task.vocab_size
    return _number(samples.prompts, base), _number(samples.responses, base)


def expected_reward(log_probs: Array, task: Task) -> Array:
    """E_π[r] for each prompt.

    Args:
      log_probs: [P, N] of the policy.
      task: the rewards.

    Returns:
      [P] float32.
    """
    return jnp.sum(jnp.exp(log_probs) * task.rewards, axis=-1)


def divergence(log_probs: Array, ref_log_probs: Array) -> Array:
    """KL(π ‖ π_ref) for each prompt.

    Args:
      log_probs: [P, N] of the policy.
      ref_log_probs: [P, N] of the reference.

    Returns:
      [P] float32.
    """
    return kl.of_distributions(log_probs=log_probs, ref_log_probs=ref_log_probs)


def objective(
    log_probs: Array, ref_log_probs: Array, task: Task, *, kl_coef: float | Array
) -> Array:
    """J = mean over prompts of E_π[r] - β·KL(π ‖ π_ref).

    Args:
      log_probs: [P, N] of the policy.
      ref_log_probs: [P, N] of the reference.
      task: the rewards.
      kl_coef: β.

    Returns:
      scalar float32.
    """
    each = expected_reward(log_probs, task) - kl_coef * divergence(log_probs, ref_log_probs)
    return masked.mean(each, jnp.ones(each.shape, bool))


def gradient(
    model: LanguageModel,
    params: Params,
    ref_log_probs: Array,
    task: Task,
    *,
    kl_coef: float | Array,
) -> Params:
    """∇J with respect to the parameters of any policy.

    Args:
      model: the policy.
      params: its parameters.
      ref_log_probs: [P, N] of the reference.
      task: the rewards.
      kl_coef: β.

    Returns:
      a tree like the parameters.
    """

    def of_params(params: Params) -> Array:
        return objective(log_probs(model, params, task), ref_log_probs, task, kl_coef=kl_coef)

    return jax.grad(of_params)(params)


def optimum(ref_log_probs: Array, task: Task, *, kl_coef: float | Array) -> Array:
    """log π*, π*(y) ∝ π_ref(y)·exp(r(y)/β): the distribution that maximises `objective`.

    Args:
      ref_log_probs: [P, N] of the reference.
      task: the rewards.
      kl_coef: β.

    Returns:
      [P, N] float32.

    References:
      Ziebart et al. 2008; Korbak et al. 2022, RL with KL penalties is better viewed as Bayesian
      inference.
    """
    return jax.nn.log_softmax(ref_log_probs + task.rewards / kl_coef, axis=-1)


def preference_probs(task: Task) -> Array:
    """P(i preferred to j) = σ(rᵢ - rⱼ), Bradley-Terry, for all pairs of responses to a prompt.

    Args:
      task: the rewards.

    Returns:
      [P, N, N] float32.
    """
    return jax.nn.sigmoid(task.rewards[..., None] - task.rewards[..., None, :])


def _num_digits(num_prompts: int, vocab_size: int) -> int:
    num_digits = 1
    while vocab_size**num_digits < num_prompts:
        num_digits += 1
    return num_digits


def _extended(prefix: Array, token: Array, vocab_size: int) -> Array:
    return prefix * vocab_size + 1 + token


def _prefixes(tokens: Array, num_digits: int, vocab_size: int) -> tuple[Array, Array]:
    """Prompts [B], and [B, T + 1] prefixes from the empty one to the whole response."""

    def step(prefix: Array, token: Array) -> tuple[Array, Array]:
        prefix = _extended(prefix, token, vocab_size)
        return prefix, prefix

    empty = jnp.zeros(len(tokens), jnp.int32)
    _, prefixes = jax.lax.scan(step, empty, tokens[:, num_digits:].T)
    prefixes = jnp.concatenate([empty[None], prefixes]).T
    return _number(tokens[:, :num_digits], vocab_size), prefixes


def _digits(numbers: Array, base: int, num_digits: int) -> Array:
    return (numbers[:, None] // base ** jnp.arange(num_digits - 1, -1, -1)) % base


def _number(digits: Array, base: int) -> Array:
    return digits @ base ** jnp.arange(digits.shape[1] - 1, -1, -1)
