"""What to do when a program needs more memory than there is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array

GIB = 2**30


class Knobs(NamedTuple):
    """What takes less memory, the dearest last.

    Attributes:
      passes: for activations, gradients and caches.
      state: for parameters and the optimiser's state.
    """

    passes: tuple[str, ...]
    state: tuple[str, ...]


OF_LIBRARY = Knobs(
    passes=(
        "num_micro_batches=2, 4, … of a config or of `make_step` (fewer rows at a time; the same "
        "result)",
        "DecoderConfig.remat=True (activations are computed again; the same result)",
        "fewer prompts or rows in a step",
        "shorter responses (num_tokens)",
        "DecoderConfig.dtype=jnp.bfloat16 (activations of half the bytes)",
    ),
    state=(
        "more devices in the fsdp or tensor axis of `sharding.mesh` (each holds its part)",
        "an optimiser that keeps less, such as optax.adamw with mu_dtype=jnp.bfloat16",
    ),
)
OF_COMMANDS = Knobs(
    passes=(
        "half of --per_device_train_batch_size and twice of --gradient_accumulation_steps (fewer "
        "rows at a time; the same result)",
        "--gradient_checkpointing (activations are computed again; the same result)",
        "fewer rows in an update (--per_device_train_batch_size alone)",
        "shorter rows (--max_length; of ppo, grpo and rloo --max_completion_length)",
        "--dtype bfloat16 (activations of half the bytes)",
    ),
    state=(
        "more devices in --fsdp or --tensor (each holds its part)",
        "--use_peft (an adapter is trained, and has the optimiser's state)",
    ),
)


def explained(function: Callable[..., Any], knobs: Knobs = OF_LIBRARY) -> Callable[..., Any]:
    """The function, but where memory runs out it says how much is needed, and what helps.

    A program that was started fails where its results are read. So this waits for them.

    Args:
      function: what `jax.jit` or a `make_step` gave.
      knobs: what the user can turn.

    Returns:
      a function of the same arguments and results. It raises a `MemoryError` with the figures of
      the compiled program on each device, where JAX says that its resources are exhausted.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return jax.block_until_ready(function(*args, **kwargs))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            reason = str(error).splitlines()[0]
            raise MemoryError(_explanation(function, args, kwargs, reason, knobs)) from error

    return call


def _explanation(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    reason: str,
    knobs: Knobs,
) -> str:
    # The arrays may be gone, donated; what they were is known.
    args, kwargs = jax.tree.map(_described, (args, kwargs))
    try:
        found = function.lower(*args, **kwargs).compile().memory_analysis()  # type: ignore[attr-defined]
        arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
        results = found.output_size_in_bytes - found.alias_size_in_bytes
    except Exception:
        return (
            f"out of memory ({reason}), and the program cannot be compiled to measure it: "
            f"{_numbered(knobs.passes + knobs.state)}"
        )
    most, rest = knobs if temporaries > arguments else knobs[::-1]
    stats = jax.local_devices()[0].memory_stats() or {}
    there = f" of {stats['bytes_limit'] / GIB:.2f}" if "bytes_limit" in stats else ""
    return (
        f"out of memory ({reason}): on each device the compiled program needs "
        f"{(arguments + results + temporaries) / GIB:.2f}{there} GiB, for arguments (parameters, "
        f"optimiser state, batch) {arguments / GIB:.2f}, for results that do not take their place "
        f"{results / GIB:.2f}, for temporaries (activations, gradients, caches) "
        f"{temporaries / GIB:.2f}. {_numbered(most + rest)}"
    )


def _numbered(knobs: tuple[str, ...]) -> str:
    numbered = (f"{number}. {knob}" for number, knob in enumerate(knobs, 1))
    return "What helps, in this order:\n  " + "\n  ".join(numbered)


def _described(x: Any) -> Any:
    """Shape, dtype and, where it is not free to move, place."""
    if not isinstance(x, Array):
        return x
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None)
