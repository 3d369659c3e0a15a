"""From logits to tokens: filters, samplers, and the mask of what was sampled.

A filter maps logits to logits with -inf for what it removes, so that filters compose, see `chain`.
A sampler maps logits and one uniform number a row to tokens.

What a sampled token's log-probability was depends on the distribution that is meant:
`log_probs.token_log_probs(logits, tokens)` is the policy's own, and
`log_probs.token_log_probs(filter(logits), tokens)` that of the behaviour, from which the token was
drawn. Where a filter removes mass the second is the larger one, and a ratio of the two is not 1.
"""

from collections.abc import Callable
from functools import reduce

import chex
import jax
import jax.numpy as jnp
from jax import Array

Filter = Callable[[Array], Array]


def chain(*filters: Filter) -> Filter:
    """The filter that applies the given ones from left to right.

    `chain(partial(temper, temperature=0.7), partial(top_k, k=50), partial(top_p, p=0.9))` is the
    order of transformers: each filter sees the distribution that those before it left.

    Args:
      filters: each `(logits [..., V]) -> [..., V]`; none of them changes nothing.

    Returns:
      `(logits [..., V]) -> [..., V]`.
    """
    return lambda logits: reduce(lambda left, filter_: filter_(left), filters, logits)


def temper(logits: Array, *, temperature: float | Array) -> Array:
    """logits / temperature; at 0 its limit, which leaves the most probable tokens only.

    Args:
      logits: [..., V]; -inf for tokens that were removed before.
      temperature: scalar or [..., 1], not negative.

    Returns:
      [..., V] float32.

    Raises:
      AssertionError: no vocabulary axis.
    """
    logits = _float_logits(logits)
    warm = jnp.asarray(temperature) > 0
    possible = logits > -jnp.inf
    kept = possible & (warm | (logits == jnp.max(logits, axis=-1, keepdims=True)))
    scaled = jnp.where(possible, logits, 0.0) / jnp.where(warm, temperature, 1.0)
    return jnp.where(kept, scaled, -jnp.inf)


def top_k(logits: Array, *, k: int) -> Array:
    """Keep the k largest logits; all tokens that tie with the k-th are kept.

    Args:
      logits: [..., V].
      k: how many, at least 1; more than V keeps all. Static.

    Returns:
      [..., V] float32, -inf for removed tokens.

    Raises:
      ValueError: k < 1.

    References:
      Fan et al. 2018, Hierarchical Neural Story Generation; ties as in transformers.
    """
    logits = _float_logits(logits)
    if k < 1:
        raise ValueError(f"top_k keeps at least one token, got k={k}")
    largest, _ = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    # Not largest[..., -1:], a slice for which XLA sorts the whole vocabulary, 100 times as slow.
    threshold = jnp.min(largest, axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def top_p(logits: Array, *, p: float | Array, keep_crossing: bool = True) -> Array:
    """Keep the smallest set of most probable tokens whose mass is at least p.

    A token stays when the mass of the tokens above it is below p. So the token that crosses p
    stays; when the mass meets p exactly, the next one goes. All tokens that tie with the last
    one kept stay, so that the order of the vocabulary has no say. At least one token stays, and
    p ≥ 1 keeps all.

    Args:
      logits: [..., V]; -inf for tokens that were removed before.
      p: mass to keep.
      keep_crossing: False removes the token that crosses p (OpenAI): the largest set whose mass is
        at most p.

    Returns:
      [..., V] float32, -inf for removed tokens.

    Raises:
      AssertionError: no vocabulary axis.

    References:
      Holtzman et al. 2020, The Curious Case of Neural Text Degeneration; Ziegler et al. 2019
      (its released code: `keep_crossing=False`).
    """
    logits = _float_logits(logits)
    descending = -jnp.sort(-logits, axis=-1)
    weights = jnp.exp(descending - descending[..., :1])
    mass = jnp.cumsum(weights, axis=-1)
    bound = p * mass[..., -1:]
    keep = (mass - weights < bound) if keep_crossing else (mass <= bound)
    keep = keep.at[..., 0].set(True)
    threshold = jnp.min(jnp.where(keep, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where((logits >= threshold) | (jnp.asarray(p) >= 1), logits, -jnp.inf)


def min_p(logits: Array, *, p: float | Array) -> Array:
    """Keep the tokens with probability at least p times that of the most probable one.

    Args:
      logits: [..., V]; -inf for tokens that were removed before.
      p: in [0, 1].

    Returns:
      [..., V] float32, -inf for removed tokens.

    Raises:
      AssertionError: no vocabulary axis.

    References:
      Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling.
    """
    logits = _float_logits(logits)
    threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def repetition_penalty(
    logits: Array, tokens: Array, mask: Array, *, penalty: float | Array
) -> Array:
    """logit / penalty where it is positive, logit·penalty where negative, for tokens that occur.

    Not a function of logits alone: to put it into a `chain`, bind the other arguments.

    Args:
      logits: [..., V].
      tokens: [..., S] int, the text so far.
      mask: [..., S] bool, True at the tokens that count: without padding, with the prompt or not.
      penalty: more than 1 against repetition, less than 1 for it; positive.

    Returns:
      [..., V] float32.

    Raises:
      AssertionError: shapes do not fit, `tokens` is not of integers or `mask` not bool.

    References:
      Keskar et al. 2019, CTRL, §4.1; negative logits as in transformers.
    """
    logits = _float_logits(logits)
    chex.assert_shape([tokens, mask], (*logits.shape[:-1], None))
    chex.assert_equal_shape([tokens, mask])
    chex.assert_type([tokens, mask], [int, bool])
    vocab_size = logits.shape[-1]

    def occurring(tokens: Array) -> Array:
        return jnp.zeros(vocab_size, bool).at[tokens].set(True, mode="drop")

    # Tokens that do not count go to an index that is out of bounds, and are dropped.
    counted = jnp.where(mask, tokens, vocab_size)
    penalised = jnp.vectorize(occurring, signature="(s)->(v)")(counted) & (logits > -jnp.inf)
    inner = jnp.where(penalised, logits, 0.0)
    return jnp.where(penalised, jnp.where(inner > 0, inner / penalty, inner * penalty), logits)


def forbid_end(
    logits: Array,
    step: int | Array,
    *,
    end_token: int | tuple[int, ...] | Array,
    min_length: int | Array,
) -> Array:
    """-inf for the end token while step < min_length.

    To come before other filters: they could otherwise leave the end token alone, and then nothing.

    Args:
      logits: [..., V] of the next token.
      step: scalar or [...], how many tokens the response has so far.
      end_token: its id, or several [N].
      min_length: how many tokens come before the end token at least; T forbids it throughout.

    Returns:
      [..., V] float32.

    Raises:
      AssertionError: no vocabulary axis.
    """
    logits = _float_logits(logits)
    is_end = jnp.isin(jnp.arange(logits.shape[-1]), jnp.asarray(end_token))
    early = jnp.asarray(step)[..., None] < min_length
    return jnp.where(is_end & early, -jnp.inf, logits)


def categorical(logits: Array, uniform: Array) -> Array:
    """Sample from softmax(logits) by inverting the cumulative distribution.

    The token is the first whose cumulative weight exceeds u times the total, so the same u gives
    the same token whatever the other rows contain. Tokens of no probability are never returned,
    whatever the rounding; a row without any possible token gives 0.

    Args:
      logits: [..., V]; -inf for impossible tokens.
      uniform: [...] u in [0, 1), one draw a row.

    Returns:
      [...] int32.

    Raises:
      AssertionError: shapes do not fit.

    References:
      Devroye 1986, Non-Uniform Random Variate Generation, §III.2.
    """
    logits = _float_logits(logits)
    chex.assert_shape(uniform, logits.shape[:-1])
    # First the block of about √V tokens, then the token in it: a prefix sum over the whole
    # vocabulary would cost several times as much as all the rest.
    vocab_size = logits.shape[-1]
    width = 1 << (vocab_size.bit_length() // 2)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -vocab_size % width)]
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    blocks = jnp.pad(shifted, padding, constant_values=-jnp.inf)
    blocks = blocks.reshape(*logits.shape[:-1], -1, width)
    block_weights = jnp.sum(jnp.exp(blocks), axis=-1)
    total = jnp.max(_cumulative(block_weights), axis=-1)
    block, rest = _first_above(block_weights, uniform * total)
    chosen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    token, _ = _first_above(jnp.exp(chosen), rest)
    return (block * width + token).astype(jnp.int32)


def greedy(logits: Array, uniform: Array) -> Array:
    """argmax of the logits; of tokens that tie, the one with the lowest id.

    Args:
      logits: [..., V].
      uniform: [...], not used: greedy takes the place of any other sampler.

    Returns:
      [...] int32.

    Raises:
      AssertionError: shapes do not fit.
    """
    chex.assert_shape(uniform, logits.shape[:-1])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def response_mask(responses: Array, *, end_token: int | tuple[int, ...] | Array | None) -> Array:
    """True up to and including the first end token.

    Args:
      responses: [..., T] integer tokens.
      end_token: its id, or several [N] of which any ends a response; None when responses have no
        end token and all of them are real.

    Returns:
      [..., T] bool.

    Raises:
      AssertionError: `responses` is a scalar or not of integers.
    """
    chex.assert_rank(responses, set(range(1, responses.ndim + 1)))
    chex.assert_type(responses, int)
    if end_token is None:
        return jnp.ones(responses.shape, bool)
    is_end = jnp.isin(responses, jnp.asarray(end_token)).astype(jnp.int32)
    return jnp.cumsum(is_end, axis=-1) - is_end == 0


def _float_logits(logits: Array) -> Array:
    chex.assert_rank(logits, set(range(1, logits.ndim + 1)))
    return logits.astype(jnp.float32)


def _first_above(weights: Array, target: Array) -> tuple[Array, Array]:
    """First index with a weight whose cumulative weight exceeds target; what is left of target."""
    cumulative = _cumulative(weights)
    # Below the largest, so that there is such an index even where target was rounded up.
    target = jnp.clip(target, 0.0, jnp.nextafter(jnp.max(cumulative, axis=-1), 0.0))
    index = jnp.argmax(cumulative > target[..., None], axis=-1)
    before = jnp.take_along_axis(cumulative - weights, index[..., None], axis=-1)[..., 0]
    return index, target - before


def _cumulative(weights: Array) -> Array:
    """Prefix sum, 0 at weights of 0: a parallel prefix sum may rise there by rounding."""
    return jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
