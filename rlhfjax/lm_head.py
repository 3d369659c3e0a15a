"""Log-probabilities, entropy and exact KL through the LM head, a piece of the vocabulary at a time.

The logits of an update, B·T·V numbers, can be larger than the model. Here only `chunk_size` of each
token's V exist at a time: one pass over the vocabulary keeps a running maximum and running sums for
each token, and the backward pass computes every piece of the logits again. 3 matrix products become
4, and for the divergence 4 become 6, in exchange for fewer trips to memory.

The functions see no mask of tokens. What the loss leaves out adds nothing to any gradient, but its
hidden state must be finite and its token in range. Give leading axes as they are: `vmap` over them
would hold a gradient of the head for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

LOWEST = jnp.finfo(jnp.float32).min


def token_log_probs_and_entropy(
    hidden: Array,
    head: Array,
    tokens: Array,
    bias: Array | None = None,
    *,
    chunk_size: int = 1024,
    temperature: float | Array = 1.0,
) -> tuple[Array, Array]:
    """log p(token) and H = -Σ_a p(a) log p(a) of p = softmax((W·h + b) / temperature), in nats.

    Args:
      hidden: [..., D], h.
      head: [V, D], W: a tied embedding as it is, the kernel of a head of its own transposed.
      tokens: [...] int.
      bias: [V], b, None for 0. An entry with -inf is outside the vocabulary: its row of the head
        changes nothing and gets no gradient. One must remain.
      chunk_size: entries of the vocabulary at a time; static.
      temperature: scalar, the logits are divided by it.

    Returns:
      log-probabilities [...], -inf of a token outside the vocabulary, and entropies [...], float32.

    Raises:
      AssertionError: shapes do not match or `tokens` is not integer.
    """
    chex.assert_shape(tokens, hidden.shape[:-1])
    chex.assert_type(tokens, int)
    policy = _softmax(hidden, head, bias, temperature)
    both = _log_probs_and_entropy(policy, tokens.reshape(-1), chunk_size)
    return both[0].reshape(tokens.shape), both[1].reshape(tokens.shape)


def kl(
    hidden: Array,
    head: Array,
    ref_hidden: Array,
    ref_head: Array,
    bias: Array | None = None,
    ref_bias: Array | None = None,
    *,
    chunk_size: int = 1024,
    temperature: float | Array = 1.0,
) -> Array:
    """KL(p ‖ p_ref) = Σ_a p(a)·(log p(a) - log p_ref(a)), p = softmax((W·h + b) / temperature).

    The reference and the temperature are constants: they get no gradient.

    Args:
      hidden: [..., D], h.
      head: [V, D], W, as in `token_log_probs_and_entropy`.
      ref_hidden: [..., D_ref], h of the reference.
      ref_head: [V, D_ref], W of the reference.
      bias: [V], b, None for 0; -inf marks entries outside the vocabulary.
      ref_bias: [V], b of the reference, likewise.
      chunk_size: entries of the vocabulary at a time; static.
      temperature: scalar, the logits of both are divided by it.

    Returns:
      [...] float32; infinite, without a gradient, where p allows an entry that p_ref excludes.

    Raises:
      AssertionError: shapes do not match.
    """
    chex.assert_equal_shape_prefix([hidden, ref_hidden], hidden.ndim - 1)
    chex.assert_equal_shape_prefix([head, ref_head], 1)
    temperature = jax.lax.stop_gradient(temperature)
    policy = _softmax(hidden, head, bias, temperature)
    reference = _softmax(ref_hidden, ref_head, ref_bias, temperature)
    divergence = _kl(policy, reference, chunk_size)
    excluded = jnp.any((policy.bias > -jnp.inf) & (reference.bias == -jnp.inf))
    return jnp.where(excluded, jnp.inf, divergence).reshape(hidden.shape[:-1])


class _Softmax(NamedTuple):
    """softmax((W·h + b) / temperature) of N tokens over V entries, or its gradients."""

    hidden: Array
    head: Array
    bias: Array
    temperature: Array


def _softmax(
    hidden: Array, head: Array, bias: Array | None, temperature: float | Array
) -> _Softmax:
    chex.assert_shape(head, (None, hidden.shape[-1]))
    chex.assert_rank(temperature, 0)
    bias = jnp.zeros(head.shape[0]) if bias is None else bias
    chex.assert_shape(bias, head.shape[:1])
    rows = hidden.reshape(-1, hidden.shape[-1]).astype(jnp.result_type(hidden, head))
    return _Softmax(rows, head, bias.astype(jnp.float32), jnp.asarray(temperature, jnp.float32))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _log_probs_and_entropy(policy: _Softmax, tokens: Array, chunk_size: int) -> tuple[Array, Array]:
    return _forward(policy, tokens, chunk_size)[0]


def _forward(
    policy: _Softmax, tokens: Array, chunk_size: int
) -> tuple[tuple[Array, Array], tuple[_Softmax, Array, Array, Array]]:
    size, num_pieces = _pieces(policy, chunk_size)

    def step(index: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, expected, chosen = sums
        entries, _, logits = _piece(policy, index, size)
        new_top, weights, shrink = _weigh(top, logits)
        # Shifted by the maximum throughout: log Z - E[logits] would cancel at large logits.
        terms = jnp.where(weights > 0, weights * (logits - new_top), 0.0)
        return (
            new_top,
            total * shrink + weights.sum(0),
            (expected + total * (top - new_top)) * shrink + terms.sum(0),
            jnp.maximum(chosen, jnp.where(entries == tokens, logits, -jnp.inf).max(0)),
        )

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    start = (zeros + LOWEST, zeros, zeros, zeros - jnp.inf)
    top, total, expected, chosen = jax.lax.fori_loop(0, num_pieces, step, start)
    log_total = jnp.log(total)
    entropies = log_total - expected / total
    return (chosen - top - log_total, entropies), (policy, tokens, top + log_total, entropies)


def _backward(
    chunk_size: int,
    saved: tuple[_Softmax, Array, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[_Softmax, None]:
    policy, tokens, log_z, entropies = saved
    d_log_probs, d_entropies = cotangents

    def d_logits(index: Array, entries: Array, logits: Array) -> Array:
        log_p = logits - log_z
        pull = d_log_probs + d_entropies * (log_p + entropies)
        return jnp.where(entries == tokens, d_log_probs, 0.0) - jnp.exp(log_p) * pull

    return _gradients(policy, d_logits, chunk_size), None


_log_probs_and_entropy.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kl(policy: _Softmax, reference: _Softmax, chunk_size: int) -> Array:
    return _kl_forward(policy, reference, chunk_size)[0]


def _kl_forward(
    policy: _Softmax, reference: _Softmax, chunk_size: int
) -> tuple[Array, tuple[_Softmax, _Softmax, Array, Array, Array]]:
    size, num_pieces = _pieces(policy, chunk_size)

    def step(index: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, ref_top, ref_total, expected = sums
        _, _, logits = _piece(policy, index, size)
        _, _, ref_logits = _piece(reference, index, size)
        new_top, weights, shrink = _weigh(top, logits)
        new_ref_top, ref_weights, ref_shrink = _weigh(ref_top, ref_logits)
        both = (logits > -jnp.inf) & (ref_logits > -jnp.inf)
        terms = jnp.where(both, weights * (logits - ref_logits), 0.0)
        return (
            new_top,
            total * shrink + weights.sum(0),
            new_ref_top,
            ref_total * ref_shrink + ref_weights.sum(0),
            expected * shrink + terms.sum(0),
        )

    zeros = jnp.zeros(policy.hidden.shape[:1], jnp.float32)
    start = (zeros + LOWEST, zeros, zeros + LOWEST, zeros, zeros)
    top, total, ref_top, ref_total, expected = jax.lax.fori_loop(0, num_pieces, step, start)
    log_total, ref_log_total = jnp.log(total), jnp.log(ref_total)
    divergence = expected / total - (top - ref_top) - (log_total - ref_log_total)
    log_z, ref_log_z = top + log_total, ref_top + ref_log_total
    return divergence, (policy, reference, log_z, ref_log_z, divergence)


def _kl_backward(
    chunk_size: int,
    saved: tuple[_Softmax, _Softmax, Array, Array, Array],
    d_divergence: Array,
) -> tuple[_Softmax, None]:
    policy, reference, log_z, ref_log_z, divergence = saved
    size, _ = _pieces(policy, chunk_size)

    def d_logits(index: Array, entries: Array, logits: Array) -> Array:
        _, _, ref_logits = _piece(reference, index, size)
        log_p, log_ref = logits - log_z, ref_logits - ref_log_z
        excess = jnp.where(ref_logits > -jnp.inf, log_p - log_ref - divergence, 0.0)
        return d_divergence * jnp.exp(log_p) * excess

    return _gradients(policy, d_logits, chunk_size), None


_kl.defvjp(_kl_forward, _kl_backward)


def _pieces(policy: _Softmax, chunk_size: int) -> tuple[int, int]:
    """Size and number of the pieces of the vocabulary."""
    num_entries = policy.head.shape[0]
    size = min(chunk_size, num_entries)
    return size, -(-num_entries // size)


def _piece(policy: _Softmax, index: Array, size: int) -> tuple[Array, Array, Array]:
    """Numbers of a piece's entries [C, 1], their rows of the head [C, D], their logits [C, N].

    Entries come first because on CPU that was measured to be the faster of the two layouts.
    The last piece starts early enough to be full. Entries that an earlier piece has too are
    outside the vocabulary here: their logits are -inf.
    """
    start = jnp.minimum(index * size, policy.head.shape[0] - size)
    entries = start + jnp.arange(size)[:, None]
    bias = jax.lax.dynamic_slice_in_dim(policy.bias, start, size)[:, None]
    bias = jnp.where(entries >= index * size, bias, -jnp.inf)
    rows = jax.lax.dynamic_slice_in_dim(policy.head, start, size).astype(policy.hidden.dtype)
    rows = jnp.where(bias > -jnp.inf, rows, 0)
    return entries, rows, (_matmul(rows, policy.hidden.T) + bias) / policy.temperature


def _weigh(top: Array, logits: Array) -> tuple[Array, Array, Array]:
    """The raised maximum, exp(logits - maximum), and the factor for sums under the old maximum."""
    new_top = jnp.maximum(top, logits.max(0))
    return new_top, jnp.exp(logits - new_top), jnp.exp(top - new_top)


def _gradients(
    policy: _Softmax, d_logits: Callable[[Array, Array, Array], Array], chunk_size: int
) -> _Softmax:
    """The gradients that `d_logits(index, entries, logits)` [C, N] of each piece give together."""
    size, num_pieces = _pieces(policy, chunk_size)
    hidden, head, bias, temperature = policy

    def step(done: Array, grads: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        d_hidden, d_head, d_bias = grads
        # Backwards, so that where the last two pieces overlap the right one is written later.
        index = num_pieces - 1 - done
        entries, rows, logits = _piece(policy, index, size)
        d_piece = d_logits(index, entries, logits) / temperature
        d_piece = jnp.where(logits > -jnp.inf, d_piece, 0.0)
        factor = d_piece.astype(hidden.dtype)
        d_rows = _matmul(factor, hidden).astype(head.dtype)
        first = entries[0, 0]
        return (
            d_hidden + _transposed_matmul(factor, rows),
            jax.lax.dynamic_update_slice_in_dim(d_head, d_rows, first, 0),
            jax.lax.dynamic_update_slice_in_dim(d_bias, d_piece.sum(1), first, 0),
        )

    zeros = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(head), jnp.zeros_like(bias))
    d_hidden, d_head, d_bias = jax.lax.fori_loop(0, num_pieces, step, zeros)
    products = jnp.vdot(d_hidden, hidden) + jnp.vdot(d_bias, jnp.maximum(bias, LOWEST))
    return _Softmax(d_hidden.astype(hidden.dtype), d_head, d_bias, -products / temperature)


def _matmul(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, preferred_element_type=jnp.float32)


def _transposed_matmul(left: Array, right: Array) -> Array:
    def copied(left: Array, right: Array) -> Array:
        # XLA's CPU matmul wants its operands untransposed; the copy costs less than the detour.
        return _matmul(jax.lax.optimization_barrier(left.T), right)

    return jax.lax.platform_dependent(
        left, right, cpu=copied, default=lambda left, right: _matmul(left.T, right)
    )
