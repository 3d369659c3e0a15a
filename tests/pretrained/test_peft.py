"""A directory of adapters; what PEFT makes of it is tested in `tests/parity`."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_close, assert_same

from rlhfjax import pretrained
from rlhfjax.models import lora
from rlhfjax.pretrained import DirectoryError, UnsupportedError, peft, reading

GPT_2 = {"model_type": "gpt2", "vocab_size": 16, "n_embd": 8, "n_layer": 1, "n_head": 2,
         "n_positions": 16}  # fmt: skip
FILES = {"tokenizer_config.json": b"{}", "chat_template.jinja": b"{{ x }}"}


@pytest.fixture(scope="module")
def base() -> pretrained.Pretrained:
    return pretrained.init(jax.random.key(0), GPT_2, files=FILES)


@pytest.fixture
def folder(base: pretrained.Pretrained, tmp_path: Path) -> Path:
    pretrained.save(tmp_path / "base", base, base.params)
    return tmp_path


def adapters_of(base: Any, pattern: str, rank: int) -> lora.Adapters:
    """None of which is nothing."""
    rng = np.random.default_rng(rank)
    shapes = lora.init(jax.random.key(1), base.params, rank=rank, pattern=pattern)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), shapes)


def test_a_base_that_is_a_name_of_the_hub_is_said_how_to_fetch(tmp_path: Path) -> None:
    config = {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    with pytest.raises(DirectoryError, match=r"write there where it is; .*hf download Qwen/Qwen3"):
        peft.base_of(tmp_path)


def test_the_files_of_the_base_lie_beside_the_adapters(base: Any, tmp_path: Path) -> None:
    adapters = adapters_of(base, "qkv$", 2)
    own = {peft.CONFIG, peft.TENSORS}
    for name, files in (("with", base.files), ("without", None)):
        folder = tmp_path / name
        peft.save(folder, adapters, base.architecture, scale=1.0, files=files)
        others = {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in own}
        assert others == (files or {})
        assert peft.load(folder, base.architecture).adapters.keys() == adapters.keys()


class TestModelsWithAdapters:
    def test_are_merged_whoever_says_where_the_model_is(self, base: Any, folder: Path) -> None:
        adapters, own = adapters_of(base, "qkv$|down$", 2), str(folder / "base")
        peft.save(folder / "told", adapters, base.architecture, scale=0.5, base=own)
        peft.save(folder / "not", adapters, base.architecture, scale=0.5)
        expected = lora.merge(base.params, adapters, scale=0.5)
        assert_close(pretrained.load(folder / "told").params, expected, atol=1e-6)
        given = pretrained.load(folder / "base", adapter=folder / "not")
        assert_same(given.params, pretrained.load(folder / "told").params)
        narrow = pretrained.load(folder / "told", param_dtype=jnp.bfloat16).params
        assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype(jnp.bfloat16)}
        with pytest.raises(DirectoryError, match=r"adapter_config.json: its base None is no dir"):
            pretrained.load(folder / "not")

    def test_may_have_several_whose_sum_is_one(self, base: Any, folder: Path) -> None:
        first = peft.Loaded(adapters_of(base, "qkv$|down$", 2), 0.5)
        second = peft.Loaded(adapters_of(base, "qkv$|up$", 3), 2.0)
        expected = base.params
        for name, (adapters, scale, _) in (("first", first), ("second", second)):
            peft.save(folder / name, adapters, base.architecture, scale=scale,
                      base=str(folder / "base"))  # fmt: skip
            expected = lora.merge(expected, adapters, scale=scale)
        both = peft.added(first, second)
        ranks = {name: adapter["a"].shape[1] for name, adapter in both.adapters.items()}
        assert ranks == {"layers_0/qkv": 5, "layers_0/down": 2, "layers_0/up": 3}
        peft.save(folder / "sum", both.adapters, base.architecture, scale=both.scale,
                  base=str(folder / "base"))  # fmt: skip
        assert_close(pretrained.load(folder / "sum").params, expected, atol=1e-6)
        found = pretrained.load(folder / "first", adapter=folder / "second")
        assert_close(found.params, expected, atol=1e-6)

    def test_read_with_the_tokenizer_beside_the_adapter(self, base: Any, folder: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        content = {
            "tokenizer.json": words.to_str().encode(),
            "tokenizer_config.json": b'{"pad_token": "b"}',
        }
        peft.save(folder / "own", adapters_of(base, "qkv$", 1), base.architecture, scale=1.0,
                  base=str(folder / "base"), files=content)  # fmt: skip
        found = pretrained.load(folder / "own")
        assert found.tokenizer is not None and found.tokenizer.pad_token == 1
        assert found.chat_template is None
        assert found.files == content


class TestRewardModels:
    @pytest.fixture
    def saved(self, folder: Path) -> tuple[Path, Any, Any]:
        """An adapter's directory, and the backbone and head that it stands for."""
        source = pretrained.load_scalar(folder / "base", key=jax.random.key(2))
        backbone = source.params["backbone"]
        adapters = adapters_of(source._replace(params=backbone), "qkv$", 2)
        head = {"kernel": jnp.arange(8.0)}
        peft.save(folder / "scores", adapters, source.architecture, scale=0.5, head=head,
                  base=str(folder / "base"))  # fmt: skip
        return folder / "scores", lora.merge(backbone, adapters, scale=0.5), head

    def test_are_adapters_and_a_head(self, saved: Any, folder: Path) -> None:
        directory, backbone, head = saved
        loaded = pretrained.load_scalar(directory)
        assert_close(loaded.params["backbone"], backbone, atol=1e-6)
        assert_same(loaded.params["head"], head)
        pretrained.save_scalar(folder / "merged", loaded, loaded.params, pad_token=0)
        assert_same(pretrained.load_scalar(folder / "merged").params, loaded.params)
        on_scores = pretrained.load_scalar(folder / "merged", adapter=directory)
        assert_same(on_scores.params["head"], head)
        told = [pretrained.gives_scores(folder / name) for name in ("base", "scores", "merged")]
        assert told == [False, True, True]

    def test_are_no_language_models(self, saved: Any) -> None:
        with pytest.raises(DirectoryError, match=r"adapter_config.json: the adapter of a reward m"):
            pretrained.load(saved[0])

    def test_need_their_head(self, saved: Any, base: Any, folder: Path) -> None:
        adapters = adapters_of(base, "qkv$", 2)
        peft.save(folder / "policy", adapters, base.architecture, scale=1.0,
                  base=str(folder / "base"))  # fmt: skip
        with pytest.raises(ValueError, match="policy holds a language model, without a head"):
            pretrained.load_scalar(folder / "policy")
        with pytest.raises(ValueError, match="the architecture has no head"):
            peft.save(folder / "x", adapters, base.architecture, scale=1.0, head=saved[2])
        file = folder / "policy" / peft.CONFIG
        config = json.loads(file.read_text())
        for modules, error, said in (
            (
                ["classifier", "score"],
                DirectoryError,
                r"base_model\.model\.score\.weight is missing",
            ),
            (["lm_head"], UnsupportedError, r"adapter_config\.json: modules_to_save \['lm_head'\]"),
        ):
            file.write_text(json.dumps(config | {"modules_to_save": modules}))
            with pytest.raises(error, match=said):
                pretrained.load_scalar(folder / "policy")

    def test_are_stored_as_peft_stores_them(self, saved: Any, folder: Path) -> None:
        config = json.loads((saved[0] / peft.CONFIG).read_text())
        told = {name: config[name] for name in ("task_type", "modules_to_save")}
        assert told == {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
        assert config["base_model_name_or_path"] == str(folder / "base")
        stored = reading.header(saved[0] / peft.TENSORS)
        assert {name: tensor.shape for name, tensor in stored.items()} == {
            "base_model.model.score.weight": (1, 8),
            "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (2, 8),
            "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (24, 2),
        }
