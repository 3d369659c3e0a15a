"""Files of a model directory: read as safetensors reads them, and refused by file and tensor."""

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax.pretrained import reading
from rlhfjax.pretrained.reading import DirectoryError
from rlhfjax.pretrained.tensors import Entry

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": RNG.normal(size=(3, 4)).astype(np.float32),
    "b.c": RNG.normal(size=5).astype(jnp.bfloat16),
    "d": np.array([[0.1, -0.0], [np.inf, 1e-7]], np.float16),
    "e": RNG.normal(size=(2, 1, 2)),
    "scalar": np.array(3.5, np.float32),
    "nothing": np.zeros((0, 4), np.float32),
    "counts": np.arange(3),
}


def safetensors(file: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """As the library writes it."""
    pytest.importorskip("safetensors.numpy").save_file(dict(arrays), file)
    return file


def raw(file: Path, listed: Any, num_bytes: int, *, length: int | None = None) -> Path:
    """A header of any content before zeros."""
    text = listed if isinstance(listed, bytes) else json.dumps(listed).encode()
    length = len(text) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + text + bytes(num_bytes))
    return file


def tensor(begin: int, end: int, shape: Sequence[Any] = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def refused(call: Any, *said: str) -> None:
    with pytest.raises(DirectoryError) as error:
        call()
    for part in said:
        assert part in str(error.value)


class TestNumbers:
    def test_are_those_that_the_library_wrote(self, tmp_path: Path) -> None:
        found = reading.header(safetensors(tmp_path / "x.safetensors", ARRAYS))
        assert found.keys() == ARRAYS.keys()
        for name in ARRAYS.keys() - {"counts"}:
            read = reading.read(found[name], ARRAYS[name].dtype)
            assert (read.dtype, read.shape) == (ARRAYS[name].dtype, ARRAYS[name].shape)
            assert read.tobytes() == ARRAYS[name].tobytes()

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32, np.float64])
    def test_are_cast_piece_by_piece(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
    ) -> None:
        monkeypatch.setattr(reading, "PIECE", 5)
        found = reading.header(safetensors(tmp_path / "x.safetensors", ARRAYS))
        for name in ARRAYS.keys() - {"counts"}:
            read = reading.read(found[name], dtype)
            assert read.dtype == dtype
            assert read.tobytes() == ARRAYS[name].astype(dtype).tobytes()

    def test_of_a_file_that_shrank_are_refused(self, tmp_path: Path) -> None:
        file = safetensors(tmp_path / "x.safetensors", {"a": ARRAYS["a"]})
        found = reading.header(file)["a"]
        os.truncate(file, file.stat().st_size - 4)
        refused(lambda: reading.read(found, np.float32), str(file), "a was cut off")


FAULTS = {
    "overlapping": ({"x": tensor(0, 8), "y": tensor(4, 12)}, 12, ["y", "overlaps x"]),
    "the same place": ({"x": tensor(0, 8), "y": tensor(0, 8)}, 8, ["y", "overlaps x"]),
    "a gap": ({"x": tensor(0, 8), "y": tensor(12, 20)}, 20, ["y", "gap after x"]),
    "a gap before": ({"x": tensor(4, 12)}, 12, ["x", "gap"]),
    "truncated": ({"x": tensor(0, 8), "y": tensor(8, 16)}, 15, ["y", "cut off"]),
    "trailing": ({"x": tensor(0, 8)}, 9, ["1 bytes after x"]),
    "larger than its shape": ({"x": tensor(0, 12)}, 12, ["x", "12 bytes", "8"]),
    "smaller than its shape": ({"x": tensor(0, 4)}, 4, ["x", "4 bytes", "8"]),
    "backwards": ({"x": tensor(8, 0)}, 8, ["x"]),
    "negative": ({"x": tensor(-8, 0)}, 8, ["x"]),
    "negative shape": ({"x": tensor(0, 8, [-1, -2])}, 8, ["x"]),
    "fractional": ({"x": tensor(0, 8, [2.0])}, 8, ["x"]),
    "immense": ({"x": tensor(0, 8, [2**62, 2**62])}, 8, ["x"]),
    "unknown dtype": ({"x": tensor(0, 8, dtype="F31")}, 8, ["x", "F31"]),
    "no dtype": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, 8, ["x", "None"]),
    "no place": ({"x": {"dtype": "F32", "shape": [2]}}, 8, ["x"]),
    "no tensor": ({"x": 1}, 8, ["x"]),
    "twice": (
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        4,
        ["x", "twice"],
    ),
    "no object": ([], 0, ["no header"]),
    "no JSON": (b'{"x":', 0, ["JSON"]),
    "no UTF-8": (b'{"\xff": 1}', 0, ["JSON"]),
    "too deep": (b'{"x":' + b"[" * 100_000, 0, ["JSON"]),
}


class TestHeaders:
    @pytest.mark.parametrize("fault", FAULTS)
    def test_with_a_fault_are_refused_by_file_and_tensor(self, tmp_path: Path, fault: str) -> None:
        listed, num_bytes, said = FAULTS[fault]
        file = raw(tmp_path / "x.safetensors", listed, num_bytes)
        refused(lambda: reading.header(file), str(file), *said)

    # The library takes the last of two tensors of one name.
    @pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "twice"])
    def test_the_library_refuses_them_too(self, tmp_path: Path, fault: str) -> None:
        library = pytest.importorskip("safetensors")
        file = raw(tmp_path / "x.safetensors", *FAULTS[fault][:2])
        with pytest.raises(library.SafetensorError):
            library.safe_open(file, framework="numpy").__enter__()

    @pytest.mark.parametrize("length", [100, 2**63, 2**64 - 1])
    def test_longer_than_their_file_are_refused(self, tmp_path: Path, length: int) -> None:
        file = raw(tmp_path / "x.safetensors", {}, 0, length=length)
        refused(lambda: reading.header(file), str(file), "cut off")

    @pytest.mark.parametrize("content", [b"", b"1234567", bytes(8), bytes(20)])
    def test_that_are_none_are_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.safetensors").write_bytes(content)
        refused(lambda: reading.header(tmp_path / "x.safetensors"), "x.safetensors")

    def test_with_any_byte_changed_are_refused_or_still_cover_the_file(
        self, tmp_path: Path
    ) -> None:
        file = raw(tmp_path / "x.safetensors", {"x": tensor(0, 8), "y": tensor(8, 16)}, 16)
        good, draw = file.read_bytes(), random.Random(0)
        for _ in range(500):
            content = bytearray(good)
            content[draw.randrange(len(good) - 16)] = draw.randrange(256)
            file.write_bytes(content)
            try:
                found = reading.header(file)
            except DirectoryError:
                continue
            assert sum(map(reading.num_bytes, found.values())) == 16


WHOLE = {"a": "one.safetensors", "b.c": "two.safetensors"}


class TestShards:
    def directory(self, path: Path, weight_map: Mapping[str, Any]) -> Path:
        safetensors(path / "one.safetensors", {"a": ARRAYS["a"]})
        safetensors(path / "two.safetensors", {"b.c": ARRAYS["b.c"]})
        (path / reading.INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return path

    def test_are_one_model(self, tmp_path: Path) -> None:
        found = reading.tensors(self.directory(tmp_path, WHOLE))
        assert {name: t.file.name for name, t in found.items()} == WHOLE

    def test_may_be_links_into_a_cache(self, tmp_path: Path) -> None:
        """As the Hub's client lays them out: snapshots/…/file → ../../blobs/hash."""
        snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        for file in self.directory(snapshot, WHOLE).iterdir():
            file.rename(blobs / f"hash-{file.name}")
            file.symlink_to(f"../../blobs/hash-{file.name}")
        found = reading.tensors(snapshot)
        assert reading.read(found["a"], np.float32).tobytes() == ARRAYS["a"].tobytes()

    @pytest.mark.parametrize(
        "outside",
        ["/etc/passwd", "/tmp/x.safetensors", "../x.safetensors", "sub/x.safetensors",
         "..\\x.safetensors", "..", "", "x.bin", None, 3, ["one.safetensors"],
         "x.safetensors\n", "x\0.safetensors"],
    )  # fmt: skip
    def test_outside_the_directory_are_refused(self, tmp_path: Path, outside: Any) -> None:
        (tmp_path / "model").mkdir()
        safetensors(tmp_path / "x.safetensors", {"b.c": ARRAYS["b.c"]})
        directory = self.directory(tmp_path / "model", {**WHOLE, "b.c": outside})
        refused(lambda: reading.tensors(directory), reading.INDEX, "b.c", repr(outside))

    @pytest.mark.parametrize(
        ("weight_map", "said"),
        [
            ({}, ["weight_map"]),
            ([], ["weight_map"]),
            ({**WHOLE, "b.c": "three.safetensors"}, ["three.safetensors", "no such file"]),
            ({"a": "two.safetensors"}, ["two.safetensors", "a is missing"]),
            ({**WHOLE, "a": "two.safetensors"}, ["two.safetensors", "a is missing"]),
            ({**WHOLE, "x": "one.safetensors"}, ["one.safetensors", "x is missing"]),
        ],
    )
    def test_that_are_not_as_listed_are_refused(
        self, tmp_path: Path, weight_map: Any, said: list[str]
    ) -> None:
        directory = self.directory(tmp_path, weight_map)
        if isinstance(weight_map, dict) and weight_map.get("a") == "two.safetensors":
            (directory / "one.safetensors").unlink()
        refused(lambda: reading.tensors(directory), *said)

    def test_that_hold_a_tensor_twice_are_refused(self, tmp_path: Path) -> None:
        directory = self.directory(tmp_path, WHOLE)
        safetensors(directory / "two.safetensors", {"a": ARRAYS["a"], "b.c": ARRAYS["b.c"]})
        refused(lambda: reading.tensors(directory), "two.safetensors", "a", "one.safetensors")


class TestDirectories:
    def test_of_pickles_are_refused_with_advice(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
        refused(lambda: reading.tensors(tmp_path), "pytorch_model.bin", "pickle", "save_pretrained")

    def test_without_tensors_are_refused(self, tmp_path: Path) -> None:
        refused(lambda: reading.tensors(tmp_path), str(tmp_path), "model.safetensors")
        refused(lambda: reading.tensors(tmp_path / "no"), str(tmp_path / "no"), "no such directory")

    def test_with_code_of_their_own_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Model"}}')
        refused(lambda: reading.config(tmp_path), "config.json", "auto_map")

    @pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1, "a": 2}', "nul"])
    def test_whose_configuration_is_none_are_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "config.json").write_text(content)
        refused(lambda: reading.config(tmp_path), str(tmp_path / "config.json"))

    def test_without_a_configuration_are_refused(self, tmp_path: Path) -> None:
        refused(lambda: reading.config(tmp_path), str(tmp_path / "config.json"), "no such file")

    def test_that_are_names_of_the_hub_are_refused_with_how_to_fetch_them(self) -> None:
        fetch = "hf download Qwen/Qwen3-0.6B --repo-type model --local-dir Qwen3-0.6B"
        refused(lambda: reading.config(Path("Qwen/Qwen3-0.6B")), "no such directory", fetch)


def entry(*names: str, shape: tuple[int, ...] = (3, 4)) -> Entry:
    return Entry(("x",), shape, names, (shape,) * len(names), lambda x: x[0], lambda x: [x])


class TestClaims:
    @pytest.fixture
    def stored(self, tmp_path: Path) -> dict[str, reading.Stored]:
        names = {"m.a": np.zeros((3, 4)), "m.q": np.zeros((3, 4), np.int8)}
        return reading.header(safetensors(tmp_path / "x.safetensors", names))

    def claimed(self, stored: Any, *entries: Entry, ignored: Sequence[str] = ()) -> list[str]:
        return list(reading.claim(entries, stored, ignored, Path("here")))

    def test_are_the_tensors_of_the_parameters(self, stored: Any) -> None:
        assert self.claimed(stored, entry("m.a"), ignored=[r"m\.q"]) == ["m.a"]

    def test_may_be_stored_without_the_name_of_the_model_before_them(self, stored: Any) -> None:
        assert self.claimed(stored, entry("model.m.a"), ignored=[r"m\.q"]) == ["model.m.a"]

    @pytest.mark.parametrize(
        ("entries", "ignored", "said"),
        [
            ([entry("m.a", "m.b")], ["m.q"], ["here: m.b is missing", "x.safetensors"]),
            ([entry("m.a", shape=(4, 3))], ["m.q"], ["m.a", "[3, 4]", "[4, 3]"]),
            ([entry("m.a", shape=(12,))], ["m.q"], ["x.safetensors", "[12]"]),
            ([entry("m.a", "m.q")], [], ["x.safetensors", "m.q is I8", "quantised"]),
            ([entry("m.a")], [], ["x.safetensors", "m.q belongs to no parameter"]),
            ([entry("m.a")], [r"\.q"], ["m.q belongs to no parameter"]),
        ],
        ids=["missing", "transposed", "flat", "quantised", "too many", "part of a name"],
    )
    def test_that_do_not_fit_are_refused(
        self, stored: Any, entries: list[Entry], ignored: list[str], said: list[str]
    ) -> None:
        refused(lambda: self.claimed(stored, *entries, ignored=ignored), *said)
