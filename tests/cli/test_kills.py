"""A run that is killed at any kind of moment, and killed again, comes to the unbroken one's end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_program.py")


@pytest.mark.slow
def test_whatever_it_does_on_the_disk_when_it_is_killed(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, PROGRAM, tmp_path],
        env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    kinds = ran.stdout.splitlines()
    step = "/checkpoints/STAGE/N"
    assert {
        "os.rename /.config.yaml",
        "open /metrics.jsonl",
        f"os.rename {step}/arrays.orbax-checkpoint-tmp",
        f"os.rename {step}/.files.json",
        f"os.remove {step}/files.json",
        f"os.rmdir {step}",
    } <= set(kinds)
