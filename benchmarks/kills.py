"""Kills a run at random moments, resumes it, and compares its end with that of an unbroken run.

    python benchmarks/kills.py --kills 20 --algorithm ppo

SIGKILL, as from a machine that goes away. The runs are `experiments/sentiment.py` at a tiny size.
Exit status 1 if a resumed run has another digest of its final state or other metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlhfjax.data.generated import generated_corpus, write_corpus

SCRIPT = Path(__file__).parents[1] / "experiments" / "sentiment.py"
NUM_TEXTS = 400
SIZES = {
    "model": {"vocab": 300, "layers": 1, "width": 16, "heads": 2, "context": 64},
    "sft": {"epochs": 1, "buckets": 2, "save-every": 3},
    "reward": {"epochs": 1, "buckets": 1, "batch": 8, "save-every": 2},
    "ppo": {
        "iterations": 9, "prompts": 16, "minibatches": 2, "response-tokens": 8, "save-every": 2,
    },
    "grpo": {"group": 4},
    "dpo": {"epochs": 1, "buckets": 1, "batch": 8, "save-every": 2},
}  # fmt: skip


class Runs:
    """Runs of one configuration that share what was compiled."""

    def __init__(self, folder: Path, algorithm: str, more: list[str]) -> None:
        self.folder = folder
        write_corpus(folder / "data", generated_corpus(NUM_TEXTS, seed=0))
        sizes = ((f"--{a}.{b}", str(x)) for a, of in SIZES.items() for b, x in of.items())
        given = {"--data": str(folder / "data"), "--algorithm": algorithm} | dict(sizes)
        self.flags = [part for pair in given.items() for part in pair] + more
        shared = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.env = shared | os.environ

    def start(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(SCRIPT), "--resume", "--out", str(self.folder / name)]
        with (self.folder / "output").open("wb") as output:
            return subprocess.Popen(
                [*command, *self.flags], env=self.env, stdout=output, stderr=output
            )

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait():
            sys.exit((self.folder / "output").read_text(errors="replace"))

    def end(self, name: str) -> tuple[str, bytes]:
        """The digest of the final state, and the log."""
        out = self.folder / name
        summary = json.loads((out / "summary.json").read_text())
        return summary["state/digest"], (out / "metrics.jsonl").read_bytes()

    def num_rows(self, name: str) -> int:
        """Lines of the log."""
        log = self.folder / name / "metrics.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def saved(self, name: str) -> dict[str, int]:
        """The last step saved of each stage."""
        files = (self.folder / name / "checkpoints").glob("*/*/files.json")
        last: dict[str, int] = {}
        for file in files:
            stage, step = file.parent.parent.name, int(file.parent.name)
            last[stage] = max(step, last.get(stage, 0))
        return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many")
    parser.add_argument("--algorithm", default="ppo", help="ppo, grpo or dpo; SFT comes before")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments")
    parser.add_argument("more", nargs="*", help="flags of the script, after --")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills = different = 0
    with tempfile.TemporaryDirectory() as name:
        runs = Runs(Path(name), args.algorithm, args.more)
        runs.finish(runs.start("unbroken"))
        wanted, total = runs.end("unbroken"), runs.num_rows("unbroken")
        while True:
            process, rows = runs.start("killed"), runs.num_rows("killed")
            if kills < args.kills and rows < total:
                # At one of the next lines of the log, and some time behind it.
                row = min(rows + rng.randint(0, total // 4), total)
                while process.poll() is None and runs.num_rows("killed") < row:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0.0, 0.5))
                if process.poll() is None:
                    process.kill()
                    process.wait()
                    kills += 1
                    rows, saved = runs.num_rows("killed"), runs.saved("killed")
                    print(f"kill {kills} at line {rows} of {total}, saved {saved}", flush=True)
                    continue
            runs.finish(process)
            same = runs.end("killed") == wanted
            different += not same
            print(f"finished after {kills} kills: {'the same' if same else 'ANOTHER'} end")
            if kills >= args.kills:
                break
            shutil.rmtree(runs.folder / "killed")
    print(json.dumps({"kills": kills, "different": different, "digest": wanted[0]}))
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
