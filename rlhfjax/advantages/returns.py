"""Returns and advantages of token rewards, backwards in time.

A masked token is skipped: it costs no discount, and its reward and value are never read (verl,
Tunix). The other conventions are compositions. To take masked tokens for ordinary ones (TRL, trlx),
pass a mask of ones. To count them as steps of no reward and no value (OpenRLHF, HALOs), pass
`masked.fill` of rewards and values with a mask of ones. Rows of `rollout.Episodes` have padding
between their turns, and ones would count it as time: pass `with_observations.response_mask` instead
of ones there, which is True at observations and not at padding.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked
from rlhfjax.advantages.rewards import spread


def discounted_returns(
    rewards: Array,
    mask: Array,
    *,
    gamma: float | Array,
    bootstrap_value: float | Array = 0.0,
) -> Array:
    """Gₜ = rₜ + γₜ·G(next), where "next" is the next True token.

    Args:
      rewards: [..., T].
      mask: [..., T] bool.
      gamma: a scalar, or per step and broadcastable to [..., T] (0 where an episode ends).
      bootstrap_value: [...] or scalar, the return of the state after the last token.

    Returns:
      [..., T] float32; 0 at masked tokens.

    Raises:
      AssertionError: shapes differ, no time axis, or `mask` is not bool.
    """
    _check(mask, rewards)
    return _accumulate(masked.fill(rewards, mask), gamma, mask, bootstrap_value)


def lambda_returns(
    rewards: Array,
    next_values: Array,
    mask: Array,
    *,
    gamma: float | Array,
    gae_lambda: float | Array,
) -> Array:
    """Gₜ = rₜ + γₜ·((1 - λ)·V(sₜ₊₁) + λ·G(next)), bootstrapped with V after the last True token.

    Args:
      rewards: [..., T].
      next_values: [..., T], the value of the state after token t.
      mask: [..., T] bool.
      gamma: a scalar, or per step and broadcastable to [..., T].
      gae_lambda: λ, likewise.

    Returns:
      [..., T] float32; 0 at masked tokens. `gae` returns the same as its second result.

    Raises:
      AssertionError: shapes differ, no time axis, or `mask` is not bool.

    References:
      Sutton and Barto 2018, Reinforcement Learning, §12.1; per-step discounts as in rlax.
    """
    _check(mask, rewards, next_values)
    gamma = _per_step(gamma, mask)
    mixing = jnp.where(_any_later(mask), _per_step(gae_lambda, mask), 0.0)
    steps = masked.fill(rewards, mask) + gamma * (1.0 - mixing) * masked.fill(next_values, mask)
    return _accumulate(steps, gamma * mixing, mask, 0.0)


def n_step_returns(
    rewards: Array, next_values: Array, mask: Array, *, gamma: float | Array, num_steps: int
) -> Array:
    """Gₜ = rₜ + γₜ·rₜ₊₁ + … over n True tokens, then the value of the state after the last of them.

    Fewer than n remain at the end: as many as there are.

    Args:
      rewards: [..., T].
      next_values: [..., T], the value of the state after token t.
      mask: [..., T] bool.
      gamma: a scalar, or per step and broadcastable to [..., T].
      num_steps: n. Static.

    Returns:
      [..., T] float32; 0 at masked tokens.

    Raises:
      AssertionError: shapes differ, no time axis, or `mask` is not bool.
      ValueError: n < 1.

    References:
      Sutton and Barto 2018, Reinforcement Learning, §7.1; per-step discounts as in rlax.
    """
    _check(mask, rewards, next_values)
    if num_steps < 1:
        raise ValueError(f"n-step returns take at least one step, got num_steps={num_steps}")
    gamma = _per_step(gamma, mask)
    rewards, next_values = masked.fill(rewards, mask), masked.fill(next_values, mask)
    # A token's return over k steps is its reward and what the next one has over k - 1.
    returns = rewards + gamma * next_values
    for _ in range(1, min(num_steps, mask.shape[-1])):
        following = carry_back(returns[..., 1:], mask[..., 1:])
        following = jnp.pad(following, [(0, 0)] * (mask.ndim - 1) + [(0, 1)])
        returns = rewards + gamma * jnp.where(_any_later(mask), following, next_values)
    return masked.fill(returns, mask)


def gae(
    rewards: Array,
    values: Array,
    mask: Array,
    *,
    gamma: float | Array,
    gae_lambda: float | Array,
    bootstrap_value: float | Array = 0.0,
) -> tuple[Array, Array]:
    """Generalised advantage estimation that skips masked tokens.

    δₜ = rₜ + γₜ·V(next) - Vₜ and Aₜ = δₜ + γₜ·λ·A(next), where "next" is the next True token: a
    masked token costs no discount, and its reward and value are never read (verl, Tunix).

    Args:
      rewards: [..., T].
      values: [..., T], Vₜ is the value of the state before token t.
      mask: [..., T] bool.
      gamma: a scalar, or per step and broadcastable to [..., T] (0 where an episode ends).
      gae_lambda: a scalar, or broadcastable to [..., T].
      bootstrap_value: [...] or scalar, the value of the state after the last token.

    Returns:
      advantages: [..., T] float32; 0 at masked tokens.
      returns: [..., T] float32, advantages + values; 0 at masked tokens.

    Raises:
      AssertionError: shapes differ, no time axis, or `mask` is not bool.

    References:
      Schulman et al. 2015, High-Dimensional Continuous Control Using Generalized Advantage
      Estimation, eq. 16; per-step discounts and bootstrap as in rlax.
    """
    _check(mask, rewards, values)
    rewards, values = masked.fill(rewards, mask), masked.fill(values, mask)

    def step(
        carry: tuple[Array, Array], at: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array], Array]:
        next_value, next_advantage = carry
        reward, value, real, discount, decay = at
        advantage = reward + discount * next_value - value + decay * next_advantage
        carry = (
            jnp.where(real, value, next_value),
            jnp.where(real, advantage, next_advantage),
        )
        return carry, advantage

    discounts = _per_step(gamma, mask)
    decays = discounts * _per_step(gae_lambda, mask)
    last_value = jnp.broadcast_to(jnp.asarray(bootstrap_value, jnp.float32), rewards.shape[:-1])
    time_major = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask, discounts, decays)]
    _, advantages = jax.lax.scan(
        step, (last_value, jnp.zeros_like(last_value)), tuple(time_major), reverse=True
    )
    advantages = jnp.moveaxis(advantages, 0, -1)
    return masked.fill(advantages, mask), masked.fill(advantages + values, mask)


def remax(rewards: Array, baselines: Array, mask: Array) -> Array:
    """Aₜ = Σ_{s≥t} rₛ - b: the return less the score of the greedy response to the same prompt.

    Args:
      rewards: [..., T] of a sampled response.
      baselines: [...] b, the score of the greedy one.
      mask: [..., T] bool.

    Returns:
      [..., T] float32; 0 at masked tokens.

    Raises:
      AssertionError: shapes do not fit or `mask` is not bool.

    References:
      Li et al. 2024, ReMax, eq. 6.
    """
    return discounted_returns(rewards, mask, gamma=1.0) - spread(baselines, mask)


def value_targets(advantages: Array, values: Array) -> Array:
    """Rₜ = Aₜ + Vₜ, before any whitening: what the value function is trained towards.

    Args:
      advantages: [..., T].
      values: [..., T].

    Returns:
      [..., T] float32.

    Raises:
      AssertionError: shapes differ.
    """
    chex.assert_equal_shape([advantages, values])
    return advantages.astype(jnp.float32) + values.astype(jnp.float32)


def carry_back(x: Array, mask: Array) -> Array:
    """x at the True tokens; elsewhere what the next True token has, 0 behind the last.

    So verl and Tunix lay out advantages at masked tokens.

    Args:
      x: [..., T].
      mask: [..., T] bool.

    Returns:
      [..., T] float32.

    Raises:
      AssertionError: shapes differ, no time axis, or `mask` is not bool.
    """
    _check(mask, x)
    x = masked.fill(x, mask)
    size = mask.shape[-1]
    here = jnp.where(mask, jnp.arange(size), size)
    source = jax.lax.cummin(here, axis=mask.ndim - 1, reverse=True)
    padded = jnp.pad(x, [(0, 0)] * (mask.ndim - 1) + [(0, 1)])
    return jnp.take_along_axis(padded, source, axis=-1)


def _check(mask: Array, *others: Array) -> None:
    chex.assert_rank(mask, set(range(1, mask.ndim + 1)))
    chex.assert_equal_shape([mask, *others])
    chex.assert_type(mask, bool)


def _per_step(x: float | Array, mask: Array) -> Array:
    return masked.fill(jnp.broadcast_to(x, mask.shape), mask)


def _accumulate(
    steps: Array, decays: float | Array, mask: Array, bootstrap_value: float | Array
) -> Array:
    """yₜ = stepₜ + decayₜ·y(next True token), 0 at masked tokens."""
    decays = _per_step(decays, mask)
    last = jnp.broadcast_to(jnp.asarray(bootstrap_value, jnp.float32), steps.shape[:-1])

    def back(following: Array, at: tuple[Array, ...]) -> tuple[Array, Array]:
        step, decay, real = at
        total = step + decay * following
        return jnp.where(real, total, following), total

    time_major = tuple(jnp.moveaxis(x, -1, 0) for x in (steps, decays, mask))
    _, totals = jax.lax.scan(back, last, time_major, reverse=True)
    return masked.fill(jnp.moveaxis(totals, 0, -1), mask)


def _any_later(mask: Array) -> Array:
    counts = jax.lax.cumsum(mask.astype(jnp.int32), axis=mask.ndim - 1, reverse=True)
    return counts - mask > 0
