"""Two processes are one run: killed, asked to stop, and carried on by a single one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhfjax.cli import launch, processes
from rlhfjax.cli.interruption import INTERRUPTED
from rlhfjax.data.generated import generated_corpus, write_corpus

ROOT = Path(__file__).parents[2]
HEARTBEAT = 10
SIZES = {
    "model": {"vocab": 300, "layers": 1, "width": 16, "heads": 2, "context": 32},
    "sft": {"epochs": 1, "buckets": 1},
    "reward": {"epochs": 1, "buckets": 1},
    "ppo": {"iterations": 6, "prompts": 16, "minibatches": 2, "response-tokens": 8},
}


class TestJoin:
    def test_alone_nothing_happens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in (processes.ADDRESS, processes.COUNT, processes.INDEX):
            monkeypatch.delenv(name, raising=False)
        processes.join()

    @pytest.mark.parametrize(
        "given",
        [{"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}],
    )
    def test_half_of_what_it_must_know_is_refused(
        self, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
    ) -> None:
        monkeypatch.delenv(processes.ADDRESS, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="belong together"):
            processes.join()


class TestLaunch:
    def run(self, program: str, tmp_path: Path) -> int:
        (tmp_path / "program.py").write_text(program)
        return launch.launch([str(tmp_path / "program.py"), str(tmp_path)], processes=2, devices=3)

    def test_each_knows_its_place(self, tmp_path: Path) -> None:
        program = """
import json, os, sys
names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "XLA_FLAGS")
with open(f"{sys.argv[1]}/{os.environ['JAX_PROCESS_ID']}.json", "w") as file:
    json.dump([os.environ[name] for name in names], file)
"""
        assert self.run(program, tmp_path) == 0
        told = [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)]
        assert [t[0] for t in told] == ["2", "2"] and [t[1] for t in told] == ["0", "1"]
        assert told[0][2] == told[1][2] and re.fullmatch(r"127\.0\.0\.1:\d+", told[0][2])
        assert "--xla_force_host_platform_device_count=3" in told[0][3]

    def test_the_first_failure_is_the_status(self, tmp_path: Path) -> None:
        program = "import os, sys; sys.exit(7 * int(os.environ['JAX_PROCESS_ID']))"
        assert self.run(program, tmp_path) == 7


STOPS_AND_FAILS = """
import faulthandler, json, sys
from pathlib import Path
import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from rlhfjax import sharding
from rlhfjax.cli import processes
from rlhfjax.cli.run import Run
from rlhfjax.data.cursor import batches_from

faulthandler.dump_traceback_later(150, exit=True)  # Both might wait for each other.
processes.join(heartbeat_seconds=5)

def step(state, batch):
    return state + batch, {"count": state[0] + batch}

def enough(rows):
    assert jax.process_index() == 0
    return "it is enough" if rows and rows[-1]["count"] == 3 else ""

out, mesh = Path(sys.argv[1]), sharding.mesh()
with jax.set_mesh(mesh), Run(out / "run", {}, mesh=mesh, resume=False) as run:
    trained = run.train(
        "one", lambda: jnp.zeros(2), step=sharding.Step(step), num_steps=5, save_every=5, show={},
        batches=lambda cursor: batches_from(cursor, lambda *_: [1] * 9), stop=enough,
    )
told = trained.state.addressable_data(0).tolist(), len(trained.rows), trained.stopped
(out / f"{jax.process_index()}.json").write_text(json.dumps(told))

multihost_utils.sync_global_devices("both have stopped")
if jax.process_index() == 0:
    raise OSError("no space")
multihost_utils.sync_global_devices("one has failed")
"""


@pytest.mark.slow
def test_two_stop_at_one_step_and_where_one_fails_the_other_ends(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(STOPS_AND_FAILS)
    begin = time.monotonic()
    command = [str(tmp_path / "program.py"), str(tmp_path)]
    assert launch.launch(command, processes=2, devices=1) != 0
    # Not a measure of speed: left to itself, jax waits for 300 seconds.
    assert time.monotonic() - begin < 120
    told = [json.loads((tmp_path / f"{index}.json").read_text()) for index in (0, 1)]
    # The rule is asked in the first process alone.
    assert [t[:2] for t in told] == [[[3.0, 3.0], 3]] * 2
    assert told[0][2] == "it is enough" and told[1][2]
    assert [row["count"] for row in rows(tmp_path / "run")] == [1.0, 2.0, 3.0]


def flags(data: Path, out: Path) -> list[str]:
    sizes = ((f"--{a}.{b}", str(x)) for a, of in SIZES.items() for b, x in of.items())
    given = {
        "--data": str(data), "--out": str(out), "--ppo.save-every": "1",
        "--heartbeat": str(HEARTBEAT),
    }  # fmt: skip
    return [part for pair in [*given.items(), *sizes] for part in pair]


@contextmanager
def started(folder: Path, name: str, count: int, *more: str) -> Iterator[subprocess.Popen[bytes]]:
    """`count` processes of 4 devices in all."""
    devices = 4 // count
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled{count}"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [
        sys.executable, "-m", "rlhfjax.cli.launch",
        "--processes", str(count), "--devices", str(devices), "--",
        "experiments/sentiment.py", *flags(folder / "data", folder / name), *more,
    ]  # fmt: skip
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], folder: Path) -> None:
    while not condition():
        assert process.poll() is None, (folder / "output").read_text(errors="replace")
        time.sleep(0.02)


def last_saved(out: Path) -> int:
    saved = (out / "checkpoints" / "ppo").glob("*/files.json")
    return max((int(path.parent.name) for path in saved), default=-1)


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path: Path) -> None:
    write_corpus(tmp_path / "data", generated_corpus(200, seed=0))
    two, one = tmp_path / "two", tmp_path / "one"

    with started(tmp_path, "one", 1) as process:
        assert process.wait(300) == 0, (tmp_path / "output").read_text(errors="replace")
    wanted = rows(one)

    # One of them dies, and the other does not wait for it for ever.
    with started(tmp_path, "two", 2) as process:
        wait_for(lambda: last_saved(two) >= 1, process, tmp_path)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        begin = time.monotonic()
        assert process.wait(300) != 0
        survived = time.monotonic() - begin
    first_saved = last_saved(two)

    # They start again and are asked to stop: both save the same step.
    with started(tmp_path, "two", 2, "--resume") as process:
        wait_for(lambda: last_saved(two) > first_saved, process, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == INTERRUPTED, (tmp_path / "output").read_text(errors="replace")
    assert 2 <= last_saved(two) < SIZES["ppo"]["iterations"]

    # A single process carries on with what two have written.
    with started(tmp_path, "two", 1, "--resume") as process:
        assert process.wait(300) == 0, (tmp_path / "output").read_text(errors="replace")
    found = rows(two)
    assert [(r["stage"], r["step"]) for r in found] == [(r["stage"], r["step"]) for r in wanted]
    # A KL of such a run is of the order of 0.01, a score of 1: 1e-4 tells another run.
    for row, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            if isinstance(value, float):
                assert abs(row[name] - value) < 1e-4, (row["stage"], row["step"], name)
    # Not a measure of speed: without the heartbeat it would wait for minutes.
    assert survived < 6 * HEARTBEAT
