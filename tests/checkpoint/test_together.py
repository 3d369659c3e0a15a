"""Two processes save and restore as one: what one of them finds or fails at, both know."""

import json
from typing import Any

import pytest

from rlhfjax.cli import launch

PROGRAM = """
import faulthandler, json, sys, time, warnings
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, setrlimit

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from rlhfjax import sharding
from rlhfjax.checkpoint import CheckpointError, Checkpoints, files
from rlhfjax.cli import processes

faulthandler.dump_traceback_later(100, exit=True)
warnings.simplefilter("ignore")
processes.join(heartbeat_seconds=10)
mesh, me, found = sharding.mesh(fsdp=2), jax.process_index(), {}
out = Path(sys.argv[1])
write_json = files.write_json


def state(step):
    return sharding.put({f"w{i}": jnp.full((64,), float(step + i)) for i in range(3)}, mesh)


def opened(name):
    return Checkpoints(out / name, config={}, keep=9, best=lambda m: m["score"])


def save(checkpoints, step):
    try:
        checkpoints.save(step, state(step), cursor={}, metrics={"score": step})
        checkpoints.wait()
    except CheckpointError as error:
        return str(error)


def late(path, content):
    if path.name == "record.json":
        time.sleep(1)
    write_json(path, content)


def fails(path, content):
    raise OSError("no room for the record")


def unreadable(*_, **__):
    raise OSError("no way to read")


with opened("late") as checkpoints:
    files.write_json = late
    save(checkpoints, 1)
    files.write_json = write_json
    restored = checkpoints.restore(state(0))
    found["late"] = [restored.step, [float(x.sum()) for x in restored.state.values()]]
    like = jax.eval_shape(lambda: {f"w{i}": jnp.ones(64) for i in range(3)})
    restored = checkpoints.restore(like)
    found["no place"] = [float(x.sum()) for x in restored.state.values()]

with opened("full") as checkpoints:
    save(checkpoints, 1)
    for process in (0, 1):
        if me == process:
            setrlimit(RLIMIT_FSIZE, (0, RLIM_INFINITY))
        found[f"full {process}"] = save(checkpoints, 2)
        setrlimit(RLIMIT_FSIZE, (RLIM_INFINITY, RLIM_INFINITY))
    found["then"] = [save(checkpoints, 3), checkpoints.steps(), checkpoints.restore(state(0)).step]

with opened("again") as checkpoints:
    files.write_json = fails
    found["first object"] = save(checkpoints, 1)
    files.write_json = write_json
with opened("again") as checkpoints:
    found["second object"] = [save(checkpoints, 1), checkpoints.steps()]

with opened("best") as checkpoints:
    for step in (1, 2, 3):
        save(checkpoints, step)
    if me == 0:
        (out / "best" / "3" / "record.json").write_text("")
    found["refused"] = [checkpoints.restore(state(0)).step, checkpoints.steps()]
    save(checkpoints, 3)
    found["saved anew"] = [checkpoints.steps(), checkpoints.best_step()]
    found["as the first says"] = checkpoints.restore(state(0), step=2 - me).step

    read = ocp.StandardCheckpointHandler.restore
    if me == 1:
        ocp.StandardCheckpointHandler.restore = unreadable
    try:
        checkpoints.restore(state(0), step=1)
    except CheckpointError as error:
        found["unreadable"] = str(error)
    ocp.StandardCheckpointHandler.restore = read
    found["readable"] = checkpoints.restore(state(0), step=1).step

(out / f"{me}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What either process saw."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "program.py").write_text(PROGRAM)
    assert launch.launch([str(folder / "program.py"), str(folder)], processes=2, devices=1) == 0
    return [json.loads((folder / f"{index}.json").read_text()) for index in (0, 1)]


@pytest.mark.slow
class TestTwoProcesses:
    def test_the_first_says_which_files_there_are(self, found: list[dict[str, Any]]) -> None:
        # Its record is written when the other one has long been done.
        for one in found:
            assert one["late"] == [1, [64.0, 128.0, 192.0]]

    def test_arrays_without_a_place_are_in_either(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            assert one["no place"] == [64.0, 128.0, 192.0]

    @pytest.mark.parametrize("process", [0, 1])
    def test_where_one_cannot_write_both_know(
        self, found: list[dict[str, Any]], process: int
    ) -> None:
        said = [one[f"full {process}"] for one in found]
        assert said[0] == said[1]
        assert "step 2 was not saved" in said[0] and "File too large" in said[0]
        assert "the last step saved is 1" in said[0]

    def test_and_go_on(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            assert one["then"] == [None, [1, 3], 3]

    def test_an_exchange_broken_off_is_no_part_of_the_next(
        self, found: list[dict[str, Any]]
    ) -> None:
        for one in found:
            assert "no room for the record" in one["first object"]
            assert one["second object"] == [None, [1]]

    def test_they_know_of_the_same_steps(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            assert one["refused"] == [2, [1, 2]]
            assert one["saved anew"] == [[1, 2, 3], 3]
            assert one["as the first says"] == 2

    def test_where_one_cannot_read_both_know_and_go_on(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            assert "step 1: cannot be read: OSError: no way to read" in one["unreadable"]
            assert one["readable"] == 1
