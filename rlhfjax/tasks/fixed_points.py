"""Where algorithms come to rest: the policies at which their expected update vanishes.

Not all of them maximise the objective of `tabular`. Each function here gives one such policy as
log-probabilities [P, N], responses in the order of `tabular`. The task has responses of T tokens,
none of which ends them early; samples are the policy's own, or those of a fixed sampler; a policy
can be anything. Which algorithm rests where, and why, is in `docs/fixed_points.md`.
"""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rlhfjax import masked
from rlhfjax.losses import unpaired
from rlhfjax.tasks import tabular
from rlhfjax.tasks.tabular import Task
from rlhfjax.types import Loss

MOST_NUMBERS = 2**27
"""A fixed point is not computed where it takes more."""


def token_k2(ref_log_probs: Array, task: Task, *, kl_coef: float | Array) -> Array:
    """π(a|s) ∝ π_ref(a|s)·exp(Q(s, a)/β), Q the reward to expect from π itself after (s, a).

    k2 of every token in the loss. The divergence of later tokens does not count in Q, so that it is
    `tabular.optimum` for T = 1 only.

    Args:
      ref_log_probs: [P, N] of the reference.
      task: the rewards.
      kl_coef: β.

    Returns:
      [P, N] float32.

    Raises:
      AssertionError: shapes differ.
    """

    def choose(ref_log_probs: Array, values: Array) -> Array:
        return jax.nn.log_softmax(ref_log_probs + values / kl_coef)

    return _last_token_first(choose, ref_log_probs, task)


def token_k3(ref_log_probs: Array, task: Task, *, kl_coef: float | Array) -> Array:
    """π(a|s) = β·π_ref(a|s)/(μ(s) - Q(s, a)), μ(s) > max Q such that it sums to 1.

    k3 of every token in the loss: forward KL. Q as in `token_k2`; μ(s) = β + E_π[Q(s, a)].

    Args:
      ref_log_probs: [P, N] of the reference.
      task: the rewards.
      kl_coef: β.

    Returns:
      [P, N] float32.

    Raises:
      AssertionError: shapes differ.
    """

    def choose(ref_log_probs: Array, values: Array) -> Array:
        # In units of β below the best: π = π_ref/(m + gap), the wanted m between π_ref of the best
        # and 1. 1/Σ π_ref/(m + gap) is concave in m, so that Newton's steps rise and never pass it.
        gaps = (values.max(-1, keepdims=True) - values) / kl_coef
        ref_probs = jnp.exp(ref_log_probs)

        def newton(_: int, m: Array) -> Array:
            shares = ref_probs / (m + gaps)
            total = shares.sum(-1, keepdims=True)
            slope = (shares / (m + gaps)).sum(-1, keepdims=True)
            return jnp.clip(m + total * (total - 1.0) / slope, m, 1.0)

        best = jnp.where(gaps == 0, ref_probs, 0.0).sum(-1, keepdims=True)
        m = jax.lax.fori_loop(0, 30, newton, best)
        return jax.nn.log_softmax(ref_log_probs - jnp.log(m + gaps))

    return _last_token_first(choose, ref_log_probs, task)


def group_std(
    ref_log_probs: Array,
    task: Task,
    *,
    kl_coef: float | Array,
    num_responses: int,
    eps: float | Array = 1e-4,
    solve: Callable[..., Array] = token_k3,
    num_steps: int = 300,
) -> Array:
    """`solve` for f_π, what division by the standard deviation of a group makes of the reward.

    f_π(y) = E[(r(y) - mean) / (σ + eps)] over groups of y and G - 1 draws from π, σ with ddof = 1;
    π is what `solve` finds for f_π. For G = 2 only ranks count: √2·f_π = P(r' < r) - P(r' > r).

    Args:
      ref_log_probs: [P, N] of the reference.
      task: the rewards. Of a prompt's, differences below 1e-5 of the range count as none if G > 2.
      kl_coef: β.
      num_responses: G, at least 2. Static.
      eps: added to σ.
      solve: `(ref_log_probs, task, *, kl_coef)` to the fixed point for a given reward.
      num_steps: the most that the iteration takes. Static.

    Returns:
      [P, N] float32.

    Raises:
      AssertionError: shapes differ.
      ValueError: groups of one, or more numbers than `MOST_NUMBERS`.
    """
    chex.assert_equal_shape([ref_log_probs, task.rewards])
    rewards = _normalised(task.rewards, num_responses, eps)

    def policy(rewards: Array) -> Array:
        return solve(ref_log_probs, Task(task.prompts, task.responses, rewards), kl_coef=kl_coef)

    def unsettled(carry: tuple[Array, Array, Array]) -> Array:
        step, _, change = carry
        return (step < num_steps) & (change > 1e-6)

    def settle(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The larger π(y), the less y stands out: whole steps would overshoot.
        step, now, _ = carry
        change = 0.5 * (rewards(policy(now)) - now)
        return step + 1, now + change, jnp.abs(change).max()

    start = (jnp.int32(0), rewards(ref_log_probs), jnp.float32(jnp.inf))
    return policy(jax.lax.while_loop(unsettled, settle, start)[1])


def ipo(
    ref_log_probs: Array, sampler_log_probs: Array, task: Task, *, kl_coef: float | Array
) -> Array:
    """π(y) ∝ π_ref(y)·exp(E[P(y preferred to y')]/β), y' from the sampler of the pairs.

    Args:
      ref_log_probs: [P, N] of the reference.
      sampler_log_probs: [P, N] of each response of a pair, up to a constant; zeros: uniform.
      task: the rewards, of which preferences are made as `tabular.preference_probs` says.
      kl_coef: β of `preference.ipo`, on sums over tokens; on means, β/T.

    Returns:
      [P, N] float32.

    Raises:
      AssertionError: shapes differ.
    """
    chex.assert_equal_shape([ref_log_probs, sampler_log_probs, task.rewards])
    wins = _wins(sampler_log_probs, task)
    return jax.nn.log_softmax(ref_log_probs + wins / kl_coef)


def kto(
    ref_log_probs: Array, sampler_log_probs: Array, task: Task, *, kl_coef: float | Array
) -> Array:
    """The limit of `unpaired.kto`: responses that lose more often than they win have no chance.

    With w(y) the chance that y is preferred to another draw of the sampler μ, and where w(y) > ½,
    π(y) ∝ μ(y)·(2·w(y) - 1)·σ'(β·log(π(y)/π_ref(y))); π(y) = 0 elsewhere. The baseline z is 0.

    Args:
      ref_log_probs: [P, N] of the reference.
      sampler_log_probs: [P, N] of each response of a pair, up to a constant; zeros: uniform.
      task: the rewards, of which preferences are made as `tabular.preference_probs` says.
      kl_coef: β of `unpaired.kto`, at most 1: there is no other limit then.

    Returns:
      [P, N] float32, -inf where π is 0; the reference where no response wins more often than not.

    Raises:
      AssertionError: shapes differ.
    """
    chex.assert_equal_shape([ref_log_probs, sampler_log_probs, task.rewards])
    winning, chances = _wins(sampler_log_probs, task), jax.nn.softmax(sampler_log_probs)

    def limit(reference: Array, wins: Array, chances: Array) -> Array:
        def loss(logits: Array) -> Array:
            def one(desirable: bool, weights: Array) -> Array:
                return unpaired.kto(
                    jax.nn.log_softmax(logits),
                    reference,
                    jnp.full(wins.shape, desirable),
                    jnp.zeros(()),
                    beta=kl_coef,
                    weights=weights * chances,
                    reduce=masked.sum,
                )[0]

            return one(True, wins) + one(False, 1.0 - wins)

        start = jnp.where(wins > 0.5, reference, -1e9)
        found = jnp.where(wins > 0.5, stationary(jax.grad(loss), start), -jnp.inf)
        return jnp.where((wins > 0.5).any(), found, reference)

    return jax.vmap(limit)(ref_log_probs, winning, chances)


def best_of_n(log_probs: Array, task: Task, *, num_samples: float | Array) -> Array:
    """P(y is the best of n draws) = F(r ≤ r(y))ⁿ - F(r < r(y))ⁿ; equal rewards share as π does.

    Fine-tuned on, and repeated k times from the newest policy, it is that of nᵏ.

    Args:
      log_probs: [P, N] of the policy that is drawn from, log π.
      task: the rewards.
      num_samples: n.

    Returns:
      [P, N] float32.

    Raises:
      AssertionError: shapes differ.

    References:
      Stiennon et al. 2020, Learning to summarize from human feedback; Beirami et al. 2024,
      Theoretical guarantees on the best-of-n alignment policy.
    """
    chex.assert_equal_shape([log_probs, task.rewards])

    def law(log_probs: Array, rewards: Array) -> Array:
        ordered = jnp.sort(rewards)
        level = jnp.searchsorted(ordered, rewards)
        of_level = jnp.zeros_like(log_probs).at[level].add(jnp.exp(log_probs))
        up_to = jnp.cumsum(of_level)[level]
        share = jnp.minimum(of_level[level] / up_to, 1.0)
        # Fⁿ - (F - p)ⁿ = Fⁿ·(1 - (1 - p/F)ⁿ), which loses no digits where p is small.
        gain = jnp.log(-jnp.expm1(num_samples * jnp.log1p(-share)))
        return log_probs - jnp.log(of_level[level]) + num_samples * jnp.log(up_to) + gain

    return jax.nn.log_softmax(jax.vmap(law)(log_probs, task.rewards))


def of_pairs(
    loss: Callable[..., Loss], ref_log_probs: Array, sampler_log_probs: Array, task: Task
) -> Array:
    """The minimiser of a loss of preference pairs, over all pairs and both outcomes of each.

    A pair is two independent draws of the sampler, its outcome that of `tabular.preference_probs`.

    Args:
      loss: `(chosen, rejected, ref_chosen, ref_rejected, *, weights, reduce) -> Loss` of
        log-probabilities of responses [N, N]: one of `preference` with its β bound, or a
        function of your own.
      ref_log_probs: [P, N] of the reference, where the descent begins.
      sampler_log_probs: [P, N] of each response of a pair, up to a constant; zeros: uniform.
      task: the rewards.

    Returns:
      [P, N] float32.

    Raises:
      AssertionError: shapes differ.
      ValueError: N³, which its second derivatives take, is more than `MOST_NUMBERS`.
    """
    chex.assert_equal_shape([ref_log_probs, sampler_log_probs, task.rewards])
    size = ref_log_probs.shape[1]
    if size**3 > MOST_NUMBERS:
        raise ValueError(
            f"{size} responses take {size**3:.1e} numbers, more than {MOST_NUMBERS:.1e}"
        )

    def both(log_probs: Array) -> tuple[Array, Array]:
        pair = jnp.broadcast_arrays(log_probs[:, None], log_probs)
        return pair[0], pair[1]

    def minimiser(reference: Array, chances: Array, preferred: Array) -> Array:
        weights = chances[:, None] * chances * preferred

        def expected(logits: Array) -> Array:
            pairs = *both(jax.nn.log_softmax(logits)), *both(reference)
            return loss(*pairs, weights=weights, reduce=masked.sum)[0]

        return stationary(jax.grad(expected), reference)

    chances, preferred = jax.nn.softmax(sampler_log_probs), tabular.preference_probs(task)
    return jax.lax.map(lambda of_prompt: minimiser(*of_prompt), (ref_log_probs, chances, preferred))


def stationary(field: Callable[[Array], Array], start: Array, *, num_steps: int = 60) -> Array:
    """log softmax(x) where g(x) = 0, found by descending g: dx/dt = -g(x).

    Implicit Euler steps, of one unit of x at most, that grow into those of Newton.

    Args:
      field: logits [N] to g [N]: the gradient of a loss, or an update that is no loss's gradient.
      start: [N] logits.
      num_steps: the number of steps, each of them a linear system. Static.

    Returns:
      [N] float32.

    Raises:
      AssertionError: `start` is not a vector.
    """
    chex.assert_rank(start, 1)

    def step(k: Array, logits: Array) -> Array:
        slope = jax.jacfwd(field)(logits)
        own = jnp.abs(jnp.diagonal(slope))
        damping = jnp.maximum(0.7**k, 1e-4) * jnp.where(own > 0, own, 1.0)
        change = jnp.linalg.solve(slope + jnp.diag(damping), -field(logits))
        change = change / jnp.maximum(jnp.abs(change).max(), 1.0)
        return jax.nn.log_softmax(logits + change)

    return jax.lax.fori_loop(0, num_steps, step, jax.nn.log_softmax(start.astype(jnp.float32)))


def _last_token_first(
    choose: Callable[[Array, Array], Array], ref_log_probs: Array, task: Task
) -> Array:
    """log π(y), with π(·|s) = choose(log π_ref(·|s), Q(s, ·)) and Q(s, a) = E_π[r | s, a]."""
    chex.assert_equal_shape([ref_log_probs, task.rewards])
    num_prompts, size = ref_log_probs.shape
    length = task.responses.shape[1]
    vocab_size = task.vocab_size
    mass, values, found = ref_log_probs, task.rewards, jnp.zeros((num_prompts, size))
    for _ in range(length):
        mass, values = (x.reshape(num_prompts, -1, vocab_size) for x in (mass, values))
        tokens = choose(jax.nn.log_softmax(mass), values)
        after = found.reshape(*tokens.shape, -1)
        found = (tokens[..., None] + after).reshape(num_prompts, size)
        mass, values = jax.nn.logsumexp(mass, axis=-1), (jnp.exp(tokens) * values).sum(-1)
    return found


def _normalised(rewards: Array, num_responses: int, eps: float | Array) -> Callable[[Array], Array]:
    """log π [P, N] to f_π [P, N] of `group_std`.

    With S the sum of the squared deviations of a group of G, S = min over c of Σ (r - c)², so that
    G - 1 independent draws can be averaged one by one under two integrals:

    E[(r - mean)·exp(-t²·S)] = t·√(G/π) ∫ (r - c)·g(r)·(E_π g(r'))^(G-1) dc,
    g(r) = exp(-t²·(r - c)²);
    1/(√S + e) = 2/√π ∫₀^∞ q(e·t)·exp(-t²·S) dt, q(z) = ∫₀^∞ 2·v·exp(-v² - 2·z·v) dv.

    The trapezoidal rule over x = t·(c - r), log t and log v is as good as exact.
    """
    num_prompts, size = rewards.shape
    if num_responses < 2:
        raise ValueError(f"a group needs two responses, got num_responses={num_responses}")
    spacing = 0.6 / math.sqrt(num_responses)
    xs, log_ts = np.arange(-4.2, 4.2, spacing), np.arange(0.0, 17.5, 0.35)
    xs, ts, vs = xs - xs.mean(), 0.01 * np.exp(log_ts), np.exp(np.arange(-12.0, 2.0, 0.2))
    numbers = num_prompts * size**2 * (1 if num_responses == 2 else len(xs) * len(ts))
    if numbers > MOST_NUMBERS:
        raise ValueError(
            f"{num_prompts} prompts, {size} responses and groups of {num_responses} take "
            f"{numbers:.1e} numbers, more than {MOST_NUMBERS:.1e}"
        )
    gaps = rewards[:, None] - rewards[..., None]  # [P, N, N], from one's own to another's
    if num_responses == 2:
        std = jnp.abs(gaps) / math.sqrt(2.0) + eps
        pairs = -0.5 * gaps / jnp.where(std > 0, std, 1.0)
        return lambda log_probs: jnp.einsum("pij,pj->pi", pairs, jnp.exp(log_probs))
    spread = jnp.abs(gaps).max((1, 2), keepdims=True)
    spread = jnp.where(spread > 0, spread, 1.0)
    kernel = jnp.exp(-jnp.square((gaps / spread)[..., None, None] * ts[:, None] - xs))
    z = eps * math.sqrt(num_responses - 1) * ts / spread
    weights = 0.2 * jnp.sum(2.0 * vs**2 * jnp.exp(-(vs**2) - 2.0 * z[..., None] * vs), axis=-1)
    # Below the least t the integrand is linear in it: a geometric series.
    weights = weights * np.where(log_ts == 0, 1.0 / -np.expm1(-0.35), 1.0) * 0.35
    weights = weights[..., None] * -xs * np.exp(-(xs**2)) * spacing
    scale = 2.0 / math.pi * math.sqrt(num_responses * (num_responses - 1))

    def rewards_of(log_probs: Array) -> Array:
        mean = jnp.einsum("pijtx,pj->pitx", kernel, jnp.exp(log_probs))
        return scale * jnp.sum(weights * mean ** (num_responses - 1), axis=(-2, -1))

    return rewards_of


def _wins(sampler_log_probs: Array, task: Task) -> Array:
    """[P, N] the chance of each response to be preferred to a draw of the sampler."""
    chances = jax.nn.softmax(sampler_log_probs)
    return jnp.einsum("pij,pj->pi", tabular.preference_probs(task), chances)
