"""Being one of the processes of a run."""

from __future__ import annotations

import os
from functools import partial

import jax

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(*, cluster: bool = False, heartbeat_seconds: int = 100) -> None:
    """Finds the other processes of the run, if there are any; to be called before all else.

    Where `rlhfjax.cli.launch` or somebody else has set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID, these say who the others are.

    Args:
      cluster: there are others, and jax asks the cluster who they are (Cloud TPU, SLURM, Open MPI,
        GKE).
      heartbeat_seconds: a process that has not been heard of for so long is dead, and the others
        end with an error rather than wait for it; so they do when it has failed.

    Raises:
      ValueError: only some of the variables are set, or not to numbers.
    """
    given = {name: os.environ[name] for name in (ADDRESS, COUNT, INDEX) if name in os.environ}
    # A process that fails waits for the others before it ends, and they for it.
    initialize = partial(
        jax.distributed.initialize,
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=heartbeat_seconds,
    )
    if cluster:
        initialize()
        return
    if not given:
        return
    if len(given) < 3 or not (given[COUNT].isdecimal() and given[INDEX].isdecimal()):
        raise ValueError(
            f"{ADDRESS}, {COUNT} and {INDEX} belong together, an address and two numbers; "
            f"found {given}: set all of them or none"
        )
    initialize(given[ADDRESS], int(given[COUNT]), int(given[INDEX]))
