"""Loading takes the memory of the parameters and hardly more, and so does saving."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("memory_program.py")
ROOT = PROGRAM.parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("options", ["F32", "BF16", "F32 --scalar", "F32 --save"])
def test_at_most_the_largest_tensor_and_a_tenth_of_the_model_beyond_the_parameters(
    tmp_path: Path, options: str
) -> None:
    ran = subprocess.run(
        [sys.executable, PROGRAM, tmp_path, *options.split()],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["model"] > 140
    assert found["beyond"] < found["largest"] + 0.1 * found["model"]
