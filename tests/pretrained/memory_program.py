"""Loads a model of some 200 MB, or saves it again; prints what `test_memory.py` reads, in MB.

    python tests/pretrained/memory_program.py FOLDER F32|BF16 [--save] [--scalar]

The file in FOLDER is made here, of zeros that take no place on the disk.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from rlhfjax import pretrained

CONFIG = dict(
    model_type="llama", vocab_size=32_000, max_position_embeddings=128, hidden_size=512,
    intermediate_size=2048, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2,
    tie_word_embeddings=False,
)  # fmt: skip
MB = 1e6


def make(folder: Path, dtype: str) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    listed, end = {}, 0
    for entry in pretrained.architecture(CONFIG).entries:
        for name, shape in zip(entry.names, entry.shapes, strict=True):
            begin, end = end, end + math.prod(shape) * {"F32": 4, "BF16": 2}[dtype]
            listed[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(listed).encode()
    file = folder / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, file.stat().st_size + end)


def memory(field: str) -> float:
    """VmRSS, what the process has now, or VmHWM, the most it had since `forget`."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if field in x]
    return int(line.split()[1]) * 1024 / MB


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("dtype", choices=["F32", "BF16"])
parser.add_argument("--save", action="store_true")
parser.add_argument("--scalar", action="store_true")
args = parser.parse_args()
make(args.folder, args.dtype)
jax.device_put(jnp.zeros(3) + 1).block_until_ready()
pretrained.architecture(CONFIG)

placed, beyond = 0.0, 0.0
put = jax.device_put


def watched_put(host: Any) -> jax.Array:
    """Notes what there is beyond the parameters placed so far, as if they were elsewhere."""
    global placed, beyond
    beyond = max(beyond, memory("VmHWM") - before - placed)
    array = put(host).block_until_ready()
    placed += array.nbytes / MB
    beyond = max(beyond, memory("VmHWM") - before - placed)
    forget()
    return array


jax.device_put = watched_put
before = memory("VmRSS")
forget()
if args.scalar:
    loaded = pretrained.load_scalar(args.folder, key=jax.random.key(0))
else:
    loaded = pretrained.load(args.folder)
sizes = [leaf.nbytes / MB for leaf in jax.tree.leaves(loaded.params)]
beyond = max(beyond, memory("VmHWM") - before - sum(sizes))
if args.save:
    before = memory("VmRSS")
    forget()
    pretrained.save(args.folder / "again", loaded, loaded.params)
    beyond = memory("VmHWM") - before
print(json.dumps({"model": sum(sizes), "largest": max(sizes), "beyond": beyond}))
