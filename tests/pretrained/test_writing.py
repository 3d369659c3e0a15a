"""Files of a model directory as they are written: whole, and as the library reads them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.pretrained import reading, writing
from rlhfjax.pretrained.writing import Planned, new_directory

RNG = np.random.default_rng(0)
ARRAYS = {f"layer.{i}": RNG.normal(size=(i, 4)).astype(np.float32) for i in (2, 1, 3)} | {
    "half": RNG.normal(size=3).astype(jnp.bfloat16),
    "turned": RNG.normal(size=(2, 3)).astype(np.float32).T,
    "scalar": np.array(2.5, np.float32),
    "nothing": np.zeros((0, 2), np.float32),
}
PLAN = [Planned(name, array.dtype, array.shape) for name, array in ARRAYS.items()]


@pytest.mark.parametrize("max_shard_bytes", [10**9, 50, 1])
@pytest.mark.parametrize("piece", [1 << 20, 5])
def test_the_library_reads_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_shard_bytes: int, piece: int
) -> None:
    library = pytest.importorskip("safetensors")
    monkeypatch.setattr(writing, "PIECE", piece)
    writing.write_tensors(tmp_path, PLAN, ARRAYS.values(), max_shard_bytes=max_shard_bytes)
    found = {}
    for file in tmp_path.glob("*.safetensors"):
        with library.safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def test_shards_are_as_large_as_they_may_be(tmp_path: Path) -> None:
    sizes = [32, 16, 48, 6, 24, 4, 0]
    writing.write_tensors(tmp_path, PLAN, ARRAYS.values(), max_shard_bytes=52)
    index = json.loads((tmp_path / reading.INDEX).read_text())
    numbers = [int(index["weight_map"][name].split("-")[1]) for name in ARRAYS]
    assert numbers == [1, 1, 2, 3, 3, 3, 3]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert set(index["weight_map"].values()) == {
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    }
    assert reading.tensors(tmp_path).keys() == ARRAYS.keys()


def test_arrays_are_cast_as_planned(tmp_path: Path) -> None:
    plan = [Planned("x", np.dtype(jnp.bfloat16), (2, 4))]
    writing.write_tensors(tmp_path, plan, [ARRAYS["layer.2"]], max_shard_bytes=100)
    (stored,) = reading.tensors(tmp_path).values()
    assert stored.dtype == "BF16"
    expected = ARRAYS["layer.2"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(reading.read(stored, jnp.bfloat16), expected)


def test_one_array_is_asked_for_at_a_time(tmp_path: Path) -> None:
    """When an array is asked for, those before it are in their file."""
    file = tmp_path / "x.safetensors"

    def arrays() -> Iterator[np.ndarray]:
        written = 0
        for _ in range(3):
            assert file.stat().st_size >= written
            yield np.ones(1 << 16, np.float32)
            written += 1 << 18

    plan = [Planned(str(i), np.dtype(np.float32), (1 << 16,)) for i in range(3)]
    writing.write_file(file, plan, arrays())


def test_another_shape_than_planned_is_an_error(tmp_path: Path) -> None:
    plan = [Planned("x", np.dtype(np.float32), (4, 2))]
    with pytest.raises(ValueError, match="x is"):
        writing.write_file(tmp_path / "x", plan, iter([ARRAYS["layer.2"]]))


class TestNewDirectory:
    def names(self, folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    def test_is_there_when_it_is_whole(self, tmp_path: Path) -> None:
        target = tmp_path / "deep" / "model"
        with new_directory(target, overwrite=False) as folder:
            (folder / "x").write_text("1")
            assert not target.exists()
        assert self.names(tmp_path) == ["deep", "deep/model", "deep/model/x"]

    def test_has_the_rights_that_others_have(self, tmp_path: Path) -> None:
        (tmp_path / "other").mkdir()
        with new_directory(tmp_path / "model", overwrite=False):
            pass
        assert (tmp_path / "model").stat().st_mode == (tmp_path / "other").stat().st_mode

    def test_is_never_half_there(self, tmp_path: Path) -> None:
        with (
            pytest.raises(OSError, match="full"),
            new_directory(tmp_path / "model", overwrite=False) as folder,
        ):
            (folder / "x").write_text("1")
            raise OSError("the disk is full")
        assert self.names(tmp_path) == []

    def test_may_be_an_empty_one(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        with new_directory(tmp_path / "model", overwrite=False) as folder:
            (folder / "x").write_text("1")
        assert self.names(tmp_path) == ["model", "model/x"]

    def test_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "model").symlink_to("disk")
        with new_directory(tmp_path / "model", overwrite=False) as folder:
            (folder / "x").write_text("1")
        assert (tmp_path / "model").is_symlink()
        assert (tmp_path / "disk" / "x").read_text() == "1"

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_takes_no_name_of_something_else(self, tmp_path: Path, overwrite: bool) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "thesis.txt").write_text("mine")
        (tmp_path / "file").write_text("mine")
        for name in ("model", "file"):
            with (
                pytest.raises(FileExistsError, match=str(tmp_path / name)),
                new_directory(tmp_path / name, overwrite=overwrite),
            ):
                pytest.fail("it must be refused before anything is written")
        assert self.names(tmp_path) == ["file", "model", "model/thesis.txt"]

    def test_replaces_a_model_when_asked_and_whole(self, tmp_path: Path) -> None:
        for number in range(2):
            with new_directory(tmp_path / "model", overwrite=bool(number)) as folder:
                (folder / "config.json").write_text(str(number))
                (folder / f"only{number}").write_text("")
        assert self.names(tmp_path) == ["model", "model/config.json", "model/only1"]
        with (
            pytest.raises(KeyboardInterrupt),
            new_directory(tmp_path / "model", overwrite=True) as folder,
        ):
            os.remove(tmp_path / "model" / "only1")
            raise KeyboardInterrupt
        assert self.names(tmp_path) == ["model", "model/config.json"]
