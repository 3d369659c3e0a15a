"""Directories go both ways between transformers and rlhfjax, policies and reward models alike."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhfjax import models, pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, B, S, PAD = 96, 4, 9, 3
SHAPES = {
    # Their LM head is a matrix of its own.
    "llama": dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    ),
    # Their LM head is the embedding.
    "gpt2": dict(n_embd=16, n_layer=2, n_head=2, n_positions=32),
    "qwen3": dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, tie_word_embeddings=True,
    ),
}  # fmt: skip
CAUSAL = transformers.AutoModelForCausalLM
SCORES = transformers.AutoModelForSequenceClassification


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@cache
def theirs(family: str, kind: Any) -> Any:
    """A model of transformers whose parameters are all over the place."""
    labels = {"num_labels": 1} if kind is SCORES else {}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=V, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, **SHAPES[family],
        **labels,
    )  # fmt: skip
    torch.manual_seed(0)
    model = kind.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def rows(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, padded on one side, no real token the padding one."""
    rng = np.random.default_rng(1)
    lengths = np.array([S, 5, 1, 7])[:, None]
    mask = np.arange(S) >= S - lengths if side == "left" else np.arange(S) < lengths
    return np.where(mask, rng.integers(PAD + 1, V, (B, S)), PAD).astype(np.int32), mask


def of_theirs(model: Any, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits, or scores, in float32."""
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    with torch.no_grad():
        found = model.float()(
            input_ids=torch.tensor(tokens).long(),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions),
        )
    return found.logits.numpy()


@cache
def forward(family: str, kind: Any) -> Callable[..., np.ndarray]:
    """Logits or scores as a function of our parameters, compiled once for each."""
    model = theirs(family, kind)
    config = {name: x for name, x in model.config.to_dict().items() if x is not None}
    known = pretrained.architecture(config | {"architectures": [type(model).__name__]})
    decoder = models.decoder(known.config)
    if kind is CAUSAL:
        return jax.jit(lambda p, t, m: decoder.logits(p, decoder.hidden(p, t, m)))
    scalar = models.scalar_model(decoder, pretrained.score_head(known.config.width))
    return jax.jit(lambda p, t, m: models.last_value(scalar.values(p, t, m), m)[:, None])


def read(directory: Path, kind: Any, **options: Any) -> Any:
    return (pretrained.load if kind is CAUSAL else pretrained.load_scalar)(directory, **options)


def written(directory: Path, kind: Any, loaded: Any, params: Any, **options: Any) -> Any:
    """Saved by us, and what transformers makes of it."""
    if kind is SCORES:
        options["pad_token"] = PAD
    (pretrained.save if kind is CAUSAL else pretrained.save_scalar)(
        directory, loaded, params, **options
    )
    model, told = kind.from_pretrained(directory, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def assert_agree(ours: Any, others: np.ndarray, mask: np.ndarray, kind: Any) -> None:
    real = mask if kind is CAUSAL else np.ones(B, bool)
    np.testing.assert_allclose(np.asarray(ours)[real], others[real], rtol=1e-4, atol=1e-5)


def perturbed(params: Any) -> Any:
    """As after training: every parameter is another one."""
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(2)
    moved = [x + 0.1 * rng.normal(size=x.shape).astype(x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, moved)


def assert_same(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


BOTH = pytest.mark.parametrize("kind", [CAUSAL, SCORES], ids=["policy", "scores"])
FAMILIES = pytest.mark.parametrize("family", SHAPES)


@BOTH
@FAMILIES
def test_what_one_saves_the_other_loads(tmp_path: Path, family: str, kind: Any) -> None:
    model = theirs(family, kind)
    model.save_pretrained(tmp_path / "theirs")
    loaded = read(tmp_path / "theirs", kind)
    new = perturbed(loaded.params)
    back = written(tmp_path / "ours", kind, loaded, new)
    for side in ("left", "right"):
        tokens, mask = rows(side)
        run = forward(family, kind)
        assert_agree(run(loaded.params, tokens, mask), of_theirs(model, tokens, mask), mask, kind)
        assert_agree(run(new, tokens, mask), of_theirs(back, tokens, mask), mask, kind)


@BOTH
@FAMILIES
def test_in_several_files(tmp_path: Path, family: str, kind: Any) -> None:
    model = theirs(family, kind)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 2
    one, many = (read(tmp_path / name, kind) for name in ("one", "many"))
    assert_same(one.params, many.params)
    back = written(tmp_path / "ours", kind, one, one.params, max_shard_bytes=4000)
    assert len([*(tmp_path / "ours").glob("*.safetensors")]) > 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


@BOTH
def test_in_bfloat16(tmp_path: Path, kind: Any) -> None:
    kind.from_pretrained(
        saved(tmp_path / "float32", "llama", kind), dtype=torch.bfloat16
    ).save_pretrained(tmp_path / "theirs")
    as_float32 = kind.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    loaded = read(tmp_path / "theirs", kind)
    tokens, mask = rows("left")
    expected = of_theirs(as_float32, tokens, mask)
    assert_agree(forward("llama", kind)(loaded.params, tokens, mask), expected, mask, kind)
    narrow = read(tmp_path / "theirs", kind, param_dtype=jnp.bfloat16)
    assert_same(jax.tree.map(lambda x: x.astype(jnp.float32), narrow.params), loaded.params)
    back = written(tmp_path / "ours", kind, narrow, loaded.params, dtype=jnp.bfloat16)
    assert back.dtype == torch.bfloat16
    np.testing.assert_array_equal(of_theirs(back, tokens, mask), expected)


def saved(directory: Path, family: str, kind: Any) -> Path:
    theirs(family, kind).save_pretrained(directory)
    return directory


def test_a_policy_becomes_a_reward_model(tmp_path: Path) -> None:
    """The LM head of its own is left out, and the fresh head for scores is saved."""
    fresh = pretrained.load_scalar(
        saved(tmp_path / "policy", "llama", CAUSAL), key=jax.random.key(0)
    )
    back = written(tmp_path / "ours", SCORES, fresh, fresh.params)
    for side in ("left", "right"):
        tokens, mask = rows(side)
        ours = forward("llama", SCORES)(fresh.params, tokens, mask)
        assert_agree(ours, of_theirs(back, tokens, mask), mask, SCORES)
        assert np.std(ours) > 0.01


def test_the_original_files_of_gpt_2_have_shorter_names(tmp_path: Path) -> None:
    theirs("gpt2", CAUSAL).save_pretrained(tmp_path / "long")
    theirs("gpt2", CAUSAL).transformer.save_pretrained(tmp_path / "short")
    config = (tmp_path / "long" / "config.json").read_text()
    (tmp_path / "short" / "config.json").write_text(config)
    long, short = (pretrained.load(tmp_path / name) for name in ("long", "short"))
    assert_same(long.params, short.params)


def tokenizer(directory: Path) -> Any:
    """A byte-level tokenizer that begins each text with <s>, in a directory of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["to be or not to be", "that is the question"], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    wrapped.save_pretrained(directory)
    return wrapped


def test_tokenizers_agree_and_go_along(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "gpt2", CAUSAL)
    wrapped = tokenizer(tmp_path / "theirs")
    loaded = pretrained.load(tmp_path / "theirs")
    ours = loaded.tokenizer
    texts = ["to be, or not", "", "naïve  \n</s> question", "\u2028日本"]
    assert ours.encode(texts) == wrapped(texts)["input_ids"]
    plain = wrapped(texts, add_special_tokens=False)["input_ids"]
    assert ours.encode(texts, add_special_tokens=False) == plain
    assert ours.decode(plain) == wrapped.batch_decode(plain, skip_special_tokens=True)
    assert (ours.begin_token, ours.end_tokens, ours.pad_token) == (1, (2,), 3)
    assert loaded.chat_template == wrapped.chat_template
    pretrained.save(tmp_path / "ours", loaded, loaded.params)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again(texts)["input_ids"] == wrapped(texts)["input_ids"]
    assert again.chat_template == wrapped.chat_template
    assert again.pad_token_id == 3
