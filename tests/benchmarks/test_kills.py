"""A run that is killed at random moments and resumed comes to the end of the unbroken one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


# What comes before the algorithm, made short.
SHORT = ["--sft.buckets", "1", "--reward.batch", "128", "--sft.batch"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "kills", "seed", "sizes"),
    [
        # While fine-tuning, and again in DPO; then in GRPO.
        ("dpo", 2, 18, [*SHORT, "128", "--dpo.epochs", "2"]),
        ("grpo", 1, 10, [*SHORT, "512", "--ppo.iterations", "14"]),
    ],
)
def test_killed_and_resumed_it_ends_the_same(
    algorithm: str, kills: int, seed: int, sizes: list[str]
) -> None:
    ran = subprocess.run(
        [
            sys.executable, "benchmarks/kills.py",
            "--algorithm", algorithm, "--kills", str(kills), "--seed", str(seed), "--", *sizes,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=590,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    last = json.loads(ran.stdout.splitlines()[-1])
    assert last["kills"] == kills and last["different"] == 0
