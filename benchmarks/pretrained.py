"""Loading and decoding a GPT-2 of 124M parameters, beside transformers; prints one JSON line.

    make .venv/.parity
    python benchmarks/pretrained.py

Each measurement is a process of its own: seconds, and the peak of its memory beyond that of a
process that has only made its imports. Decoding is greedy, batch 8, 32 + 64 tokens, no end token,
float32; ours and theirs take turns, and the best of each counts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50_257,
    "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50_256,
    "eos_token_id": 50_256,
}  # fmt: skip

MAKE = """
import json, sys, jax
from rlhfjax import pretrained
made = pretrained.init(jax.random.key(0), json.loads(sys.argv[2]))
pretrained.save(sys.argv[1], made, made.params)
"""

PEAK = """
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmHWM"))
"""

OURS = """
import json, sys, time
import jax, numpy as np
from functools import partial
from rlhfjax import pretrained, rollout, sampling
jax.devices()
before, begin = peak(), time.perf_counter()
loaded = pretrained.load(sys.argv[1])
jax.block_until_ready(loaded.params)
found = {"load_s": time.perf_counter() - begin, "load_peak_mb": peak() - before}
generate = jax.jit(partial(
    rollout.generate, loaded.model, num_tokens=T, pad_token=0, sampler=sampling.greedy))
given = loaded.params, prompts.astype(np.int32), prompts >= 0, jax.random.key(0)
begin = time.perf_counter()
program = generate.lower(*given).compile()
found["compile_s"] = time.perf_counter() - begin
run = lambda: np.asarray(program(*given).responses)
"""

THEIRS = """
import json, sys, time
import numpy as np, torch
from transformers import GPT2LMHeadModel
before, begin = peak(), time.perf_counter()
model = GPT2LMHeadModel.from_pretrained(sys.argv[1], dtype=torch.float32)
found = {"load_s": time.perf_counter() - begin, "load_peak_mb": peak() - before}
tokens = torch.tensor(prompts)
settings = dict(max_new_tokens=T, min_new_tokens=T, do_sample=False, pad_token_id=0)
def run():
    with torch.inference_mode():
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)[:, P:]
"""

DECODE = """
seconds = []
for _ in range(4):
    begin = time.perf_counter()
    responses = run()
    seconds.append(time.perf_counter() - begin)
found["decode_s"] = min(seconds)
found["tokens_per_s"] = B * T / min(seconds)
found["first_tokens"] = [int(x) for x in responses[0][:16]]
print(json.dumps(found))
"""

SIZES = """
B, P, T = 8, 32, 64
import numpy as np
prompts = np.random.default_rng(0).integers(1, 50_000, (B, P))
"""


def run(program: str, *args: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program, *args], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="processes of each")
    args = parser.parse_args()
    programs = {"rlhfjax": OURS, "transformers": THEIRS}
    found: dict[str, list[dict[str, object]]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "gpt2"
        run(MAKE, str(folder), json.dumps(CONFIG))
        for _ in range(args.turns):
            for name, program in programs.items():
                told = run(SIZES + PEAK + program + DECODE, str(folder))
                found[name].append(json.loads(told.splitlines()[-1]))
    tokens = {tuple(turn.pop("first_tokens")) for turns in found.values() for turn in turns}  # type: ignore[arg-type]
    assert len(tokens) == 1, "they do not say the same"
    best = {
        name: {
            key: (max if key == "tokens_per_s" else min)(turn[key] for turn in turns)  # type: ignore[type-var]
            for key in turns[0]
        }
        for name, turns in found.items()
    }
    ratio = best["rlhfjax"]["tokens_per_s"] / best["transformers"]["tokens_per_s"]  # type: ignore[operator]
    print(json.dumps({**best, "tokens_per_s_ratio": ratio}))


if __name__ == "__main__":
    main()
