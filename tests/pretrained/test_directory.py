"""Model directories: what is saved is loaded, and what else a directory may hold is refused."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import models, pretrained, sharding
from rlhfjax.pretrained import DirectoryError, UnsupportedError, reading, writing

ROOT = Path(__file__).parents[2]
V, D = 16, 8
LLAMA = {
    "model_type": "llama", "vocab_size": V, "hidden_size": D, "intermediate_size": 12,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 16, "tie_word_embeddings": False,
}  # fmt: skip
GPT_2 = {"model_type": "gpt2", "vocab_size": V, "n_embd": D, "n_layer": 1, "n_head": 2,
         "n_positions": 16}  # fmt: skip
FILES = {"generation_config.json": b'{"eos_token_id": 2}', "chat_template.jinja": b"{{ x }}"}


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for mine, others in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (mine.dtype, mine.shape) == (others.dtype, others.shape)
        assert np.asarray(mine).tobytes() == np.asarray(others).tobytes()


@pytest.fixture(scope="module")
def llama() -> pretrained.Pretrained:
    return pretrained.init(jax.random.key(0), LLAMA, files=FILES)


@pytest.fixture(scope="module")
def gpt_2() -> pretrained.Pretrained:
    return pretrained.init(jax.random.key(1), GPT_2)


@pytest.fixture
def saved(llama: pretrained.Pretrained, tmp_path: Path) -> Path:
    pretrained.save(tmp_path / "model", llama, llama.params)
    return tmp_path / "model"


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """As they are in the files, in float32."""
    stored = reading.tensors(directory)
    return {name: reading.read(tensor, np.float32) for name, tensor in stored.items()}


def rewrite(directory: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Its tensors after a change, written by the library."""
    library = pytest.importorskip("safetensors.numpy")
    found = tensors(directory)
    change(found)
    library.save_file({k: np.ascontiguousarray(x) for k, x in found.items()}, directory / "new")
    (directory / "new").replace(directory / "model.safetensors")


class TestLoad:
    def test_gives_what_was_saved(self, llama: Any, gpt_2: Any, tmp_path: Path) -> None:
        for number, made in enumerate([llama, gpt_2]):
            pretrained.save(tmp_path / str(number), made, made.params)
            pretrained.save(tmp_path / f"{number}s", made, made.params, max_shard_bytes=500)
            for name in (str(number), f"{number}s"):
                loaded = pretrained.load(tmp_path / name)
                assert_same(loaded.params, made.params)
                assert loaded.architecture.config == made.architecture.config
        assert not (tmp_path / "1s" / "model.safetensors").exists()

    def test_puts_matrices_where_the_mathematics_needs_them(self, saved: Path) -> None:
        theirs, ours = tensors(saved), pretrained.load(saved).params
        projections = [theirs[f"model.layers.0.self_attn.{x}_proj.weight"].T for x in "qkv"]
        np.testing.assert_array_equal(
            ours["layers_0"]["qkv"]["kernel"], np.concatenate(projections, axis=1)
        )
        np.testing.assert_array_equal(ours["head"], theirs["lm_head.weight"].T)
        np.testing.assert_array_equal(
            ours["embedding"]["embedding"], theirs["model.embed_tokens.weight"]
        )

    def test_casts_to_the_dtypes_asked_for(self, saved: Path, llama: Any) -> None:
        cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), llama.params)
        narrow = pretrained.load(saved, dtype=jnp.bfloat16)
        assert_same(narrow.params, cast)
        assert narrow.architecture.config.dtype == jnp.bfloat16
        mixed = pretrained.load(saved, dtype=jnp.bfloat16, param_dtype=jnp.float32)
        assert_same(mixed.params, llama.params)
        assert mixed.architecture.config.dtype == jnp.bfloat16

    def test_puts_arrays_on_a_mesh(self, saved: Path, llama: Any) -> None:
        mesh = sharding.mesh(devices=jax.devices()[:1])
        loaded = pretrained.load(saved, mesh=mesh)
        assert_same(loaded.params, llama.params)
        wanted = sharding.shardings(llama.params, mesh)
        assert jax.tree.map(lambda x: x.sharding, loaded.params) == wanted

    def test_hands_on_the_rest_of_the_directory(self, saved: Path) -> None:
        loaded = pretrained.load(saved)
        assert loaded.files == FILES
        assert loaded.chat_template == "{{ x }}"
        assert loaded.tokenizer is None
        assert loaded.config["model_type"] == "llama"

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda x: x.pop("lm_head.weight"), ["lm_head.weight is missing"]),
            (lambda x: x.update(more=np.zeros(2)), ["more belongs to no parameter"]),
            (
                lambda x: x.update({"model.norm.weight": np.zeros((D, 1))}),
                ["model.norm.weight has the shape [8, 1]", "[8]"],
            ),
            (
                lambda x: x.update({"model.norm.weight": np.zeros(D, np.int8)}),
                ["model.norm.weight is I8", "quantised"],
            ),
        ],
        ids=["missing", "too many", "shape", "quantised"],
    )
    def test_refuses_tensors_that_do_not_fit(
        self, saved: Path, change: Any, said: list[str]
    ) -> None:
        rewrite(saved, change)
        with pytest.raises(DirectoryError) as error:
            pretrained.load(saved)
        for part in [str(saved), "model.safetensors", *said]:
            assert part in str(error.value)

    def test_lets_lie_what_carries_nothing(self, saved: Path, llama: Any) -> None:
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        rewrite(saved, lambda x: x.update({name: np.zeros(2, np.float32)}))
        assert_same(pretrained.load(saved).params, llama.params)

    def test_reads_nothing_before_all_is_checked(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rewrite(saved, lambda x: x.update(z=np.zeros(2)))
        monkeypatch.setattr(reading, "read", lambda *_: pytest.fail("read"))
        with pytest.raises(DirectoryError, match="z belongs"):
            pretrained.load(saved)

    def test_refuses_options_by_file_and_name(self, saved: Path) -> None:
        (saved / "config.json").write_text(json.dumps(LLAMA | {"sparkle": 3}))
        with pytest.raises(UnsupportedError, match=rf"{saved}/config.json: sparkle 3"):
            pretrained.load(saved)

    def test_refuses_code(self, saved: Path) -> None:
        (saved / "config.json").write_text(json.dumps(LLAMA | {"auto_map": {}}))
        with pytest.raises(DirectoryError, match="auto_map"):
            pretrained.load(saved)


class TestSave:
    def test_writes_what_belongs_to_the_model(self, saved: Path) -> None:
        assert sorted(p.name for p in saved.iterdir()) == sorted(
            ["config.json", "model.safetensors", *FILES]
        )
        for name, content in FILES.items():
            assert (saved / name).read_bytes() == content
        config = json.loads((saved / "config.json").read_text())
        said = {"architectures": ["LlamaForCausalLM"], "dtype": "float32", "torch_dtype": "float32"}
        assert config == LLAMA | said

    def test_casts_where_it_is_asked_to(self, llama: Any, tmp_path: Path) -> None:
        pretrained.save(tmp_path / "half", llama, llama.params, dtype=jnp.bfloat16)
        assert {x.dtype for x in reading.tensors(tmp_path / "half").values()} == {"BF16"}
        assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), llama.params)
        assert_same(pretrained.load(tmp_path / "half", dtype=jnp.bfloat16).params, narrow)

    def test_leaves_alone_what_is_there(self, saved: Path, llama: Any) -> None:
        with pytest.raises(FileExistsError, match=str(saved)):
            pretrained.save(saved, llama, llama.params)
        doubled = jax.tree.map(lambda x: 2 * x, llama.params)
        pretrained.save(saved, llama, doubled, overwrite=True)
        assert_same(pretrained.load(saved).params, doubled)

    def test_clears_away_what_a_kill_has_left(self, llama: Any, tmp_path: Path) -> None:
        for name in (".out.0123abcd", ".out.0123abcd.old", ".out.notes", ".outer.0123abcd"):
            (tmp_path / name).mkdir()
        pretrained.save(tmp_path / "out", llama, llama.params)
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {"out", ".out.notes", ".outer.0123abcd"}

    def test_leaves_nothing_where_it_fails(
        self, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError("no space left on the disk")

        monkeypatch.setattr(writing, "_write_array", full)
        with pytest.raises(OSError, match="no space left"):
            pretrained.save(tmp_path / "model", llama, llama.params)
        assert [*tmp_path.iterdir()] == []

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda p: {**p, "lora": np.zeros(2)}, ["lora is (2,)", "missing", "merged"]),
            (lambda p: {k: x for k, x in p.items() if k != "head"}, ["head is missing"]),
            (lambda p: {**p, "head": p["head"].T}, ["head is (16, 8)", "(8, 16)"]),
            (lambda p: {**p, "head": p["head"].astype(int)}, ["lm_head.weight is int32"]),
        ],
        ids=["too many", "missing", "shape", "whole numbers"],
    )
    def test_refuses_other_parameters(
        self, llama: Any, tmp_path: Path, change: Any, said: list[str]
    ) -> None:
        with pytest.raises(ValueError) as error:
            pretrained.save(tmp_path / "model", llama, change(llama.params))
        for part in said:
            assert part in str(error.value)
        assert [*tmp_path.iterdir()] == []


TOKENS = jnp.arange(10).reshape(2, 5)


def run(function: Any, params: Any) -> np.ndarray:
    return np.asarray(jax.jit(function)(params, TOKENS, TOKENS >= 0))


class TestScalarModels:
    @pytest.fixture
    def fresh(self, saved: Path) -> Any:
        return pretrained.load_scalar(saved, key=jax.random.key(3))

    def test_are_a_fresh_head_on_a_language_model(self, fresh: Any, llama: Any) -> None:
        backbone = {name: x for name, x in llama.params.items() if name != "head"}
        assert_same(fresh.params["backbone"], backbone)
        assert fresh.params["head"]["kernel"].shape == (D,)
        hidden = run(llama.model.hidden, llama.params).astype(np.float64)
        expected = hidden @ np.asarray(fresh.params["head"]["kernel"])
        found = run(fresh.model.values, fresh.params)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)

    def test_begin_as_wide_as_asked(self, saved: Path) -> None:
        wide = pretrained.score_head(10_000).init(jax.random.key(0))["kernel"]
        np.testing.assert_allclose(np.std(wide), 0.01, rtol=0.05)
        zero = pretrained.load_scalar(saved, key=jax.random.key(0), stddev=0.0)
        np.testing.assert_array_equal(zero.params["head"]["kernel"], np.zeros(D))

    def test_need_a_key_for_a_fresh_head(self, saved: Path) -> None:
        with pytest.raises(ValueError, match="or load_scalar a key for a fresh head"):
            pretrained.load_scalar(saved)

    def test_come_back_with_their_head(self, fresh: Any, tmp_path: Path) -> None:
        pretrained.save_scalar(tmp_path / "scores", fresh, fresh.params, pad_token=3)
        again = pretrained.load_scalar(tmp_path / "scores")
        assert_same(again.params, fresh.params)
        config = json.loads((tmp_path / "scores" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        assert config["pad_token_id"] == 3
        assert config["id2label"] == {"0": "LABEL_0"}
        with pytest.raises(DirectoryError, match="a reward model, which gives scores and has no"):
            pretrained.load(tmp_path / "scores")

    def test_may_be_made_of_the_policy_itself(self, llama: Any, tmp_path: Path) -> None:
        """A `scalar_model` on it, whose LM head nobody uses, with a head that has a bias of 0."""
        model = models.scalar_model(llama.model, models.linear_head(D, stddev=1.0))
        head = models.linear_head(D, stddev=1.0).init(jax.random.key(0))
        params = {"backbone": llama.params, "head": head}
        pretrained.save_scalar(tmp_path / "scores", llama, params, pad_token=3)
        again = pretrained.load_scalar(tmp_path / "scores")
        np.testing.assert_array_equal(again.params["head"]["kernel"], params["head"]["kernel"])
        found = run(again.model.values, again.params)
        np.testing.assert_allclose(found, run(model.values, params), rtol=1e-5)

    def test_have_no_bias_in_a_directory(self, fresh: Any, tmp_path: Path) -> None:
        head = {**fresh.params["head"], "bias": jnp.array(0.5)}
        with pytest.raises(ValueError, match="the head has a bias"):
            pretrained.save_scalar(
                tmp_path / "scores", fresh, {**fresh.params, "head": head}, pad_token=3
            )
        assert not (tmp_path / "scores").exists()

    def test_say_what_pads(self, fresh: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="pad_token"):
            pretrained.save_scalar(tmp_path / "scores", fresh, fresh.params)
        for ends, warned in ((4, False), (2, True)):
            found = pretrained.Tokenizer(None, 2, (ends,), None, {}, None)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                pretrained.save_scalar(
                    tmp_path / str(ends), fresh._replace(tokenizer=found), fresh.params
                )
            assert any("the end token pads" in str(x.message) for x in told) == warned
            config = json.loads((tmp_path / str(ends) / "config.json").read_text())
            assert config["pad_token_id"] == 2

    def test_have_one_label(self, fresh: Any, tmp_path: Path) -> None:
        pretrained.save_scalar(tmp_path / "scores", fresh, fresh.params, pad_token=3)
        file = tmp_path / "scores" / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps(config | {"id2label": {"0": "A", "1": "B"}}))
        with pytest.raises(UnsupportedError, match=r"config.json: num_labels 2"):
            pretrained.load_scalar(tmp_path / "scores")


def test_two_processes_load_and_save_as_one_does(saved: Path, tmp_path: Path) -> None:
    """On a mesh over both; only the first one writes, and both hear of it when it cannot."""
    program = Path(__file__).with_name("process_program.py")
    command = [
        sys.executable, "-m", "rlhfjax.cli.launch", "--processes", "2", "--devices", "2", "--",
        str(program), str(saved), str(tmp_path / "again"),
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    for index in range(2):
        seen = json.loads((tmp_path / f"again.{index}").read_text())
        assert seen == {"parts": 2, "refused": True}
    for file in saved.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
