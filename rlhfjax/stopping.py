"""When to stop a training run, told from its history.

A history is a metric at each point of the log, and a point where it is not finite is left out. So a
log of a known length can be handed over before it is full, with NaN for what is to come, and one
compiled program watches all of the run.
"""

import chex
import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax import masked


def reached(x: Array, *, level: float | Array, window: int = 1) -> Array:
    """The first point that ends `window` consecutive ones with a mean of at least `level`.

    For a score that is good enough, and for a KL budget that is spent.

    Args:
      x: [..., K]
      level: what the mean must reach.
      window: points in a mean, static.

    Returns:
      [...] int32; K while there is none.

    Raises:
      AssertionError: `x` is a scalar or `window` is not positive.
    """
    x, order, count = _real_first(x)
    chex.assert_scalar_positive(window)
    num_points = x.shape[-1]
    if num_points < window:
        return jnp.full(x.shape[:-1], num_points)
    ends = jnp.arange(window - 1, num_points)
    found = (_means(x, window) >= level) & (ends < count)
    first = jnp.argmax(found, axis=-1, keepdims=True) + window - 1
    index = jnp.take_along_axis(order, first, axis=-1)[..., 0]
    return jnp.where(found.any(-1), index, num_points)


def plateau(x: Array, *, patience: int | Array, min_gain: float | Array = 0.0) -> Array:
    """The first point at which `patience` points have passed since x last rose to a new best.

    A best is new where x > best + min_gain; the first point is one. Give -x for what should fall.

    Args:
      x: [..., K]
      patience: points, at least 1.
      min_gain: what does not count as a rise.

    Returns:
      [...] int32; K while there is none.

    Raises:
      AssertionError: `x` is a scalar.

    References:
      Prechelt 1998, Early Stopping - But When?; as `EarlyStoppingCallback` of transformers.
    """
    x, order, count = _real_first(x)
    num_points = x.shape[-1]

    def watch(carry: tuple[Array, Array], at: Array) -> tuple[tuple[Array, Array], Array]:
        best, since = carry
        rises = at > best + min_gain
        since = jnp.where(rises, 0, since + 1)
        return (jnp.where(rises, at, best), since), since

    begin = jnp.full(x.shape[:-1], -jnp.inf), jnp.zeros(x.shape[:-1], jnp.int32)
    _, since = jax.lax.scan(watch, begin, jnp.moveaxis(x, -1, 0))
    found = (jnp.moveaxis(since, 0, -1) >= patience) & (jnp.arange(num_points) < count)
    first = jnp.argmax(found, axis=-1, keepdims=True)
    index = jnp.take_along_axis(order, first, axis=-1)[..., 0]
    return jnp.where(found.any(-1), index, num_points)


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
    turn there too. A point counts where all three numbers are finite. The run behind a log in
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

    history, order, count = _real_first(kl, proxy, gold)
    kl, proxy, gold = _means(history, window)
    whole = jnp.arange(num_points - window + 1) <= count - window
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


def _real_first(*histories: Array) -> tuple[Array, Array, Array]:
    """Histories [n, ..., K], or [..., K] of a single one, their points that are real at the front.

    Returns:
      the histories, 0 behind; [..., K] which point each was; [..., 1] how many are real.
    """
    chex.assert_rank(histories, set(range(1, jnp.ndim(histories[0]) + 1)))
    stacked = jnp.stack(histories).astype(jnp.float32)
    real = jnp.isfinite(stacked).all(0)
    order = jnp.argsort(~real, axis=-1, stable=True)
    filled = masked.fill(stacked, jnp.broadcast_to(real, stacked.shape))
    front = jnp.take_along_axis(filled, jnp.broadcast_to(order, stacked.shape), axis=-1)
    return front[0] if len(histories) == 1 else front, order, real.sum(-1, keepdims=True)


def _means(x: Array, window: int) -> Array:
    """[..., K] → [..., K - window + 1], of consecutive points."""
    starts = x.shape[-1] - window + 1
    return jnp.mean(jnp.stack([x[..., i : i + starts] for i in range(window)]), axis=0)
