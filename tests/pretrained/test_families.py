"""What `config.json` says, in its old and new spellings, and what is refused by name."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhfjax.models import DecoderConfig, Llama3, Rotary, Stretched
from rlhfjax.pretrained.families import UnsupportedError, architecture, config_json
from rlhfjax.pretrained.table import FAMILIES

SHAPE = {
    "vocab_size": 11, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 24, "max_position_embeddings": 64,
}  # fmt: skip
GPT_2 = {"vocab_size": 11, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}
SLIDING, FULL = "sliding_attention", "full_attention"


def of(kind: str, **options: Any) -> dict[str, Any]:
    grouped = {} if kind in ("gpt2", "gpt_neox") else {"num_key_value_heads": 2}
    return {"model_type": kind} | (GPT_2 if kind == "gpt2" else SHAPE | grouped) | options


def config_of(kind: str, **options: Any) -> DecoderConfig:
    return architecture(of(kind, **options)).config


# What is published with the weights, and how many parameters the publishers count.
PUBLIC = json.loads(Path(__file__).with_name("public_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLIC)
def test_public_models_are_read_as_they_are_published(name: str) -> None:
    known = architecture(PUBLIC[name]["config"])
    num_parameters = sum(math.prod(entry.shape) for entry in known.entries)
    assert num_parameters == PUBLIC[name]["num_parameters"]


def test_they_are_of_every_family() -> None:
    assert {public["config"]["model_type"] for public in PUBLIC.values()} == FAMILIES.keys()


LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("llama", {"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}),
        (
            "llama",
            {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
        ),
        (
            "llama",
            {"rope_theta": 500.0, "rope_scaling": {"rope_type": "llama3", **LLAMA_3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA_3}},
        ),
        (
            "gpt_neox",
            {"rotary_pct": 0.5, "rotary_emb_base": 500},
            {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 500.0}},
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": [FULL, FULL, SLIDING],
            },
        ),
        ("gemma2", {}, {"layer_types": [SLIDING, FULL, SLIDING]}),
        (
            "gemma3_text",
            {
                "sliding_window_pattern": 2,
                "rope_theta": 500.0,
                "rope_local_base_freq": 50.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            {
                "_sliding_window_pattern": 6,
                "layer_types": [SLIDING, FULL, SLIDING],
                "rope_parameters": {
                    FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 8.0},
                    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
                },
            },
        ),
        ("gemma", {"hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}),
        ("llama", {"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ],
)
def test_old_and_new_spellings_say_the_same(
    kind: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
    assert config_of(kind, **old) == config_of(kind, **new)


def test_positions_turn_as_the_options_say() -> None:
    def rotary(kind: str, **options: Any) -> Any:
        return config_of(kind, **options).rotary

    assert rotary("llama") == (Rotary(10_000.0),) * 3
    assert rotary("qwen3", rope_theta=1e6)[0] == Rotary(1e6)
    assert rotary("gpt_neox")[0] == Rotary(10_000.0, size=2)
    linear = {"rope_type": "linear", "factor": 4.0}
    assert rotary("llama", rope_scaling=linear)[0] == Rotary(10_000.0, rescale=Stretched(4.0))
    scaled = rotary("llama", rope_scaling={"rope_type": "llama3", **LLAMA_3})[0]
    assert scaled == Rotary(10_000.0, rescale=Llama3(8.0, 1.0, 4.0, 16))
    assert rotary("gemma3_text", sliding_window_pattern=3) == (
        Rotary(10_000.0), Rotary(10_000.0), Rotary(1_000_000.0),
    )  # fmt: skip
    assert rotary("gpt2") is None


def test_llama_3_keeps_short_turns_and_stretches_long_ones() -> None:
    # Turns in 16 tokens: 8, above 4; 2, a third of the way from 1 to 4; 0.5, below 1.
    frequency = 2 * np.pi * np.array([8.0, 2.0, 0.5]) / 16
    factor = Llama3(8.0, 1.0, 4.0, 16)(frequency) / frequency
    np.testing.assert_allclose(factor, [1.0, 1 / 3 + 2 / 3 / 8, 1 / 8], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "options", "windows"),
    [
        ("llama", {}, None),
        ("mistral", {"sliding_window": 8}, (8, 8, 8)),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 0}, None),
        ("gemma2", {"sliding_window": 8}, (8, None, 8)),
        ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 3}, (8, 8, None)),
    ],
)
def test_windows_are_those_of_the_family(kind: str, options: Any, windows: Any) -> None:
    assert config_of(kind, **options).windows == windows


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {}, "model_type 'bert' is none of llama, "),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling 'yarn'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling 'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "lacks low_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "beta 1"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config {'bits': 4}"),
        ("llama", {"hidden_act": "mish"}, "activation 'mish'"),
        ("llama", {"sliding_window": 8}, "sliding_window 8 is not known for llama"),
        ("llama", {"logit_scale": 2.0}, "logit_scale 2.0 is not known .* remove it"),
        ("qwen2", {"use_mrope": True}, "use_mrope True"),
        ("llama", {"hidden_size": None}, "hidden_size None is no positive number"),
        ("llama", {"architectures": ["LlamaForTokenClassification"]}, "TokenClassification"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "num_labels 2"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 3}, "layer_types 'chunked_attention'"),
        ("gemma2", {"sliding_window": None, "layer_types": [SLIDING] * 3}, "layer_types"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1.0}}, "rope_parameters 'rope_theta'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt2", {"hidden_size": 16}, "hidden_size 16 is not known for gpt2"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(kind: str, options: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        architecture(of(kind, **options))


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_two_parameters_share_a_tensor_and_the_embedding_may_be_the_head(kind: str) -> None:
    tied, own = (architecture(of(kind, tie_word_embeddings=tied)) for tied in (True, False))
    names = [name for entry in own.entries for name in entry.names]
    assert len(set(names)) == len(names)
    assert len(own.entries) == len(tied.entries) + 1
    assert own.config.tied_head is False


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_saved_is_what_was_read(kind: str) -> None:
    config = of(kind, num_labels=3)
    policy, reward = (config_json(config, scalar=scalar) for scalar in (False, True))
    assert (architecture(policy).head, architecture(reward).head is None) == (None, False)
    read = [architecture(x).config for x in (config, policy, reward)]
    assert read[0] == read[1]
    for field in {field.name for field in fields(DecoderConfig)} - {"tied_head"}:
        assert getattr(read[2], field) == getattr(read[0], field)
