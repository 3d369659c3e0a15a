"""Bytes on a device against the number of parameters that the published model has."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows(*arguments: str) -> dict[str, float]:
    ran = subprocess.run(
        [sys.executable, "benchmarks/memory.py", "--model", "1b", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    cells = (line.split("|")[1:-1] for line in ran.stdout.splitlines()[2:])
    return {name.strip(" *"): float(number.strip(" *")) for name, _, number in cells}


def test_of_llama_3_2_1b_divided_over_eight_devices() -> None:
    parts = rows("--fsdp", "4", "--tensor", "2", "--batch", "16", "--micro-rows", "2")
    billions = 1.235814400  # its parameters
    expected = {
        "parameters and moments": 12 * 2 * billions / 8,
        "reference and reward": 2 * 2 * billions / 8,
        "decoding: the policy, gathered": 2 * billions / 2,
        "decoding: its embedding, in float32": 4 * 128_256 * 2048 / 2 / 1e9,
        "decoding: keys and values": 2 * 2 * 4 * 1024 * 16 * 512 / 2 / 1e9,
        "update: gradients, and those of a part": 8 * 2 * billions / 8,
        "update: whole embeddings, their gradients": 16 * 128_256 * 2048 / 2 / 1e9,
        "update: logits and their gradient": 8 * 2 * 512 * 128_256 / 2 / 1e9,
        "update: inputs of blocks": 4 * 2 * 1024 * 16 * 2048 / 1e9,
        "update: inside of a block": 2 * (6 * 32 * 1024**2 + 6 * 1024 * 8192) / 2 / 1e9,
    }
    for name, size in expected.items():
        assert abs(parts[name] - size) < 0.01, name
    always = parts["parameters and moments"] + parts["reference and reward"]
    decoding = sum(size for name, size in parts.items() if name.startswith("decoding:"))
    assert abs(parts["decoding"] - (always + decoding)) < 0.06
