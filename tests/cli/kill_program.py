"""Kills a run at what it does on the disk: python kill_program.py FOLDER

Each run is a fork, made before jax has a backend, which an audit hook kills at the n-th time that
it opens, renames, removes or makes something. Prints a line for each kind of moment.
"""

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhfjax import checkpoint, sharding
from rlhfjax.algorithms import train_state
from rlhfjax.cli.run import Run
from rlhfjax.data.cursor import batches_from

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def start(seen: Any) -> Any:
    return {"train": train_state.init({"w": jnp.ones(2)}, OPTIMIZER), "seen": jnp.copy(seen)}


@jax.jit
def update(state: Any, batch: Any) -> Any:
    grads = {"w": jnp.sin(state["train"].params["w"] * batch)}
    train, _ = train_state.apply_gradients(state["train"], grads, OPTIMIZER)
    return {"train": train, "seen": state["seen"].at[batch].add(1)}


def step(state: Any, batch: Any) -> Any:
    state = update(state, batch)
    return state, {"loss": state["train"].params["w"].sum()}


def train(out: Path) -> None:
    """Two stages of two steps; every step is saved and the one before it pruned."""
    mesh = sharding.mesh(devices=jax.devices()[:1])
    with Run(out, {"seed": 1}, mesh=mesh, resume=True, keep=1) as run:
        for stage in ("one", "two"):
            trained = run.train(
                stage, start, jnp.zeros(4, int), step=step,
                batches=lambda at: batches_from(at, lambda _, i: iter(np.arange(4)[i:, None])),
                num_steps=2, save_every=1, show={},
            )  # fmt: skip
        run.write("end.json", {"digest": checkpoint.digest(trained.state)})


def in_a_fork(what: Callable[[], None]) -> int:
    """The status, negative for a signal."""
    child = os.fork()
    if child == 0:
        warnings.simplefilter("ignore")
        what()
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def moment(event: str, args: tuple[Any, ...], out: Path) -> str | None:
    """What a run does, without the numbers; None where it is not about its directory."""
    if event not in EVENTS:
        return None
    reads = event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    in_folder = event in ("os.remove", "os.rmdir") and args[1] >= 0
    path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}") if in_folder else "", str(args[0]))
    if reads or not path.startswith(str(out)):
        return None
    inside = re.sub(r"(arrays[^/]*/).*", r"\1", path.removeprefix(str(out)))
    return re.sub(r"\d+", "N", re.sub("one|two", "STAGE", f"{event} {inside}"))


def watched(out: Path, see: Callable[[str], None]) -> Callable[[], None]:
    def run() -> None:
        def hook(event: str, args: tuple[Any, ...]) -> None:
            found = moment(event, args, out)
            if found is not None:
                see(found)

        sys.addaudithook(hook)
        train(out)

    return run


def killed(out: Path, number: int, of: str) -> Callable[[], None]:
    """A run that is killed at the n-th moment of a kind."""
    left = number

    def see(found: str) -> None:
        nonlocal left
        left -= found == of
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return watched(out, see)


def end(out: Path) -> tuple[bytes, bytes]:
    return (out / "end.json").read_bytes(), (out / "metrics.jsonl").read_bytes()


def main() -> None:
    folder = Path(sys.argv[1])
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    unbroken, moments = folder / "unbroken", folder / "moments"

    def note(found: str) -> None:
        with os.fdopen(os.open(moments, os.O_CREAT | os.O_APPEND | os.O_WRONLY), "w") as file:
            file.write(f"{found}\n")

    assert in_a_fork(watched(unbroken, note)) == 0
    found = moments.read_text().splitlines()
    for kind in sorted(set(found)):
        out = folder / re.sub(r"\W", "-", kind)
        late = found.count(kind) - found.count(kind) // 3  # when there are older steps
        statuses = [in_a_fork(killed(out, late, kind))]
        statuses.append(in_a_fork(killed(out, 1, kind)))  # and again, as it goes on
        assert in_a_fork(lambda out=out: train(out)) == 0
        assert statuses[0] == -signal.SIGKILL, (kind, statuses)
        assert end(out) == end(unbroken), kind
        print(kind, flush=True)


main()
