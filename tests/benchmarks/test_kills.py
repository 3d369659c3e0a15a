"""A run that is killed at random moments and resumed comes to the end of the unbroken one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "kills"), [("ppo", 1), ("grpo", 1), ("dpo", 1)])
def test_killed_and_resumed_it_ends_the_same(algorithm: str, kills: int) -> None:
    ran = subprocess.run(
        [
            sys.executable, "benchmarks/kills.py",
            "--algorithm", algorithm, "--kills", str(kills), "--", "--ppo.iterations", "5",
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = json.loads(ran.stdout.splitlines()[-1])
    assert last["kills"] == kills and last["different"] == 0
