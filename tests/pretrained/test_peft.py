"""A directory of adapters; what PEFT makes of it is tested in `tests/parity`."""

from pathlib import Path

import jax

from rlhfjax import pretrained
from rlhfjax.models import lora
from rlhfjax.pretrained import peft

GPT_2 = {"model_type": "gpt2", "vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2,
         "n_positions": 16}  # fmt: skip
FILES = {"tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ x }}"}


def test_the_files_of_the_base_lie_beside_the_adapters(tmp_path: Path) -> None:
    base = pretrained.init(jax.random.key(0), GPT_2, files=FILES)
    adapters = lora.init(jax.random.key(1), base.params, rank=2, pattern="qkv$")
    own = {peft.CONFIG, peft.TENSORS}
    for name, files in (("with", base.files), ("without", None)):
        folder = tmp_path / name
        peft.save(folder, adapters, base.architecture, scale=1.0, files=files)
        others = {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in own}
        assert others == (files or {})
        assert peft.load(folder, base.architecture).adapters.keys() == adapters.keys()
