"""Seconds and peak memory of every command on a GPT-2 of 124M parameters; prints a line each.

    python benchmarks/commands.py --steps 2

The model is random, the data are generated, prompts and completions have some 16 tokens each, two
rows are on the device at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAKE = """
import json, sys, jax
from pathlib import Path
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from rlhfjax import pretrained
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator(["a"], trainers.BpeTrainer(
    vocab_size=258, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False))
files = {"tokenizer.json": tokenizer.to_str().encode(),
         "tokenizer_config.json": json.dumps({"eos_token": "<|end|>"}).encode()}
config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50257,
          "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "eos_token_id": 0}
made = pretrained.init(jax.random.key(0), config, files=files)
pretrained.save(sys.argv[1], made, made.params)
"""
RECORDS = {
    "texts": {"text": "a text of some tokens to learn"},
    "prompts": {"prompt": "say something"},
    "pairs": {"prompt": "say it", "chosen": " a good word", "rejected": " a bad word"},
    "unpaired": {"prompt": "say it", "completion": " a good word", "label": True},
}
DATA = {
    "sft": "texts", "reward": "pairs", "dpo": "pairs", "orpo": "pairs", "simpo": "pairs",
    "kto": "unpaired", "ppo": "prompts", "grpo": "prompts", "rloo": "prompts",
}  # fmt: skip


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds until the first line, until the end, and the peak of memory."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhfjax.cli.main", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    process.stderr.readline()
    first_line = time.perf_counter() - begin
    rest = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(rest.decode())
    return {
        "command": command[0],
        "first_line_s": round(first_line, 2),
        "total_s": round(time.perf_counter() - begin, 1),
        "peak_gb": round(usage.ru_maxrss / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="training steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        subprocess.run([sys.executable, "-c", MAKE, str(model)], check=True)
        for kind, record in RECORDS.items():
            lines = [record | {"n": i} for i in range(8)]
            if kind == "unpaired":
                lines = [line | {"label": i % 2 == 0} for i, line in enumerate(lines)]
            (folder / f"{kind}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / "reward.py").write_text(
            "def reward(completions): return [float(len(c)) for c in completions]\n"
        )
        for name, data in DATA.items():
            command = [
                name, "--model_name_or_path", model, "--dataset_name", folder / f"{data}.jsonl",
                "--output_dir", folder / name, "--max_steps", args.steps, "--report_to",
                "--per_device_train_batch_size", "2",
            ]  # fmt: skip
            if data == "prompts":
                command += ["--reward_funcs", folder / "reward.py", "--max_completion_length", "16"]
            if name in ("grpo", "rloo"):
                command += ["--num_generations", "2"]
            print(json.dumps(measured([str(part) for part in command])), flush=True)
        asked = ["--max_new_tokens", "16", "--model_name_or_path", str(model)]
        print(json.dumps(measured(["generate", *asked, "--prompts", "say it"])), flush=True)
        judged = [
            "evaluate", *asked, "--baseline_name_or_path", model, "--dataset_name",
            folder / "prompts.jsonl", "--judge", folder / "reward.py", "--best_of", "2",
            "--output_dir", folder / "evaluation",
        ]  # fmt: skip
        print(json.dumps(measured([str(part) for part in judged])), flush=True)
        exported = ["export", "--model_name_or_path", model, "--output_dir", folder / "exported"]
        print(json.dumps(measured([str(part) for part in exported])), flush=True)
        print(json.dumps(measured(["env"])), flush=True)


if __name__ == "__main__":
    main()
