"""Tiny random models of transformers, one for each family at least, and ours of what they save.

Only for tests that have made sure that transformers is there.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from rlhfjax.pretrained.families import Architecture, architecture
from rlhfjax.types import Params

V = 37
SIZES = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
NEOX = SIZES | {"intermediate_size": 24}
GROUPED = NEOX | {"num_key_value_heads": 2}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
# Windows are shorter than the sequences, and caps of the size of what they cap.
CASES = {
    "GPT-2": ("gpt2", SIZES),
    "GPT-2, unscaled and untied": (
        "gpt2",
        SIZES | {"n_inner": 24, "scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "Pythia": (
        "gpt_neox",
        NEOX | {"hidden_size": 32, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "GPT-NeoX in sequence": (
        "gpt_neox",
        NEOX
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 3.0},
            "use_parallel_residual": False,
            "attention_bias": False,
            "hidden_size": 32,
            "hidden_act": "gelu_new",
        },
    ),
    "Llama 3": ("llama", GROUPED | {"rope_parameters": LLAMA_3, "rms_norm_eps": 1e-2}),
    "Llama with biases": (
        "llama",
        NEOX
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 6,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral": ("mistral", GROUPED | {"sliding_window": 5}),
    "Qwen2": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "Qwen3": ("qwen3", GROUPED | {"head_dim": 6, "tie_word_embeddings": True}),
    "Gemma": ("gemma", NEOX | {"num_key_value_heads": 1, "head_dim": 8}),
    "Gemma 2": (
        "gemma2",
        GROUPED
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 3,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "Gemma 3": (
        "gemma3_text",
        GROUPED
        | {
            "head_dim": 8,
            "query_pre_attn_scalar": 3,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        },
    ),
}


class Pair(NamedTuple):
    theirs: Any
    tensors: dict[str, np.ndarray]
    known: Architecture
    params: Params


def pair_of(kind: str, options: dict[str, Any], classes: Any, folder: Path) -> Pair:
    """A model of transformers with parameters all over the place, and ours of what it saves."""
    config = transformers.AutoConfig.for_model(kind, **options)
    model = classes.from_config(config, attn_implementation="eager").eval()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            # The parameters of norms are around 1, Gemma's around 0.
            is_norm = re.search(r"(norm|ln_\w+)\.weight$", name) and "gemma" not in kind
            spread = 0.2 if tensor.ndim == 1 else 0.1 if "embed_tokens" in name else 0.5
            noise = rng.normal(bool(is_norm), spread, tuple(tensor.shape))
            tensor.copy_(torch.tensor(noise, dtype=torch.float32))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    known = architecture(json.loads((folder / "config.json").read_text()))
    params: dict[str, Any] = {}
    for entry in known.entries:
        *branches, leaf = entry.path
        here = params
        for branch in branches:
            here = here.setdefault(branch, {})
        here[leaf] = entry.join([tensors[name] for name in entry.names])
    return Pair(model, tensors, known, params)
