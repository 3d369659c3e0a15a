"""A run goes on where it was broken off, to the same bits, or says why it cannot."""

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_disk import largest_file

from rlhfjax import checkpoint, sharding
from rlhfjax.algorithms import train_state
from rlhfjax.checkpoint import CheckpointError
from rlhfjax.cli.interruption import INTERRUPTED
from rlhfjax.cli.run import MOST_SKIPPED, Run, Trained, TrainingError
from rlhfjax.data.cursor import batches_from

NUM_RECORDS, NUM_STEPS = 12, 8
OPTIMIZER = optax.adam(0.1)
CONFIG = {"seed": 3, "out": "here", "model": {"width": 4}}


def epoch(number: int, start: int) -> Iterator[np.ndarray]:
    """Four batches of three records, in an order of the epoch's own."""
    order = np.random.default_rng(number).permutation(NUM_RECORDS)
    yield from order.reshape(-1, 3)[start:]


def start(seen: Any) -> Any:
    return {"train": train_state.init({"w": jnp.ones(3)}, OPTIMIZER), "seen": jnp.copy(seen)}


@jax.jit
def update(state: Any, batch: Any) -> Any:
    grads = {"w": jnp.sin(state["train"].params["w"] * batch)}
    train, _ = train_state.apply_gradients(state["train"], grads, OPTIMIZER)
    return {"train": train, "seen": state["seen"].at[batch].add(1)}


def step(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    state = update(state, batch)
    return state, {"loss": state["train"].params["w"].sum()}


def train(
    out: Path,
    *,
    resume: bool = False,
    stages: tuple[str, ...] = ("one",),
    step: Callable[..., Any] = step,
    config: dict[str, Any] = CONFIG,
    save_every: int = 3,
    best: str | None = None,
    fingerprint: str = "",
) -> Trained:
    mesh = sharding.mesh(devices=jax.devices()[:1])
    more = {"may_change": ("out",), "mesh": mesh, "fingerprint": fingerprint}
    with Run(out, config, resume=resume, **more) as run:
        for stage in stages:
            trained = run.train(
                stage,
                start,
                jnp.zeros(NUM_RECORDS, int),
                step=step,
                batches=lambda cursor: batches_from(cursor, epoch),
                num_steps=NUM_STEPS,
                save_every=save_every,
                best=best,
                show={"loss": "loss"},
            )
    return trained


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


def until(
    number: int, what: Callable[[], None], step: Callable[..., Any] = step
) -> Callable[..., Any]:
    """A step that does something else first when it is called for the n-th time."""
    calls = 0

    def broken(state: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            what()
        return step(state, batch)

    return broken


def kill() -> None:
    raise Killed


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, train(out, stages=("one", "two"))


def test_every_record_is_seen_once_an_epoch(unbroken: tuple[Path, Trained]) -> None:
    assert unbroken[1].state["seen"].tolist() == [2] * NUM_RECORDS


@pytest.mark.parametrize("number", range(1, 2 * NUM_STEPS + 1))
def test_broken_off_at_any_step_it_comes_to_the_same_end(
    unbroken: tuple[Path, Trained], tmp_path: Path, number: int
) -> None:
    stages = ("one", "two")
    with pytest.raises(Killed):
        train(tmp_path, stages=stages, step=until(number, kill))
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"stage": "one", "st')
    again = train(tmp_path, resume=True, stages=stages)
    assert checkpoint.digest(again.state) == checkpoint.digest(unbroken[1].state)
    assert again.rows == unbroken[1].rows
    assert (tmp_path / "metrics.jsonl").read_bytes() == (unbroken[0] / "metrics.jsonl").read_bytes()


def test_the_best_step_is_kept_beside_the_last(tmp_path: Path) -> None:
    scores = iter([0.1, 0.3, 0.9, 0.2, 0.2, 0.4, 0.1, 0.2])

    def scored(state: Any, batch: Any) -> Any:
        state, metrics = step(state, batch)
        return state, metrics | {"score": next(scores)}

    train(tmp_path, step=scored, save_every=1, best="score")
    kept = {path.name for path in (tmp_path / "checkpoints" / "one").iterdir()}
    assert kept == {"3", "7", "8"}


def test_a_step_that_rots_in_a_finished_stage_costs_nothing_but_time(
    unbroken: tuple[Path, Trained], tmp_path: Path
) -> None:
    train(tmp_path, stages=("one", "two"))
    (tmp_path / "checkpoints" / "one" / "8" / "record.json").write_text("")
    with pytest.warns(UserWarning, match="altered; not taken"):
        again = train(tmp_path, resume=True, stages=("one", "two"))
    assert again.rows == unbroken[1].rows
    assert (tmp_path / "metrics.jsonl").read_bytes() == (unbroken[0] / "metrics.jsonl").read_bytes()


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(CheckpointError, match="another run is at work there"):
            train(tmp_path, resume=True)

    train(tmp_path, step=until(3, second))


def test_nothing_to_do_is_done(tmp_path: Path) -> None:
    mesh = sharding.mesh(devices=jax.devices()[:1])
    with Run(tmp_path, CONFIG, mesh=mesh, resume=False) as run:
        trained = run.train(
            "one", start, jnp.zeros(NUM_RECORDS, int), step=step,
            batches=lambda cursor: batches_from(cursor, lambda number, start: iter(())),
            num_steps=0, save_every=1, show={},
        )  # fmt: skip
    assert trained.rows == [] and trained.state["seen"].sum() == 0


def test_a_run_that_is_done_is_done(unbroken: tuple[Path, Trained]) -> None:
    def never(state: Any, batch: Any) -> Any:
        raise AssertionError

    out, trained = unbroken
    before = (out / "metrics.jsonl").read_bytes()
    again = train(out, resume=True, stages=("one", "two"), step=never)
    assert checkpoint.digest(again.state) == checkpoint.digest(trained.state)
    assert again.rows == trained.rows
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_first(
    unbroken: tuple[Path, Trained], tmp_path: Path, number: int
) -> None:
    before = signal.getsignal(number)
    told = until(5, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        train(tmp_path, stages=("one", "two"), step=told, save_every=100)
    assert end.value.code == INTERRUPTED == 75
    assert signal.getsignal(number) is before
    record = json.loads((tmp_path / "checkpoints" / "one" / "5" / "record.json").read_text())
    assert record["cursor"] == {"epoch": 1, "position": 1}
    again = train(tmp_path, resume=True, stages=("one", "two"))
    assert checkpoint.digest(again.state) == checkpoint.digest(unbroken[1].state)


def test_asked_twice_it_does_not_wait(tmp_path: Path) -> None:
    def twice() -> None:
        listens = signal.getsignal(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is listens:  # two at once may be heard as one
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    # What a shell starts in the background is born deaf to it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, step=until(2, twice))
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_a_run_is_not_written_over(unbroken: tuple[Path, Trained]) -> None:
    before = {p: p.read_bytes() for p in unbroken[0].rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"holds a run.*--resume"):
        train(unbroken[0])
    other = {"seed": 4, "out": "there", "model": {"width": 8}}
    with pytest.raises(CheckpointError) as error:
        train(unbroken[0], resume=True, config=other)
    assert "model.width is 4 there, 8 here; seed is 3 there, 4 here" in str(error.value)
    assert "out" not in str(error.value).split("another run:")[1].split(";")[0]
    assert {p: p.read_bytes() for p in unbroken[0].rglob("*") if p.is_file()} == before


def test_other_data_are_another_run(tmp_path: Path) -> None:
    train(tmp_path, fingerprint="a")
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="a run on other data: a there, b here"):
        train(tmp_path, fingerprint="b", resume=True, config=CONFIG | {"out": "there"})
    assert (tmp_path / "config.yaml").read_bytes() == before
    # Every step knows it as well.
    (tmp_path / "env.json").unlink()
    with (
        pytest.warns(UserWarning, match="env.json was altered"),
        pytest.raises(CheckpointError, match="another run: fingerprint is 'a' there, 'b' here"),
    ):
        train(tmp_path, fingerprint="b", resume=True)


def test_other_versions_are_told(unbroken: tuple[Path, Trained], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, step=until(2, kill))
    environment = json.loads((tmp_path / "env.json").read_text())
    environment["versions"]["jax"] = "0.0.1"
    (tmp_path / "env.json").write_text(json.dumps(environment))
    with pytest.warns(UserWarning, match=r"'jax': '0\.0\.1'"):
        train(tmp_path, resume=True)


def with_metrics(**metrics: float) -> Callable[..., Any]:
    def step_with(state: Any, batch: Any) -> Any:
        state, own = step(state, batch)
        return state, own | metrics

    return step_with


@pytest.mark.parametrize(
    ("metrics", "steps", "said"),
    [
        ({"val/num_scored": 0}, 1, "no sample .* finite score"),
        ({"val/num_skipped": 2}, MOST_SKIPPED, f"gradients of {MOST_SKIPPED} steps in a row"),
    ],
)
def test_what_would_go_on_for_nothing_stops_with_a_dump(
    tmp_path: Path, metrics: dict[str, float], steps: int, said: str
) -> None:
    with pytest.raises(TrainingError, match=rf"one step {steps}: .*{said}.*dump"):
        train(tmp_path, step=with_metrics(**metrics))
    row = json.loads((tmp_path / "dump" / "row.json").read_text())
    assert row["step"] == steps
    batch = np.load(tmp_path / "dump" / "batch.npz")
    np.testing.assert_array_equal(batch["batch"], next(epoch(*divmod(steps - 1, 4))))
    like = checkpoint.flatten(jax.eval_shape(start, jnp.zeros(NUM_RECORDS, int)))
    state = checkpoint.restore(tmp_path / "dump" / "state", like)
    assert state["train.step"] == steps


def test_a_skipped_update_now_and_then_is_no_reason_to_stop(tmp_path: Path) -> None:
    calls = 0

    def now_and_then(state: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        state, metrics = step(state, batch)
        return state, metrics | {"val/num_skipped": int(calls % MOST_SKIPPED > 0)}

    assert len(train(tmp_path, step=now_and_then).rows) == NUM_STEPS


def test_skipped_steps_are_counted_on_across_a_kill(tmp_path: Path) -> None:
    calls = 0

    def bad(state: Any, batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == MOST_SKIPPED - 1:
            raise Killed
        state, metrics = step(state, batch)
        return state, metrics | {"val/num_skipped": 1}

    with pytest.raises(Killed):
        train(tmp_path, step=bad, save_every=1)
    with pytest.raises(TrainingError, match=f"one step {MOST_SKIPPED}:"):
        train(tmp_path, step=with_metrics(**{"val/num_skipped": 1}), resume=True)


def test_a_dump_that_cannot_be_written_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "dump").write_text("")
    with pytest.raises(TrainingError, match=r"no sample .* finite score.*could not be written"):
        train(tmp_path, step=with_metrics(**{"val/num_scored": 0}))


def test_what_had_not_begun_may_begin_otherwise(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, step=until(1, kill))
    assert len(train(tmp_path, config=CONFIG | {"seed": 4}).rows) == NUM_STEPS


def test_a_loss_that_is_no_number_is_skipped_until_it_is_too_much(tmp_path: Path) -> None:
    bad = with_metrics(loss=float("nan"), **{"val/num_skipped": 1})
    with pytest.raises(TrainingError, match=f"one step {MOST_SKIPPED}:"):
        train(tmp_path, step=bad)


def test_where_a_run_could_not_begin_another_may(tmp_path: Path) -> None:
    with largest_file(0), pytest.raises(CheckpointError, match="make room there"):
        train(tmp_path)
    assert len(train(tmp_path).rows) == NUM_STEPS


def test_what_is_no_array_is_not_in_the_dump(tmp_path: Path) -> None:
    def epoch_with_text(number: int, start: int) -> Iterator[Any]:
        yield from ({"rows": batch, "text": "prompt"} for batch in epoch(number, start))

    def bad(state: Any, batch: Any) -> Any:
        state, metrics = step(state, batch["rows"])
        return state, metrics | {"val/num_scored": 0}

    mesh = sharding.mesh(devices=jax.devices()[:1])
    with (
        Run(tmp_path, CONFIG, mesh=mesh, resume=False) as run,
        pytest.raises(TrainingError, match="state, batch and metrics are in"),
    ):
        run.train(
            "one", start, jnp.zeros(NUM_RECORDS, int), step=bad,
            batches=lambda cursor: batches_from(cursor, epoch_with_text),
            num_steps=NUM_STEPS, save_every=3, show={"loss": "loss"},
        )  # fmt: skip
    assert list(np.load(tmp_path / "dump" / "batch.npz")) == ["batch.rows"]


def test_a_configuration_that_lost_its_end_is_written_anew(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tmp_path, step=until(2, kill))
    whole = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(whole[: whole.index("model")])
    train(tmp_path, resume=True)
    assert (tmp_path / "config.yaml").read_text() == whole


@pytest.mark.parametrize("content", ["", "[1]", "{seed: 3"])
def test_a_configuration_that_rots_is_written_anew(tmp_path: Path, content: str) -> None:
    with pytest.raises(Killed):
        train(tmp_path, step=until(2, kill))
    before = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(content)
    with pytest.warns(UserWarning, match="config.yaml was altered"):
        train(tmp_path, resume=True)
    assert (tmp_path / "config.yaml").read_text() == before


class TestNoRoomForTheLog:
    @pytest.fixture
    def full(self) -> Iterator[ExitStack]:
        with warnings.catch_warnings(record=True) as self.told, ExitStack() as full:
            warnings.simplefilter("always")
            yield full

    @staticmethod
    def fill(full: ExitStack, out: Path) -> None:
        while not (out / "checkpoints" / "one" / "3" / "files.json").exists():
            time.sleep(0.01)
        full.enter_context(largest_file(0))

    def test_nothing_is_saved_and_training_goes_on(
        self, unbroken: tuple[Path, Trained], tmp_path: Path, full: ExitStack
    ) -> None:
        whole = (unbroken[0] / "metrics.jsonl").read_bytes().splitlines()[:NUM_STEPS]
        there_again = until(7, full.close)
        trained = train(tmp_path, step=until(4, lambda: self.fill(full, tmp_path), there_again))
        said = [str(warning.message) for warning in self.told]
        assert any("step 6 was not saved" in x and "lines wait" in x for x in said), said
        assert {path.name for path in (tmp_path / "checkpoints" / "one").iterdir()} == {"3", "8"}
        assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == whole
        assert trained.rows == [json.loads(line) for line in whole]

    def test_and_never_again_the_run_says_what_is_saved(
        self, tmp_path: Path, full: ExitStack
    ) -> None:
        with pytest.raises(CheckpointError, match=r"step 8 was not .*lines wait.* saved is 3"):
            train(tmp_path, step=until(4, lambda: self.fill(full, tmp_path)))
        full.close()
        assert len(train(tmp_path, resume=True).rows) == NUM_STEPS


def test_a_log_without_checkpoints_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    for resume in (False, True):
        with pytest.raises((CheckpointError, ValueError), match=r"holds a run|not a line of a log"):
            train(tmp_path, resume=resume)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine\n"


def test_a_last_step_that_is_not_saved_is_an_error(tmp_path: Path) -> None:
    def blocked() -> None:
        # Where the folder of the last step should be there is a file.
        (tmp_path / "checkpoints" / "one" / "8").write_text("")

    with pytest.raises(CheckpointError, match=r"step 8 was not saved.*the last step saved is 6"):
        train(tmp_path, step=until(8, blocked))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/out.*Not a directory.*can be written"):
        train(tmp_path / "file" / "out")
