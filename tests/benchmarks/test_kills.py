"""A run that is killed at random moments and resumed comes to the end of the unbroken one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# What comes before the algorithm, made short: the kill of the seed finds the algorithm at work.
SHORT = ["--sft.batch", "512", "--sft.buckets", "1", "--reward.batch", "128"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "seed", "sizes"),
    [
        ("ppo", 0, ["--ppo.iterations", "5"]),  # killed while fine-tuning
        ("grpo", 10, [*SHORT, "--ppo.iterations", "14"]),
        ("dpo", 10, [*SHORT, "--dpo.epochs", "2"]),
    ],
)
def test_killed_and_resumed_it_ends_the_same(algorithm: str, seed: int, sizes: list[str]) -> None:
    ran = subprocess.run(
        [
            sys.executable, "benchmarks/kills.py",
            "--algorithm", algorithm, "--kills", "1", "--seed", str(seed), "--", *sizes,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = json.loads(ran.stdout.splitlines()[-1])
    assert last["kills"] == 1 and last["different"] == 0
