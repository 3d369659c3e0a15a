"""Processes that agree: what one of them sees, and whether any has failed, all of them know."""

from __future__ import annotations

import json
import os
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


def from_first(function: Callable[[], list[int]]) -> list[int]:
    """What one process finds for all, where a network may show the others something older.

    Args:
      function: called by the first process.

    Returns:
      what it returned, in all of them.

    Raises:
      Exception: what it raised, in all of them.
    """
    numbers: list[int] = []
    error = on_first(lambda: numbers.extend(function()))
    if error is not None:
        raise error
    if jax.process_count() == 1:
        return numbers
    length = multihost_utils.broadcast_one_to_all(np.int32(len(numbers)))
    padded = np.resize(np.array(numbers or [0], np.int32), max(int(length), 1))
    return multihost_utils.broadcast_one_to_all(padded)[: int(length)].tolist()


def own_part() -> slice:
    """This process's part of what all of them share."""
    return slice(jax.process_index(), None, jax.process_count())


class Exchange:
    """Rounds in which each process tells all others something, from a thread of its own.

    A process that fails says so in the round that is its next, and nobody waits for it in vain.
    All of them make one at the same time, which gets a name that no other one has.
    """

    def __init__(self) -> None:
        self._round, self._over = 0, False
        if jax.process_count() > 1:
            self._client = ocp.multihost.get_jax_distributed_client()
            words = np.frombuffer(os.urandom(8), np.uint32)
            agreed = np.asarray(multihost_utils.broadcast_one_to_all(words), np.uint32)
            self._name = f"rlhfjax/{agreed.tobytes().hex()}"

    def tell(self, what: Any = None) -> list[Any]:
        """One round, over when all are in it.

        Args:
          what: this process tells, as JSON.

        Returns:
          what each of them told, in their order.

        Raises:
          Refused: one of them has failed, and why.
        """
        if jax.process_count() == 1:
            return [what]
        rows = [{"told": what}]
        if jax.process_index() == 0:
            for index in range(1, jax.process_count()):
                rows.append(json.loads(self._get(str(index))))
                if "failed" in rows[-1]:
                    break
            self._set("all", rows)
        else:
            self._set(str(jax.process_index()), rows[0])
            rows = json.loads(self._get("all"))
        self._round += 1
        if "failed" in rows[-1]:
            self._over = True
            raise Refused(rows[-1]["failed"])
        return [row["told"] for row in rows]

    def fail(self, error: Exception) -> None:
        """Tells the others, unless it is from them that this process knows."""
        if jax.process_count() == 1 or self._over:
            return
        index = jax.process_index()
        row = {"failed": f"process {index}: {reason(error)}"}
        self._set(*((str(index), row) if index else ("all", [row])))

    def close(self) -> None:
        """Forgets what was told; to be called when no process is in a round any more."""
        if jax.process_count() > 1 and jax.process_index() == 0:
            self._client.key_value_delete(f"{self._name}/")

    def _set(self, name: str, told: Any) -> None:
        self._client.key_value_set(f"{self._name}/{self._round}/{name}", json.dumps(told))

    def _get(self, name: str) -> str:
        # No limit of its own: a process that is gone ends this one by the missing heartbeat.
        days = 24 * 60 * 60 * 1000
        return self._client.blocking_key_value_get(f"{self._name}/{self._round}/{name}", days)
