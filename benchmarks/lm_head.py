"""Times the chunked LM head against the whole matrix of logits; prints one JSON line.

    python benchmarks/lm_head.py --vocab 32000 --tokens 1024 --width 256 --chunk-size 1024

Both take hidden states and the tied head of a decoder to a loss (mean log-probability with an
entropy bonus, or the mean exact divergence from a reference) and back to the gradients of both.
The programs run in turns, so that what else the machine does meets them alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import tyro
from jax import Array

from rlhfjax import kl, lm_head, log_probs, models


@dataclass(frozen=True)
class Args:
    """Times the chunked LM head against the whole matrix of logits."""

    vocab: int = 32_000
    """Size of the vocabulary."""
    tokens: int = 1024
    """Tokens that are scored, B·T."""
    width: int = 256
    """Size of the hidden states."""
    chunk_size: int = 1024
    """Entries of the vocabulary at a time."""
    iters: int = 15
    """Runs of each program that are timed, after the first."""


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds until everything that the function returns is there."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def losses(args: Args) -> dict[str, Callable[..., Array]]:
    """Functions of hidden states and head, those of a reference, and tokens."""
    model = models.decoder(
        models.DecoderConfig(vocab_size=args.vocab, context_length=1, width=args.width)
    )

    def logits(hidden: Array, head: Array) -> Array:
        return model.logits({"embedding": {"embedding": head}}, hidden)

    def dense_log_probs(hidden: Array, head: Array, _: Array, __: Array, tokens: Array) -> Array:
        both = log_probs.token_log_probs_and_entropy(logits(hidden, head), tokens)
        return -both[0].mean() - 0.01 * both[1].mean()

    def chunked_log_probs(hidden: Array, head: Array, _: Array, __: Array, tokens: Array) -> Array:
        both = lm_head.token_log_probs_and_entropy(hidden, head, tokens, chunk_size=args.chunk_size)
        return -both[0].mean() - 0.01 * both[1].mean()

    def dense_kl(hidden: Array, head: Array, ref_hidden: Array, ref_head: Array, _: Array) -> Array:
        return kl.categorical(
            logits=logits(hidden, head), ref_logits=logits(ref_hidden, ref_head)
        ).mean()

    def chunked_kl(
        hidden: Array, head: Array, ref_hidden: Array, ref_head: Array, _: Array
    ) -> Array:
        return lm_head.kl(hidden, head, ref_hidden, ref_head, chunk_size=args.chunk_size).mean()

    return {
        "dense_log_probs": dense_log_probs,
        "chunked_log_probs": chunked_log_probs,
        "dense_kl": dense_kl,
        "chunked_kl": chunked_kl,
    }


def main(args: Args) -> dict[str, object]:
    """Compiles each loss alone and with its gradients, times them in turns, returns the figures."""
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, ref_hidden = (jax.random.normal(key, (args.tokens, args.width)) for key in keys[:2])
    head, ref_head = (
        jax.random.normal(key, (args.vocab, args.width)) / args.width**0.5 for key in keys[2:4]
    )
    tokens = jax.random.randint(keys[4], (args.tokens,), 0, args.vocab)
    arrays = (hidden, head, ref_hidden, ref_head, tokens)

    programs = {}
    for name, loss in losses(args).items():
        programs[f"{name}_forward"] = jax.jit(loss).lower(*arrays).compile()
        programs[name] = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arrays).compile()
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(args.iters + 1):
        for name, program in programs.items():
            times[name].append(seconds(lambda program=program: program(*arrays)))
    medians = {name: statistics.median(runs[1:]) for name, runs in times.items()}
    least = {name: min(runs[1:]) for name, runs in times.items()}
    parts = [name.removeprefix("dense_") for name in programs if name.startswith("dense")]
    return {
        "median_s": medians,
        "least_s": least,
        "ratio": {p: medians[f"chunked_{p}"] / medians[f"dense_{p}"] for p in parts},
        "ratio_of_least": {p: least[f"chunked_{p}"] / least[f"dense_{p}"] for p in parts},
        "temp_mb": {
            name: program.memory_analysis().temp_size_in_bytes / 1e6
            for name, program in programs.items()
        },
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Args))))
