"""One of the processes of `test_directory.py`: loads a model on a mesh and saves it.

python -m rlhfjax.cli.launch --processes 2 --devices 2 -- process_program.py FROM TO

What it saw is in TO.0 or TO.1, by the number of the process.
"""

import json
import sys
from pathlib import Path

import jax

from rlhfjax.cli import processes

processes.join()

from rlhfjax import pretrained, sharding  # noqa: E402

source, target = sys.argv[1:]
loaded = pretrained.load(source, mesh=sharding.mesh(fsdp=2, tensor=2))
head = loaded.params["head"]
seen = {"parts": len({str(shard.index) for shard in head.addressable_shards}), "refused": False}
pretrained.save(target, loaded, loaded.params)
try:
    pretrained.save(target, loaded, loaded.params)
except OSError:
    seen["refused"] = True
Path(f"{target}.{jax.process_index()}").write_text(json.dumps(seen))
