"""Adapters against PEFT: it loads what is saved here, and what it saves is loaded here."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import assert_same, left_padded

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from public_models import CASES, Pair, V, pair_of  # noqa: E402

from rlhfjax import pretrained  # noqa: E402
from rlhfjax.algorithms.reward_model import score  # noqa: E402
from rlhfjax.models import decoder, lora  # noqa: E402
from rlhfjax.pretrained import DirectoryError, UnsupportedError  # noqa: E402
from rlhfjax.pretrained.peft import CONFIG, Loaded, added, load, save  # noqa: E402

S = 8
PAD = 0
TOKENS, MASK = left_padded(np.random.default_rng(0), [S, S], S, PAD + 1, V)
SCALE = 0.75
# Keys are left out.
MODULES = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}


@pytest.fixture(scope="module", params=["Llama 3", "GPT-2", "Pythia"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("model")
    return pair_of(*CASES[request.param], transformers.AutoModelForCausalLM, folder)


def adapters_of(pair: Pair, pattern: str, rank: int) -> lora.Adapters:
    rng = np.random.default_rng(rank)
    adapters = lora.init(jax.random.key(0), pair.params, rank=rank, pattern=pattern)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.3, x.shape)), adapters)


def logits(pair: Pair, adapters: lora.Adapters, scale: float) -> np.ndarray:
    model = decoder(pair.known.config)

    @jax.jit
    def run(adapters: lora.Adapters) -> jax.Array:
        params = lora.beside(pair.params, adapters, scale=scale)
        return model.logits(params, model.hidden(params, TOKENS, MASK))

    return np.asarray(run(adapters))


def of_theirs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS).long()).logits.numpy()


def scatter(theirs: Any) -> None:
    """As after training: what is trained is all over the place."""
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                noise = rng.normal(0, 0.3, tuple(parameter.shape))
                parameter.copy_(torch.tensor(noise, dtype=torch.float32))


def assert_near(ours: np.ndarray, theirs: np.ndarray, plain: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(theirs - plain).max() > 0.1


def test_it_loads_what_is_saved_and_so_do_we(pair: Pair, tmp_path: Path) -> None:
    plain = of_theirs(pair.theirs)
    adapters = adapters_of(pair, r"layers_\d/(qkv|up)$", 2)
    adapters |= adapters_of(pair, r"layers_1/(output|down)$", 3)
    save(tmp_path / "adapters", adapters, pair.known, scale=SCALE)
    theirs = peft.PeftModel.from_pretrained(pair.theirs, tmp_path / "adapters")
    assert_near(logits(pair, adapters, SCALE), of_theirs(theirs), plain)
    theirs.unload()
    loaded = load(tmp_path / "adapters", pair.known)
    assert loaded.scale == SCALE
    assert_same(loaded.adapters, adapters)
    with pytest.raises(FileExistsError, match="is there already"):
        save(tmp_path / "adapters", adapters, pair.known, scale=SCALE)
    save(tmp_path / "adapters", adapters, pair.known, scale=2 * SCALE, overwrite=True)
    assert load(tmp_path / "adapters", pair.known).scale == 2 * SCALE


def test_what_it_saves_is_loaded(pair: Pair, tmp_path: Path) -> None:
    plain = of_theirs(pair.theirs)
    kind = pair.theirs.config.model_type
    # Modules differ in rank and scale.
    modules = MODULES[kind]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=modules, rank_pattern={modules[0]: 2},
        alpha_pattern={modules[-1]: 5}, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = peft.get_peft_model(pair.theirs, config)
    scatter(theirs)
    theirs.save_pretrained(tmp_path)
    expected = of_theirs(theirs)
    theirs.unload()
    adapters, scale, _ = load(tmp_path, pair.known)
    assert scale == 1.5
    assert_near(logits(pair, adapters, scale), expected, plain)
    # Two of queries and four of values.
    assert adapters["layers_0/qkv"]["a"].shape[1] == (6 if kind == "llama" else 2)


def test_it_adds_up_what_was_trained_on_an_adapter(pair: Pair, tmp_path: Path) -> None:
    """Theirs: the first one merged, and the second one on that. Ours: the sum on the base."""
    base, plain = str(tmp_path / "base"), of_theirs(pair.theirs)
    pair.theirs.save_pretrained(base)
    first = Loaded(adapters_of(pair, r"(qkv|up)$", 2), SCALE)
    second = Loaded(adapters_of(pair, r"(qkv|down)$", 3), 2 * SCALE)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    for name, (adapters, scale, _) in (("first", first), ("second", second)):
        save(tmp_path / name, adapters, pair.known, scale=scale, base=base)
        model = peft.PeftModel.from_pretrained(model, tmp_path / name).merge_and_unload()
    both = added(first, second)
    save(tmp_path / "sum", both.adapters, pair.known, scale=both.scale, base=base)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sum")
    assert_near(of_theirs(theirs), of_theirs(model), plain)
    params = pretrained.load(tmp_path / "sum").params
    ours = logits(pair._replace(params=params), {}, 1.0)
    assert_near(ours, of_theirs(model), plain)


def test_reward_models_go_both_ways(pair: Pair, tmp_path: Path) -> None:
    kind = pair.theirs.config.model_type
    pair.theirs.save_pretrained(tmp_path / "base")
    scores = transformers.AutoModelForSequenceClassification
    model = scores.from_pretrained(tmp_path / "base", num_labels=1)
    plain = scores_of(model)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=MODULES[kind], fan_in_fan_out=kind == "gpt2",
        task_type="SEQ_CLS",
    )  # fmt: skip
    theirs = peft.get_peft_model(model, config)
    scatter(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    source = pretrained.load_scalar(tmp_path / "theirs")
    ours = jax.jit(partial(score, source.model))
    assert_near(ours(source.params, TOKENS, MASK), scores_of(theirs), plain)

    adapters = adapters_of(pair, r"(qkv|up)$", 3)
    head = {"kernel": -2 * source.params["head"]["kernel"]}
    save(tmp_path / "ours", adapters, source.architecture, scale=SCALE, head=head,
         base=str(tmp_path / "base"))  # fmt: skip
    again = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", num_labels=1
    )
    params = pretrained.load_scalar(tmp_path / "ours").params
    assert_near(ours(params, TOKENS, MASK), scores_of(again), plain)
    pretrained.save_scalar(tmp_path / "merged", source, params, pad_token=PAD)
    assert_near(
        ours(params, TOKENS, MASK), scores_of(scores.from_pretrained(tmp_path / "merged")), plain
    )


def scores_of(model: Any) -> np.ndarray:
    model.config.pad_token_id = PAD
    return of_theirs(model.eval())[:, 0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"something_new": 1}, "something_new 1"),
        ({"r": 0}, "r 0 is no positive number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    pair: Pair, tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "adapters"
    save(folder, adapters_of(pair, "qkv", 2), pair.known, scale=SCALE)
    config = json.loads((folder / CONFIG).read_text()) | option
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=message):
        load(folder, pair.known)


def test_tensors_of_another_model_are_refused(pair: Pair, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    save(folder, adapters_of(pair, "layers_1/up", 2), pair.known, scale=SCALE)
    fewer = tuple(entry for entry in pair.known.entries if entry.path[0] != "layers_1")
    with pytest.raises(DirectoryError, match=r"lora_A\.weight belongs to no projection"):
        load(folder, pair.known._replace(entries=fewer))
    wider = tuple(e._replace(shapes=tuple((9, 9) for _ in e.shapes)) for e in pair.known.entries)
    with pytest.raises(DirectoryError, match=r"lora_A\.weight has the shape \[2, "):
        load(folder, pair.known._replace(entries=wider))
    with pytest.raises(ValueError, match="no projection 'embedding/embedding'"):
        adapters = adapters_of(pair, "^embedding", 2)
        save(tmp_path / "more", adapters, pair.known, scale=SCALE)
