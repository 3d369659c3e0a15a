import io
import re

import pytest

from rlhfjax.cli import progress as module
from rlhfjax.cli.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_a_log_file_gets_the_first_step_then_a_line_every_15_seconds_and_the_last(
    clock: Clock,
) -> None:
    out = io.StringIO()
    with progress(40, "ppo", stream=out) as advance:
        for step in range(40):
            advance(kl=step / 7, score=0.25)
            clock.now += 1.0
    lines = out.getvalue().splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "ppo: 1/40",
        "ppo: 16/40",
        "ppo: 31/40",
        "ppo: 40/40",
    ]
    assert lines[-1].endswith(", kl 5.57, score 0.25]")
    assert "\r" not in out.getvalue()


def test_a_terminal_gets_a_bar_in_place_with_time_left_and_numbers() -> None:
    out = Terminal()
    with progress(2, "sft", stream=out) as advance:
        advance(loss=1.23456)
        advance(loss=0.5)
    frames = out.getvalue().split("\r")
    assert len(frames) > 2
    assert frames[-1].startswith("sft: 100%|")
    assert re.search(r"2/2 \[00:00<00:00, +[\d.]+(step/s|s/step), loss 0\.5\]", frames[-1])
    assert out.getvalue().count("\n") == 1


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(1, "sft") as advance:
        advance()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sft: 1/1 [")


def test_a_terminal_is_left_clean_by_an_error() -> None:
    out = Terminal()
    with pytest.raises(RuntimeError), progress(2, "sft", stream=out) as advance:
        advance()
        raise RuntimeError
    assert out.getvalue().endswith("\n")
