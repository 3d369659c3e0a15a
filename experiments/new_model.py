"""A small model directory that nobody has trained, with a tokenizer learned from text.

    python experiments/new_model.py --text FILE.jsonl --out runs/new

It has the shape of Qwen3 in the layout of Hugging Face: `rlhfjax` and transformers load it. The
tokenizer is byte-level BPE, learned from all texts of the records.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rlhfjax import pretrained
from rlhfjax.data.records import read

END, PAD = "<|end|>", "<|pad|>"


@dataclass(frozen=True)
class Args:
    """Makes a small model directory."""

    text: Path
    """JSONL, JSON or parquet file, or a folder of them."""
    out: Path
    """The directory to be made."""
    vocab: int = 2048
    """Tokens of the vocabulary, at most."""
    context: int = 512
    """Longest sequence."""
    width: int = 128
    """Size of the hidden states."""
    layers: int = 2
    """Blocks of the transformer."""
    heads: int = 4
    """Attention heads; half as many of keys and values."""
    seed: int = 0
    """Decides the parameters."""


def main(args: Args) -> None:
    """Makes it."""
    tokenizer = learned(texts(args.text), args.vocab)
    settings = {
        "eos_token": END, "pad_token": PAD, "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": args.context,
    }  # fmt: skip
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": args.context,
        "hidden_size": args.width,
        "intermediate_size": 3 * args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": max(args.heads // 2, 1),
        "head_dim": args.width // args.heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.token_to_id(END),
        "pad_token_id": tokenizer.token_to_id(PAD),
    }
    made = pretrained.init(jax.random.key(args.seed), config, files=files)
    pretrained.save(args.out, made, made.params)


def texts(path: Path) -> Iterator[str]:
    """All strings of the records, those of messages too."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from strings(value.get("content"))
        elif isinstance(value, list):
            for part in value:
                yield from strings(part)

    for record in read(path):
        yield from strings(list(record.fields.values()))


def learned(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


if __name__ == "__main__":
    main(tyro.cli(Args))
