"""Processes that agree: what one of them sees, and whether any has failed, all of them know."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from rlhfjax.checkpoint.files import Refused, reason


def error_of(function: Callable[[], Any]) -> Exception | None:
    """What it raises, or None."""
    try:
        function()
    except Exception as error:
        return error
    return None


def failure_anywhere(error: BaseException | None) -> str:
    """Why the first process failed that did, "" where none did: the same answer in all of them."""
    own = "" if error is None else reason(error)
    if jax.process_count() == 1:
        return own
    text = np.frombuffer(own.encode()[:500].ljust(500), np.uint8)
    rows = multihost_utils.process_allgather(text)
    reasons = (bytes(row).decode(errors="replace").strip() for row in rows)
    return next(filter(None, reasons), "")


def on_first(function: Callable[[], Any]) -> Exception | None:
    """The error of what one process does for all of them, in all of them."""
    error = error_of(function) if jax.process_index() == 0 else None
    found = failure_anywhere(error)
    return error or (Refused(found) if found else None)


def as_first(numbers: list[int]) -> list[int]:
    """What one process sees on the disk, where a network may show the others something older."""
    if jax.process_count() == 1:
        return numbers
    length = multihost_utils.broadcast_one_to_all(np.int32(len(numbers)))
    padded = np.resize(np.array(numbers or [0], np.int32), max(int(length), 1))
    return multihost_utils.broadcast_one_to_all(padded)[: int(length)].tolist()


def own_part() -> slice:
    """This process's part of what all of them share."""
    return slice(jax.process_index(), None, jax.process_count())


def merged_on_first(function: Callable[[], dict[str, str]], key: str) -> dict[str, str]:
    """All that the processes found, in the first one; from a thread beside a running program.

    Args:
      function: what each finds.
      key: names this exchange, the same in all processes and in no other exchange.

    Returns:
      the dictionaries as one; those of the other processes get their own back.

    Raises:
      Exception: what the own function raised, or in the first process another one's failure.
    """
    if jax.process_count() == 1:
        return function()
    client = ocp.multihost.get_jax_distributed_client()
    own: dict[str, str] = {}
    error = error_of(lambda: own.update(function()))
    if jax.process_index() > 0:
        told = {"failed": reason(error)} if error else {"found": own}
        client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(told))
    if error is not None:
        raise error
    if jax.process_index() == 0:
        # No limit of its own: a process that is gone ends this one by the missing heartbeat.
        days = 24 * 60 * 60 * 1000
        for index in range(1, jax.process_count()):
            told = json.loads(client.blocking_key_value_get(f"{key}/{index}", days))
            client.key_value_delete(f"{key}/{index}")
            if "failed" in told:
                raise Refused(f"process {index}: {told['failed']}")
            own |= told["found"]
    return own
