"""The table of families: what their tensors and options are called, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

Activation = Callable[[jax.Array], jax.Array]

# Options that every `config.json` must give.
SHAPE = (
    "vocab_size", "max_position_embeddings", "hidden_size", "num_hidden_layers",
    "num_attention_heads", "intermediate_size",
)  # fmt: skip

# Options that change no hidden state here: notes of transformers, choices of generation, dropout
# (nothing here drops), and heads that are not loaded.
HARMLESS = {
    "_attn_implementation_autoset", "_name_or_path", "_num_labels", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "attn_implementation", "attn_pdrop",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout", "hidden_dropout_prob",
    "id2label", "initializer_range", "is_decoder", "keys_to_ignore_at_inference", "label2id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "model_type", "n_ctx",
    "n_special", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_past",
    "output_scores", "pad_token_id", "predict_special_tokens", "prefix", "pretraining_tp",
    "problem_type", "remove_invalid_values", "reorder_and_upcast_attn", "repetition_penalty",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "sep_token_id",
    "sliding_window_size", "summary_activation", "summary_first_dropout",
    "summary_proj_to_labels", "summary_type", "summary_use_proj", "suppress_tokens",
    "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
    "typical_p", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip

# Options that must have one of these values, if they are given.
ONLY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
}

# What the options say of labels.
LABELS = ("_num_labels", "num_labels", "id2label", "label2id", "problem_type")

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_fast": jax.nn.gelu,
    "gelu_new": jax.nn.gelu,
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
      classes: of transformers, for a language model, for the layers alone, and for scores.
      names: path of ours → names of theirs; `#` is the number of a layer.
      options: what an option means that is left out, for all that the family has beyond `SHAPE`.
      switches: fields of `DecoderConfig` that no option decides.
      only: options that must have one of these values, beside `ONLY`.
      spelling: options that others call otherwise → what they call them.
      activations: what their names mean.
      sliding: `(layer number, options) -> bool`, which layers have a window where no option says.
      untransposed: matrices are stored as ours, [in, out].
      by_head: queries, keys and values are stored head by head.
      ignored: tensors that carry nothing.
    """

    classes: tuple[str, str, str]
    names: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any]
    switches: dict[str, Any]
    only: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    spelling: Mapping[str, str] = field(default_factory=dict)
    activations: Mapping[str, Activation] = field(default_factory=lambda: _ACTIVATIONS)
    sliding: Callable[[int, Mapping[str, Any]], bool] | None = None
    untransposed: bool = False
    by_head: bool = False
    ignored: tuple[str, ...] = ()


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_LLAMA_NAMES = {
    "embedding/embedding": ("model.embed_tokens.weight",),
    "layers_#/attention_norm/scale": ("model.layers.#.input_layernorm.weight",),
    "layers_#/qkv/kernel": tuple(f"model.layers.#.self_attn.{x}.weight" for x in _PROJECTIONS),
    "layers_#/qkv/bias": tuple(f"model.layers.#.self_attn.{x}.bias" for x in _PROJECTIONS),
    "layers_#/query_norm/scale": ("model.layers.#.self_attn.q_norm.weight",),
    "layers_#/key_norm/scale": ("model.layers.#.self_attn.k_norm.weight",),
    "layers_#/output/kernel": ("model.layers.#.self_attn.o_proj.weight",),
    "layers_#/output/bias": ("model.layers.#.self_attn.o_proj.bias",),
    "layers_#/mlp_norm/scale": ("model.layers.#.post_attention_layernorm.weight",),
    "layers_#/gate/kernel": ("model.layers.#.mlp.gate_proj.weight",),
    "layers_#/gate/bias": ("model.layers.#.mlp.gate_proj.bias",),
    "layers_#/up/kernel": ("model.layers.#.mlp.up_proj.weight",),
    "layers_#/up/bias": ("model.layers.#.mlp.up_proj.bias",),
    "layers_#/down/kernel": ("model.layers.#.mlp.down_proj.weight",),
    "layers_#/down/bias": ("model.layers.#.mlp.down_proj.bias",),
    "norm/scale": ("model.norm.weight",),
    "head": ("lm_head.weight",),
}
_GEMMA_2_NAMES = _LLAMA_NAMES | {
    "layers_#/attention_post_norm/scale": ("model.layers.#.post_attention_layernorm.weight",),
    "layers_#/mlp_norm/scale": ("model.layers.#.pre_feedforward_layernorm.weight",),
    "layers_#/mlp_post_norm/scale": ("model.layers.#.post_feedforward_layernorm.weight",),
}
_GPT_2_NAMES = {
    "embedding/embedding": ("transformer.wte.weight",),
    "position_embedding/embedding": ("transformer.wpe.weight",),
    "layers_#/attention_norm/scale": ("transformer.h.#.ln_1.weight",),
    "layers_#/attention_norm/bias": ("transformer.h.#.ln_1.bias",),
    "layers_#/qkv/kernel": ("transformer.h.#.attn.c_attn.weight",),
    "layers_#/qkv/bias": ("transformer.h.#.attn.c_attn.bias",),
    "layers_#/output/kernel": ("transformer.h.#.attn.c_proj.weight",),
    "layers_#/output/bias": ("transformer.h.#.attn.c_proj.bias",),
    "layers_#/mlp_norm/scale": ("transformer.h.#.ln_2.weight",),
    "layers_#/mlp_norm/bias": ("transformer.h.#.ln_2.bias",),
    "layers_#/up/kernel": ("transformer.h.#.mlp.c_fc.weight",),
    "layers_#/up/bias": ("transformer.h.#.mlp.c_fc.bias",),
    "layers_#/down/kernel": ("transformer.h.#.mlp.c_proj.weight",),
    "layers_#/down/bias": ("transformer.h.#.mlp.c_proj.bias",),
    "norm/scale": ("transformer.ln_f.weight",),
    "norm/bias": ("transformer.ln_f.bias",),
    "head": ("lm_head.weight",),
}
_NEOX_NAMES = {
    "embedding/embedding": ("gpt_neox.embed_in.weight",),
    "layers_#/attention_norm/scale": ("gpt_neox.layers.#.input_layernorm.weight",),
    "layers_#/attention_norm/bias": ("gpt_neox.layers.#.input_layernorm.bias",),
    "layers_#/qkv/kernel": ("gpt_neox.layers.#.attention.query_key_value.weight",),
    "layers_#/qkv/bias": ("gpt_neox.layers.#.attention.query_key_value.bias",),
    "layers_#/output/kernel": ("gpt_neox.layers.#.attention.dense.weight",),
    "layers_#/output/bias": ("gpt_neox.layers.#.attention.dense.bias",),
    "layers_#/mlp_norm/scale": ("gpt_neox.layers.#.post_attention_layernorm.weight",),
    "layers_#/mlp_norm/bias": ("gpt_neox.layers.#.post_attention_layernorm.bias",),
    "layers_#/up/kernel": ("gpt_neox.layers.#.mlp.dense_h_to_4h.weight",),
    "layers_#/up/bias": ("gpt_neox.layers.#.mlp.dense_h_to_4h.bias",),
    "layers_#/down/kernel": ("gpt_neox.layers.#.mlp.dense_4h_to_h.weight",),
    "layers_#/down/bias": ("gpt_neox.layers.#.mlp.dense_4h_to_h.bias",),
    "norm/scale": ("gpt_neox.final_layer_norm.weight",),
    "norm/bias": ("gpt_neox.final_layer_norm.bias",),
    "head": ("embed_out.weight",),
}

_ROTARY = {"rope_theta": 10_000.0, "rope_scaling": None, "rope_parameters": None}
_LLAMA_OPTIONS = _ROTARY | {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN_2_OPTIONS = _LLAMA_OPTIONS | {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA_OPTIONS = _LLAMA_OPTIONS | {
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": None,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": None,
}
_GEMMA_2_OPTIONS = _GEMMA_OPTIONS | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_LLAMA_SWITCHES = {"rms_norm": True, "gated_mlp": True, "bias": False}
_GEMMA_SWITCHES = _LLAMA_SWITCHES | {"norm_from_one": True, "scaled_embedding": True}
_INVERSE_FREQUENCIES = (r"(.*\.)?rotary_emb\.inv_freq",)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        ("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"),
        _LLAMA_NAMES,
        _LLAMA_OPTIONS | {"attention_bias": False, "mlp_bias": False},
        _LLAMA_SWITCHES,
        ignored=_INVERSE_FREQUENCIES,
    ),
    "mistral": Family(
        ("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification"),
        _LLAMA_NAMES,
        _LLAMA_OPTIONS | {"num_key_value_heads": 8, "sliding_window": 4096},
        _LLAMA_SWITCHES,
        sliding=lambda number, options: True,
        ignored=_INVERSE_FREQUENCIES,
    ),
    "qwen2": Family(
        ("Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForSequenceClassification"),
        _LLAMA_NAMES,
        _QWEN_2_OPTIONS,
        _LLAMA_SWITCHES | {"qkv_bias": True},
        sliding=lambda number, options: number >= options["max_window_layers"],
        ignored=_INVERSE_FREQUENCIES,
    ),
    "qwen3": Family(
        ("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification"),
        _LLAMA_NAMES,
        _QWEN_2_OPTIONS | {"head_dim": 128, "attention_bias": False},
        _LLAMA_SWITCHES | {"qk_norm": True},
        sliding=lambda number, options: number >= options["max_window_layers"],
        ignored=_INVERSE_FREQUENCIES,
    ),
    "gemma": Family(
        ("GemmaForCausalLM", "GemmaModel", "GemmaForSequenceClassification"),
        _LLAMA_NAMES,
        _GEMMA_OPTIONS,
        _GEMMA_SWITCHES,
        # Its first releases say "gelu" and mean the approximation.
        activations=_ACTIVATIONS | {"gelu": jax.nn.gelu},
        ignored=_INVERSE_FREQUENCIES,
    ),
    "gemma2": Family(
        ("Gemma2ForCausalLM", "Gemma2Model", "Gemma2ForSequenceClassification"),
        _GEMMA_2_NAMES,
        _GEMMA_2_OPTIONS,
        _GEMMA_SWITCHES | {"post_norms": True},
        sliding=lambda number, options: number % 2 == 0,
        ignored=_INVERSE_FREQUENCIES,
    ),
    "gemma3_text": Family(
        ("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextForSequenceClassification"),
        _GEMMA_2_NAMES,
        _GEMMA_2_OPTIONS
        | {
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        _GEMMA_SWITCHES | {"post_norms": True, "qk_norm": True},
        # transformers has the option and does not heed it.
        only={"attn_logit_softcapping": (None,)},
        spelling={
            "sliding_window_pattern": "sliding_window_pattern",
            "_sliding_window_pattern": "sliding_window_pattern",
        },
        sliding=lambda number, options: (number + 1) % options["sliding_window_pattern"] != 0,
        ignored=_INVERSE_FREQUENCIES,
    ),
    "gpt2": Family(
        ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"),
        _GPT_2_NAMES,
        {
            "intermediate_size": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
        {},
        spelling={
            "n_positions": "max_position_embeddings",
            "n_embd": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_attention_heads",
            "n_inner": "intermediate_size",
        },
        untransposed=True,
        ignored=(r"(.*\.)?attn\.(bias|masked_bias)",),
    ),
    "gpt_neox": Family(
        ("GPTNeoXForCausalLM", "GPTNeoXModel", "GPTNeoXForSequenceClassification"),
        _NEOX_NAMES,
        _ROTARY
        | {
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_parallel_residual": True,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        {},
        spelling={"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
        by_head=True,
        ignored=(r"(.*\.)?attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    ),
}
