"""Where the lines of a log go as well."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rlhfjax.cli.reports import reports


def events(folder: Path) -> Iterator[Any]:
    """What TensorBoard reads: length, its checksum, event, its checksum, and so on."""
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]


def write(out: Path, *steps: int) -> None:
    with reports(["tensorboard"], out) as (report,):
        for step in steps:
            report({"stage": "dpo", "step": step, "loss": step / 4, "note": "text", "kl": None})


def test_tensorboard_gets_the_numbers_of_a_line_under_the_stage(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    found = [(e.step, v.tag, v.simple_value) for e in events(tmp_path / "tensorboard")
             for v in e.summary.value]  # fmt: skip
    assert found == [(1, "dpo/loss", 0.25), (2, "dpo/loss", 0.5)]


def test_nothing_is_reported_where_none_is_asked_for(tmp_path: Path) -> None:
    with reports(["none"], tmp_path) as (report,):
        report({"stage": "dpo", "step": 1, "loss": 0.5})
    assert list(tmp_path.iterdir()) == []


def test_what_a_run_wrote_beyond_its_last_checkpoint_is_hidden_when_it_goes_on(
    tmp_path: Path,
) -> None:
    write(tmp_path, 1, 2, 3)
    (first,) = (tmp_path / "tensorboard").iterdir()
    first.rename(first.with_name("events.out.tfevents.0"))
    write(tmp_path, 3, 4)
    starts = [e.step for e in events(tmp_path / "tensorboard")
              if e.session_log.status == SessionLog.START]  # fmt: skip
    assert starts == [1, 3]


def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with (
        pytest.raises(ModuleNotFoundError, match=r"pip install 'rlhfjax\[wandb\]'"),
        reports(["wandb"], tmp_path),
    ):
        pass
