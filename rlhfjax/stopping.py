"""When to stop a training run: where more of the reward it sees is less of what it stands for."""

import chex
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def turning_point(
    kl: Array,
    proxy: Array,
    gold: Array,
    *,
    window: int = 5,
    num_errors: float | Array = 5.0,
) -> tuple[Array, Array]:
    """argmax of the gold score, once gold has fallen from there while the proxy has risen.

    With x̄ᵢ the mean of `window` consecutive points, i* = argmax ḡᵢ, and e the last window:

        ḡᵢ* - ḡₑ > num_errors·s(gold)  and  p̄ₑ - p̄ᵢ* > num_errors·s(proxy),

    where s(x) = σ·√(2/window) is the standard error of a difference of two such means, and
    σ² = Σ (xᵢ₋₁ - 2xᵢ + xᵢ₊₁)² / 6(n - 2) is the noise of a point around its neighbours, free of
    any trend. Points are taken in the order of the log, since a policy that is held at one KL can
    turn there too; those where a number is not finite are left out. The run behind a log in
    `metrics.jsonl`, with a second reward model, a held-out judge or a true score as gold:

        rows = [row for row in map(json.loads, open(path)) if row["stage"] == "ppo"]
        kl, proxy, gold = (
            np.array([row.get(name) for row in rows], float)
            for name in ("objective/kl", "objective/scores", "gold/positive_rate")
        )
        turn, index = stopping.turning_point(kl, proxy, gold)
        if jnp.isfinite(turn):
            print(f"over-optimised beyond {turn:.1f} nats, step {rows[index]['step']}")

    Args:
      kl: [..., K] of the policy from the reference, at each logged point.
      proxy: [..., K], the score that is optimised.
      gold: [..., K], a score that is not.
      window: points in a mean, static; fewer than two windows of points, or than four, are
        never a turn.
      num_errors: standard errors that count as a change. Noisy gold that only stays flat has its
        maximum somewhere and lies below it ever after: watched at each of 200 points, 4 of them
        call that a turn in one run of six, 5 in one of a hundred.

    Returns:
      [...] float32, the mean KL of the window at the turning point; infinite while there is none.
      [...] int32, the point in its middle; K while there is none.

    Raises:
      AssertionError: shapes differ, they are scalars, or `window` is not positive.

    References:
      Gao, Schulman and Hilton 2022, Scaling Laws for Reward Model Overoptimization; Gasser, Sroka
      and Jennen-Steinmetz 1986, Residual Variance and Residual Pattern in Nonlinear Regression (σ).
    """
    chex.assert_equal_shape([kl, proxy, gold])
    chex.assert_rank(kl, set(range(1, jnp.ndim(kl) + 1)))
    chex.assert_scalar_positive(window)
    num_points = jnp.shape(kl)[-1]
    fewest = max(2 * window, 4)
    if num_points < fewest:
        return jnp.full(kl.shape[:-1], jnp.inf), jnp.full(kl.shape[:-1], num_points)

    history = jnp.stack([kl, proxy, gold]).astype(jnp.float32)
    real = jnp.isfinite(history).all(0)
    count = real.sum(-1, keepdims=True)
    # Real points first, in their order: a point that is left out leaves no gap.
    order = jnp.argsort(~real, axis=-1, stable=True)
    history = masked.fill(history, jnp.broadcast_to(real, history.shape))
    history = jnp.take_along_axis(history, jnp.broadcast_to(order, history.shape), axis=-1)

    starts = num_points - window + 1
    shifted = [history[..., i : i + starts] for i in range(window)]
    kl, proxy, gold = jnp.mean(jnp.stack(shifted), axis=0)
    whole = jnp.arange(starts) <= count - window
    best = jnp.argmax(jnp.where(whole, gold, -jnp.inf), axis=-1, keepdims=True)
    last = jnp.maximum(count - window, 0)

    def at(x: Array, place: Array) -> Array:
        return jnp.take_along_axis(x, place, axis=-1)

    bends = history[..., :-2] - 2 * history[..., 1:-1] + history[..., 2:]
    between = jnp.broadcast_to(jnp.arange(num_points - 2) < count - 2, bends.shape)
    noise = masked.mean(jnp.square(bends), between, axis=-1, keepdims=True) / 6
    _, proxy_error, gold_error = num_errors * jnp.sqrt(2 * noise / window)
    fallen = at(gold, best) - at(gold, last) > gold_error
    risen = at(proxy, last) - at(proxy, best) > proxy_error
    turned = fallen & risen & (count >= fewest)
    middle = at(order, best + (window - 1) // 2)
    turn, index = jnp.where(turned, at(kl, best), jnp.inf), jnp.where(turned, middle, num_points)
    return turn[..., 0], index[..., 0]
