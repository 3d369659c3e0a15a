"""A step is whole, durable and what was saved, or it is refused by name and an older one taken."""

import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from rlhfjax import checkpoint
from rlhfjax.algorithms import ppo
from rlhfjax.checkpoint import CheckpointError, Checkpoints, files

ROOT = Path(__file__).parents[2]
CONFIG = {"seed": 1, "model": {"width": 16}}
OPTIMIZER = optax.adam(1e-2)


def state_at(step: int) -> ppo.State:
    params = {"policy": {"w": jnp.arange(12.0).reshape(3, 4) + step}, "value": jnp.ones(4)}
    return ppo.init(params, OPTIMIZER, jax.random.key(7), kl_coef=0.1 * step)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3, all of them good."""
    with Checkpoints(tmp_path / "run", config=CONFIG, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_at(step), cursor={"epoch": 0, "position": step})
    return tmp_path / "run"


def restored(folder: Path, like: Any = None, config: Any = CONFIG) -> checkpoint.Restored:
    with warnings.catch_warnings(), Checkpoints(folder, config=config, keep=9) as checkpoints:
        warnings.simplefilter("ignore")
        found = checkpoints.restore(state_at(0) if like is None else like)
    assert found is not None
    return found


def assert_is(found: checkpoint.Restored, step: int) -> None:
    assert found.step == step
    assert found.cursor == {"epoch": 0, "position": step}
    assert checkpoint.digests(found.state) == checkpoint.digests(state_at(step))


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_newest_step_comes_back_whole(folder: Path) -> None:
    found = restored(folder)
    assert_is(found, 3)
    assert found.refused == {}
    assert found.versions["jax"] == jax.__version__
    assert jax.random.bits(found.state.key) == jax.random.bits(jax.random.key(7))
    assert found.state.kl_coef == jnp.float32(0.1 * 3)


def test_shapes_and_dtypes_suffice(folder: Path) -> None:
    assert_is(restored(folder, jax.eval_shape(lambda: state_at(0))), 3)


def test_nothing_saved_is_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "new", config=CONFIG) as checkpoints:
        assert checkpoints.restore(state_at(0)) is None


def test_half_a_step_is_nothing_and_makes_room(folder: Path) -> None:
    for step in (1, 2, 3):
        (folder / str(step) / "files.json").unlink()
    with Checkpoints(folder, config=CONFIG) as checkpoints:
        with pytest.warns(UserWarning, match="incomplete"):
            assert checkpoints.restore(state_at(0)) is None
        checkpoints.save(1, state_at(1), cursor={"epoch": 0, "position": 1})
        checkpoints.wait()
        assert checkpoints.steps() == [1]
    assert_is(restored(folder), 1)


def test_the_state_may_be_donated_at_once(tmp_path: Path) -> None:
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    tree = {"w": jnp.ones((1000, 500))}
    with Checkpoints(tmp_path, config={}) as checkpoints:
        checkpoints.save(1, tree, cursor={})
        for _ in range(9):
            tree = double(tree)
        found = checkpoints.restore(tree)
    assert found is not None
    np.testing.assert_array_equal(found.state["w"], np.ones((1000, 500)))


def test_a_step_is_saved_once(folder: Path) -> None:
    before = everything_in(folder)
    with (
        Checkpoints(folder, config=CONFIG) as checkpoints,
        pytest.raises(ValueError, match="3 is saved already"),
    ):
        checkpoints.save(3, state_at(0), cursor={})
    assert everything_in(folder) == before


def test_old_steps_that_cannot_be_removed_do_not_fail_a_save(folder: Path) -> None:
    with Checkpoints(folder, config=CONFIG, keep=1, best=lambda m: m["none"]) as checkpoints:
        checkpoints.save(4, state_at(4), cursor={"epoch": 0, "position": 4})
        with pytest.warns(UserWarning, match="old steps are still there: KeyError"):
            checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3, 4]
    assert_is(restored(folder), 4)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, config={}, keep=2, best=lambda m: m["score"]) as checkpoints:
        for step, score in enumerate([0.1, 0.9, 0.3, 0.2, 0.5]):
            checkpoints.save(step, {"x": jnp.float32(step)}, cursor={}, metrics={"score": score})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"1", "3", "4"}


def test_scalars_of_jax_and_numpy_are_numbers(tmp_path: Path) -> None:
    # 9.5 is greater than 10.5 where both are text.
    scores = [jnp.float32(9.5), np.float64(10.5), jnp.bfloat16(1), np.int32(-1)]
    with Checkpoints(tmp_path, config={}, keep=1, best=lambda m: m["score"]) as checkpoints:
        for step, score in enumerate(scores):
            cursor = {"position": np.int64(step), "seen": [jnp.int32(7)]}
            checkpoints.save(step, {"x": jnp.ones(1)}, cursor=cursor, metrics={"score": score})
        found = checkpoints.restore({"x": jnp.ones(1)})
        assert found is not None
        assert found.cursor == {"position": 3, "seen": [7]} and found.metrics == {"score": -1}
        assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 3], 1)


@pytest.mark.parametrize("value", [jnp.ones(2), {"at": Path("x")}, {1, 2}], ids=str)
def test_what_is_no_json_is_named(tmp_path: Path, value: Any) -> None:
    with Checkpoints(tmp_path, config={}) as checkpoints:
        with pytest.raises(TypeError, match=r"cursor\['position'\] is no JSON"):
            checkpoints.save(1, {"x": jnp.ones(1)}, cursor={"position": value})
        assert checkpoints.steps() == []


def test_a_metric_that_is_not_a_number_is_never_the_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, config={}, keep=1, best=lambda m: m["score"]) as checkpoints:
        for step, score in enumerate([float("nan"), 10.5, 1.0]):
            checkpoints.save(step, {"x": jnp.ones(1)}, cursor={}, metrics={"score": score})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 2], 1)


def test_the_names_of_new_folders_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(files, "sync", synced.append)
    with Checkpoints(tmp_path / "a" / "b", config={}):
        assert set(synced) == {tmp_path, tmp_path / "a"}
    synced.clear()
    with Checkpoints(tmp_path / "a" / "b", config={}):
        assert synced == []


def test_half_a_step_is_not_removed_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    wait, remove = ocp.AsyncCheckpointer.wait_until_finished, shutil.rmtree

    def fails(*_: Any) -> None:
        events.append("fails")
        raise OSError("no room")

    def waits(orbax: Any) -> None:
        wait(orbax)
        events.append("waits")

    def removes(*args: Any, **kwargs: Any) -> None:
        events.append("removes")
        remove(*args, **kwargs)

    with Checkpoints(tmp_path, config={}) as checkpoints:
        monkeypatch.setattr(files, "write_json", fails)
        monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", waits)
        monkeypatch.setattr(shutil, "rmtree", removes)
        checkpoints.save(1, {"x": jnp.ones(1)}, cursor={})
        with pytest.raises(CheckpointError, match="no room"):
            checkpoints.wait()
        assert events[events.index("fails") :] == ["fails", "waits", "removes"]


def test_an_error_on_its_way_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def close(_: Any) -> None:
        raise OSError("while closing")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "close", close)
    with pytest.raises(KeyError, match="mine"), Checkpoints(tmp_path, config={}):
        raise KeyError("mine")


def test_files_that_came_or_went_are_not_sealed(folder: Path) -> None:
    hashes = files.hashes(folder / "3", files.names(folder / "3"))
    (folder / "3" / "files.json").unlink()
    (folder / "3" / "late").write_text("")
    with pytest.raises(files.Refused, match="late came or went"):
        files.seal(folder / "3", hashes)
    (folder / "3" / "late").unlink()
    with pytest.raises(files.Refused, match="early came or went"):
        files.seal(folder / "3", hashes | {"early": "0"})
    assert not (folder / "3" / "files.json").exists()


def test_a_step_of_choice_comes_back(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, config=CONFIG, keep=1, best=lambda m: m["score"]) as checkpoints:
        assert checkpoints.best_step() is None
        for step, score in enumerate([0.1, 0.9, 0.3]):
            at = {"epoch": 0, "position": step}
            checkpoints.save(step, state_at(step), cursor=at, metrics={"score": score})
        checkpoints.wait()
        assert checkpoints.best_step() == 1
        found = checkpoints.restore(state_at(0), step=checkpoints.best_step())
        assert found is not None
        assert_is(found, 1)
        assert found.metrics == {"score": 0.9}
        with pytest.raises(CheckpointError, match=r"there is no step 0, only \[1, 2\]"):
            checkpoints.restore(state_at(0), step=0)
        (tmp_path / "1" / "record.json").write_text("")
        with (
            pytest.warns(UserWarning, match="not taken"),
            pytest.raises(CheckpointError, match=r"step 1: record.json was altered; take"),
        ):
            checkpoints.restore(state_at(0), step=1)


def test_what_must_come_first_comes_first(tmp_path: Path) -> None:
    def fails() -> None:
        raise OSError("no room for the log")

    with Checkpoints(tmp_path, config={}) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(1)}, cursor={}, after=fails)
        with pytest.raises(CheckpointError, match="step 1 was not saved: OSError: no room for the"):
            checkpoints.wait()
        assert checkpoints.steps() == []


class TestRefused:
    def test_a_bit_of_any_file(self, folder: Path) -> None:
        rng = random.Random(0)
        names = sorted(p for p in (folder / "3").rglob("*") if p.is_file())
        assert len(names) > 8
        for path in names:
            content = path.read_bytes()
            bit = rng.randrange(8 * len(content))
            altered = bytearray(content)
            altered[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bytes(altered))
            before = everything_in(folder)
            found = restored(folder)
            assert_is(found, 2)
            said = found.refused[3]
            assert str(path.relative_to(folder / "3")) in said or "files.json" in said
            assert everything_in(folder) == before, "nothing is deleted or changed"
            path.write_bytes(content)
        assert_is(restored(folder), 3)

    def test_a_file_cut_short_missing_or_too_many(self, folder: Path) -> None:
        for path in [p for p in (folder / "3").rglob("*") if p.is_file()]:
            content = path.read_bytes()
            path.write_bytes(content[:-1])
            assert_is(restored(folder), 2)
            path.unlink()
            assert_is(restored(folder), 2)
            path.write_bytes(content)
        (folder / "3" / "arrays" / "more").write_text("")
        assert "more" in restored(folder).refused[3]

    def test_a_step_whose_saving_was_broken_off(self, folder: Path) -> None:
        (folder / "3" / "files.json").unlink()
        (folder / "4").mkdir()
        found = restored(folder)
        assert_is(found, 2)
        assert found.refused.keys() == {3, 4} and "incomplete" in found.refused[4]

    def test_arrays_that_are_not_those_of_the_digests(self, folder: Path) -> None:
        # As if the disk had lied when the hashes of the files were taken.
        shutil.rmtree(folder / "3" / "arrays")
        shutil.copytree(folder / "2" / "arrays", folder / "3" / "arrays")
        self.sign(folder / "3")
        found = restored(folder)
        assert_is(found, 2)
        assert "kl_coef has the digest" in found.refused[3]

    def test_another_format(self, folder: Path) -> None:
        record = json.loads((folder / "3" / "record.json").read_text())
        record |= {"format": 0, "versions": {"rlhfjax": "0.0.7"}}
        (folder / "3" / "record.json").write_text(json.dumps(record))
        self.sign(folder / "3")
        found = restored(folder)
        assert_is(found, 2)
        assert "format 0" in found.refused[3] and "0.0.7" in found.refused[3]

    @pytest.mark.parametrize(
        ("params", "said"),
        [
            ({"policy": {"w": jnp.zeros((4, 3))}, "value": jnp.ones(4)}, ["policy.w", "[4, 3]"]),
            ({"policy": {"w": jnp.zeros((3, 4))}, "value": jnp.ones(4, "int32")}, ["int32[4]"]),
            ({"policy": {"w": jnp.zeros((3, 4))}}, ["value", "missing in the run"]),
            (
                {"policy": {"w": jnp.zeros((3, 4))}, "value": jnp.ones(4), "more": jnp.ones(1)},
                ["more", "missing in the step"],
            ),
        ],
        ids=["shape", "dtype", "fewer", "more"],
    )
    def test_arrays_of_another_model(self, folder: Path, params: Any, said: list[str]) -> None:
        like = ppo.init(params, OPTIMIZER, jax.random.key(0), kl_coef=0.0)
        with pytest.raises(CheckpointError) as error:
            restored(folder, like)
        for part in [str(folder), "step 3", "step 1", *said]:
            assert part in str(error.value)

    def test_another_run(self, folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"another run: model.width is 16 there, 32 here"):
            restored(folder, config={"seed": 1, "model": {"width": 32}})

    def test_all_of_them(self, folder: Path) -> None:
        for step in (1, 2, 3):
            (folder / str(step) / "record.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"step 3: record.json was altered; step 2"):
            restored(folder)

    def test_saving_again_keeps_what_was_refused_aside(self, folder: Path) -> None:
        path = folder / "3" / "record.json"
        path.write_bytes(path.read_bytes() + b" ")
        with Checkpoints(folder, config=CONFIG, keep=2) as checkpoints:
            with pytest.warns(UserWarning, match="record.json was altered; not taken"):
                assert_is(checkpoints.restore(state_at(0)), 2)
            checkpoints.save(3, state_at(3), cursor={"epoch": 0, "position": 3})
        assert {p.name for p in folder.iterdir()} == {"2", "3", "3.refused"}
        assert_is(restored(folder), 3)

    def test_and_is_still_refused_when_an_older_one_was_chosen(self, folder: Path) -> None:
        (folder / "3" / "record.json").write_text("")
        with Checkpoints(folder, config=CONFIG, keep=1) as checkpoints:
            with pytest.warns(UserWarning, match="not taken"):
                checkpoints.restore(state_at(0))
            found = checkpoints.restore(state_at(0), step=1)
            assert found is not None and found.refused == {}
            assert checkpoints.steps() == [1, 2]
            before = everything_in(folder / "3")
            checkpoints.save(4, state_at(4), cursor={})
            checkpoints.wait()
            assert checkpoints.steps() == [4]
        assert everything_in(folder / "3") == before

    def test_and_is_taken_when_it_is_mended(self, folder: Path) -> None:
        path = folder / "3" / "record.json"
        content = path.read_bytes()
        path.write_text("")
        with Checkpoints(folder, config=CONFIG, keep=9) as checkpoints:
            with pytest.warns(UserWarning, match="not taken"):
                checkpoints.restore(state_at(0))
            path.write_bytes(content)
            found = checkpoints.restore(state_at(0))
            assert found is not None
            assert_is(found, 3)
            assert checkpoints.steps() == [1, 2, 3]

    def test_and_takes_the_first_name_that_is_free(self, folder: Path) -> None:
        for name in ("3.refused", "3.refused2"):
            (folder / name).mkdir()
        (folder / "3" / "record.json").write_text("")
        with Checkpoints(folder, config=CONFIG, keep=9) as checkpoints:
            with pytest.warns(UserWarning, match="not taken"):
                checkpoints.restore(state_at(0))
            checkpoints.save(3, state_at(3), cursor={})
        assert (folder / "3.refused1" / "record.json").read_text() == ""

    @staticmethod
    def sign(step: Path) -> None:
        """Writes the list of files anew, as somebody who means harm would."""
        files.seal(step, files.hashes(step, files.names(step)))


def run(program: str, *wrapper: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*wrapper, sys.executable, "-c", program],
        cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


SMALL_DISK = """
import os, subprocess, sys, warnings
import jax.numpy as jnp, numpy as np
from pathlib import Path
from rlhfjax import checkpoint

folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", folder], check=True)
tree = {"x": jnp.asarray(np.random.default_rng(0).normal(size=200_000), jnp.float32)}
with checkpoint.Checkpoints(folder / "run", config={}, keep=9) as checkpoints:
    checkpoints.save(1, tree, cursor={})
    checkpoints.wait()
    filler = folder / "filler"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_bsize
    filler.write_bytes(bytes(free - 400_000))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checkpoints.save(2, tree, cursor={})     # fails behind our back
        checkpoints.save(3, tree, cursor={})     # says so, and fails as well
    print("told", [str(w.message) for w in told])
    print("saved", checkpoints.steps())
    try:
        checkpoints.wait()
    except checkpoint.CheckpointError as error:
        print("error", error)
    print("there", sorted(p.name for p in (folder / "run").iterdir()))
    filler.unlink()
    checkpoints.save(4, tree, cursor={})
    checkpoints.wait()
    print("saved", checkpoints.steps(), checkpoints.restore(tree).step)
"""


def can_mount() -> bool:
    ran = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
    )
    return ran.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="may not mount a small filesystem here")
class TestDisks:
    def test_a_full_one_loses_nothing_and_is_never_called_a_success(self, tmp_path: Path) -> None:
        program = SMALL_DISK.replace("sys.argv[1]", repr(str(tmp_path)))
        ran = run(program, "unshare", "--mount")
        lines = dict.fromkeys(line.split(" ", 1)[0] for line in ran.stdout.splitlines())
        assert list(lines) == ["told", "saved", "error", "there"], ran.stderr
        told, saved, error, there, saved_at_last = ran.stdout.splitlines()
        assert "step 2 was not saved" in told and "training goes on" in told
        assert "the last step saved is 1" in told
        assert saved == "saved [1]"
        assert "step 3 was not saved" in error
        assert there == "there ['1']"
        assert saved_at_last == "saved [1, 4] 4"

    def test_one_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        program = f"""
import subprocess
from rlhfjax import checkpoint
subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", {str(tmp_path)!r}], check=True)
try:
    checkpoint.Checkpoints({str(tmp_path / "run")!r}, config={{}})
except checkpoint.CheckpointError as error:
    print(error)
"""
        ran = run(program, "unshare", "--mount")
        assert "Read-only file system" in ran.stdout and str(tmp_path) in ran.stdout, ran.stderr

    def test_a_run_is_restored_from_a_disk_that_cannot_be_written(
        self, folder: Path, tmp_path: Path
    ) -> None:
        program = f"""
import subprocess, sys
sys.path.insert(0, "tests/checkpoint")
from pathlib import Path
import test_steps
subprocess.run(["mount", "--bind", {str(folder)!r}, {str(folder)!r}], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", {str(folder)!r}], check=True)
test_steps.assert_is(test_steps.restored(Path({str(folder)!r})), 3)
print("restored")
"""
        ran = run(program, "unshare", "--mount")
        assert ran.stdout == "restored\n", ran.stderr
