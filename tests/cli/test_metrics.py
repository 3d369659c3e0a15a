import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_disk import largest_file

from rlhfjax.cli.metrics import MetricsLog


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def lines(path: Path) -> list[dict[str, object]]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_for_each_write_and_it_is_there_at_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("sft", 0, {"loss": 2.5})
        assert lines(path) == [{"stage": "sft", "step": 0, "loss": 2.5}]
        log.write("ppo", 7, {"objective/kl": 1, "objective/scores": -0.5})
        assert lines(path)[1] == {
            "stage": "ppo",
            "step": 7,
            "objective/kl": 1.0,
            "objective/scores": -0.5,
        }


def test_numbers_of_every_library(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        row = log.write(
            "a",
            jnp.int32(3),
            {
                "jax": jnp.float32(0.25),
                "bf16": jnp.bfloat16(0.5),
                "numpy": np.float64(0.1),
                "int": np.int32(4),
                "bool": np.bool_(True),
                "one element": jnp.ones((1, 1)),
            },
        )
    assert row == lines(path)[0]
    assert row == {
        "stage": "a",
        "step": 3,
        "jax": 0.25,
        "bf16": 0.5,
        "numpy": 0.1,
        "int": 4.0,
        "bool": 1.0,
        "one element": 1.0,
    }
    assert all(type(row[name]) is float for name in row if name not in ("stage", "step"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        assert log.write("a", 0, {"x": jnp.float32(value)})["x"] is None
    assert lines(path)[0]["x"] is None


def test_a_continued_run_keeps_its_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (0, 1):
        with MetricsLog(path) as log:
            log.write("a", step, {})
    assert [row["step"] for row in lines(path)] == [0, 1]


def test_lines_before_an_error_stay_and_the_error_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(RuntimeError, match="stop"), MetricsLog(path) as log:
        log.write("a", 0, {"x": 1.0})
        raise RuntimeError("stop")
    assert len(lines(path)) == 1


def test_lines_wait_until_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write("a", 0, {})
        with largest_file(path.stat().st_size + 5):  # a part of the next line
            for number in (1, 2):
                with pytest.warns(UserWarning, match=f"{number} lines wait; .*training goes on"):
                    log.write("a", number, {})
            with pytest.raises(OSError, match="2 lines wait; make room"):
                log.sync()
        log.write("a", 3, {})
        log.sync()
        assert [row["step"] for row in lines(path)] == [0, 1, 2, 3]


def test_lines_that_never_found_room_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with (
        largest_file(0),
        pytest.raises(OSError, match="1 lines wait"),
        pytest.warns(UserWarning, match="training goes on"),
        MetricsLog(path) as log,
    ):
        log.write("a", 0, {})


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"x": np.ones(2)}, r"'x' has shape \(2,\)"),
        ({"step": 1.0}, "'step': the name is taken"),
        ({"stage": 1.0}, "'stage': the name is taken"),
    ],
)
def test_a_bad_metric_is_named_and_writes_no_line(
    tmp_path: Path, metrics: dict, message: str
) -> None:
    with MetricsLog(tmp_path / "m") as log, pytest.raises(ValueError, match=message):
        log.write("a", 0, {"good": 1.0, **metrics})
    assert (tmp_path / "m").read_text() == ""


class TestRewind:
    ROWS = (("sft", 1), ("sft", 2), ("ppo", 0), ("ppo", 1), ("ppo", 2))

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        with MetricsLog(tmp_path / "metrics.jsonl") as log:
            for stage, step in self.ROWS:
                log.write(stage, step, {"loss": step / 3})
        return tmp_path / "metrics.jsonl"

    @pytest.mark.parametrize(
        ("stage", "count", "left"),
        [
            ("sft", 2, [0, 1, 2, 3, 4]),
            ("ppo", 3, [0, 1, 2, 3, 4]),
            ("ppo", 1, [0, 1, 2]),
            ("ppo", 0, [0, 1]),
            ("sft", 1, [0, 2, 3, 4]),
            ("dpo", 0, [0, 1, 2, 3, 4]),
        ],
    )
    def test_what_a_stage_wrote_later_is_taken_back(
        self, path: Path, stage: str, count: int, left: list[int]
    ) -> None:
        before = path.read_bytes().splitlines(keepends=True)
        kept = [before[number] for number in left]
        with MetricsLog(path) as log:
            rows = log.rewind(stage, count)
            assert path.read_bytes() == b"".join(kept)
            log.write(stage, 9, {"loss": 1})
        assert rows == [row for row in map(json.loads, kept) if row["stage"] == stage]
        assert lines(path)[len(kept) :] == [{"stage": stage, "step": 9, "loss": 1.0}]

    def test_stages_stand_in_the_order_in_which_they_began(self, path: Path) -> None:
        before = path.read_bytes()
        with MetricsLog(path) as log:
            log.rewind("sft", 1)
            log.write("sft", 2, {"loss": 2 / 3})
            log.rewind("sft", 2)
        assert path.read_bytes() == before

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"", "0 lines of stage 'ppo', of which 2 steps"),
            (b'{"stage": "ppo", "step": 0}\n', "1 lines of stage 'ppo'"),
            (b'{"stage": "ppo", "st\x00p": 0}\n{"stage": "ppo", "step": 1}\n', "jsonl:1: not a"),
        ],
    )
    def test_a_log_that_lost_what_was_saved_is_refused(
        self, path: Path, content: bytes, said: str
    ) -> None:
        path.write_bytes(content)
        with MetricsLog(path) as log, pytest.raises(ValueError, match=said):
            log.rewind("ppo", 2)
        assert path.read_bytes() == content

    @pytest.mark.parametrize("torn", ['{"stage": "ppo", "st', '{"stage": "ppo", "step": 3}'])
    def test_so_is_a_line_that_was_broken_off(self, path: Path, torn: str) -> None:
        before = path.read_bytes()
        with path.open("a") as file:
            file.write(torn)
        with MetricsLog(path) as log:
            assert len(log.rewind("ppo", 3)) == 3
        assert path.read_bytes() == before

    def test_what_is_no_file_has_no_lines(self) -> None:
        with MetricsLog(Path("/dev/null")) as log:
            assert log.rewind("ppo", 3) == []
