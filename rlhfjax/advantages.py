"""From scores to per-token rewards, and from rewards to advantages.

Nothing here whitens: `masked.whiten` is applied by the caller who wants it.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array


def token_rewards(
    scores: Array, kl: Array, response_mask: Array, *, kl_coef: float | Array
) -> Array:
    """rₜ = -β·klₜ, plus the score at the last True token.

    Args:
      scores: [...] one number a response.
      kl: [..., T] divergence from the reference at each token.
      response_mask: [..., T] bool. Gaps (the tokens of a tool, say) are allowed.
      kl_coef: β.

    Returns:
      [..., T] float32; 0 at masked tokens. A row without a True token gets no score.

    Raises:
      AssertionError: shapes do not fit or `response_mask` is not bool.

    References:
      Ziegler et al. 2019, Fine-Tuning Language Models from Human Preferences, eq. 2; the score
      at the last valid token as in verl and OpenRLHF.
    """
    chex.assert_equal_shape([kl, response_mask])
    chex.assert_shape(scores, kl.shape[:-1])
    chex.assert_type(response_mask, bool)
    remaining = jax.lax.cumsum(
        response_mask.astype(jnp.int32), axis=response_mask.ndim - 1, reverse=True
    )
    is_last = response_mask & (remaining == 1)
    penalty = kl_coef * jnp.where(response_mask, kl, 0).astype(jnp.float32)
    return jnp.where(is_last, scores[..., None].astype(jnp.float32), 0.0) - penalty


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

    The other conventions are compositions. To take masked tokens for ordinary ones (TRL, trlx),
    pass a mask of ones. To count them as steps of no reward and no value (OpenRLHF, HALOs), pass
    `rewards * mask`, `values * mask` and a mask of ones.

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
    chex.assert_rank(rewards, set(range(1, rewards.ndim + 1)))
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_type(mask, bool)
    rewards, values = rewards.astype(jnp.float32), values.astype(jnp.float32)

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

    discounts = jnp.broadcast_to(jnp.asarray(gamma, jnp.float32), rewards.shape)
    decays = discounts * gae_lambda
    last_value = jnp.broadcast_to(jnp.asarray(bootstrap_value, jnp.float32), rewards.shape[:-1])
    time_major = [jnp.moveaxis(x, -1, 0) for x in (rewards, values, mask, discounts, decays)]
    _, advantages = jax.lax.scan(
        step, (last_value, jnp.zeros_like(last_value)), tuple(time_major), reverse=True
    )
    advantages = jnp.moveaxis(advantages, 0, -1)
    return jnp.where(mask, advantages, 0.0), jnp.where(mask, advantages + values, 0.0)
