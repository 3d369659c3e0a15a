"""Families of public models as configurations of the one decoder.

`config.json` is read strictly: each option is used, is known to change nothing here, or is refused
by name. What a family is, is data in `table`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rlhfjax.models import DecoderConfig, Llama3, Rotary, Stretched, decoder
from rlhfjax.pretrained.table import FAMILIES, HARMLESS, LABELS, ONLY, SHAPE, Activation, Family
from rlhfjax.pretrained.tensors import Entry


class UnsupportedError(ValueError):
    """An option of `config.json` that would change the result, and that nothing here can honour."""


class Architecture(NamedTuple):
    """What a `config.json` describes.

    Attributes:
      config: the decoder.
      entries: its parameters and the tensors that hold them.
      head: the score head of a `…ForSequenceClassification`, or None.
      ignored: regular expressions of whole names of tensors that carry nothing.
      untransposed: matrices are stored as [in, out], which PEFT calls `fan_in_fan_out`.
    """

    config: DecoderConfig
    entries: tuple[Entry, ...]
    head: Entry | None
    ignored: tuple[str, ...]
    untransposed: bool


def architecture(
    config: Mapping[str, Any], *, dtype: DTypeLike = jnp.float32, remat: bool = False
) -> Architecture:
    """What a parsed `config.json` describes.

    Args:
      config: parsed.
      dtype: of the computation.
      remat: see `DecoderConfig`.

    Returns:
      the decoder and its tensors.

    Raises:
      UnsupportedError: the family, an option or its value is not supported, or one is missing.
    """
    family = _family(config)
    scores = _scores(family, config)
    options = _options(family, config)
    sliding = _sliding(family, options)
    decoder_config = DecoderConfig(
        vocab_size=options["vocab_size"],
        context_length=options["max_position_embeddings"],
        width=options["hidden_size"],
        num_layers=options["num_hidden_layers"],
        num_heads=options["num_attention_heads"],
        num_kv_heads=options.get("num_key_value_heads"),
        head_width=options.get("head_dim"),
        mlp_width=options["intermediate_size"],
        rotary=_rotary(options, sliding),
        windows=tuple(options["sliding_window"] if s else None for s in sliding)
        if any(sliding)
        else None,
        norm_eps=_first(options, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
        activation=_activation(family, options),
        # A model of scores has no LM head.
        tied_head=scores or options["tie_word_embeddings"],
        dtype=dtype,
        remat=remat,
        **family.switches | _decided(options),
    )
    tied = tuple(map(re.escape, family.names["head"])) if decoder_config.tied_head else ()
    return Architecture(
        config=decoder_config,
        entries=_entries(family, decoder_config),
        head=_score_head(decoder_config.width) if scores else None,
        ignored=family.ignored + tied,
        untransposed=family.untransposed,
    )


def config_json(config: Mapping[str, Any], *, scalar: bool) -> dict[str, Any]:
    """What `config.json` says when a model is saved.

    Args:
      config: as the model came, of a language model or of one that gives scores.
      scalar: the model that is saved gives one score a sequence.

    Returns:
      the configuration with the class of the model and, for scores, its one label.

    Raises:
      UnsupportedError: the family is not supported.
    """
    causal, _, scores = _family(config).classes
    kept = {name: x for name, x in config.items() if name not in LABELS}
    if not scalar:
        return kept | {"architectures": [causal]}
    label = "LABEL_0"
    return kept | {
        "architectures": [scores],
        "id2label": {"0": label},
        "label2id": {label: 0},
    }


def _family(config: Mapping[str, Any]) -> Family:
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        raise UnsupportedError(f"model_type {name!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _scores(family: Family, config: Mapping[str, Any]) -> bool:
    """Does the model give scores?  Refuses what is neither that nor a language model."""
    classes = config.get("architectures") or family.classes[:1]
    for name in classes:
        if name not in family.classes:
            raise UnsupportedError(f"architectures {name!r} is none of {family.classes}")
    if classes[0] != family.classes[2]:
        return False
    labels = config.get("num_labels", len(config.get("id2label") or range(2)))
    if labels != 1:
        raise UnsupportedError(f"num_labels {labels}: a score is one number")
    return True


def _options(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the family under their common names, none of them unknown."""
    only, spelling = ONLY | family.only, family.spelling
    known = {*SHAPE, *family.options} - set(spelling.values()) | spelling.keys()
    for name, x in config.items():
        if name in only and x not in only[name]:
            raise UnsupportedError(f"{name} {x!r} is not supported, only {only[name][0]!r} is")
        if name not in known | HARMLESS | only.keys():
            raise UnsupportedError(
                f"{name} {x!r} is not known for {config['model_type']}: if it is sure to change "
                "nothing, remove it from config.json"
            )
    options = {**family.options, **{spelling.get(name, name): x for name, x in config.items()}}
    for name in SHAPE:
        x = options.get(name)
        if not ((type(x) is int and x > 0) or (name in family.options and x is None)):
            raise UnsupportedError(f"{name} {x!r} is no positive number")
    return options


def _sliding(family: Family, options: Mapping[str, Any]) -> list[bool]:
    """For each layer, does it have a window?"""
    layers = range(options["num_hidden_layers"])
    if family.sliding is None:
        return [False] * len(layers)
    types = options.get("layer_types")
    if types is None:
        window = options["sliding_window"] if options.get("use_sliding_window", True) else None
        return [window is not None and family.sliding(layer, options) for layer in layers]
    known = {"full_attention": False, "sliding_attention": True}
    for name in types:
        if name not in known or (known[name] and options["sliding_window"] is None):
            raise UnsupportedError(f"layer_types {name!r} is not supported here")
    return [known[name] for name in types]


def _rotary(options: Mapping[str, Any], sliding: Sequence[bool]) -> tuple[Rotary, ...] | None:
    """How the positions of each layer turn; None where the family learns positions."""
    if "rope_theta" not in options:
        return None
    new, old = options["rope_parameters"] or {}, options["rope_scaling"] or {}
    if "rope_local_base_freq" not in options:
        return (_turn("rope_scaling", old or new, options["rope_theta"], options),) * len(sliding)
    for name in new.keys() - {"full_attention", "sliding_attention"}:
        raise UnsupportedError(f"rope_parameters {name!r} is not known for layers of two kinds")
    # A layer with a window has positions of its own.
    near, far = ({**new.get(f"{kind}_attention", {})} for kind in ("sliding", "full"))
    local = _turn("rope_parameters", near, options["rope_local_base_freq"], options)
    whole = _turn("rope_parameters", far | old, options["rope_theta"], options)
    return tuple(local if slides else whole for slides in sliding)


_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def _turn(where: str, found: Mapping[str, Any], base: float, options: Mapping[str, Any]) -> Rotary:
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in _SCALINGS:
        raise UnsupportedError(f"{where} {kind!r} is none of {', '.join(_SCALINGS)}")
    share = found.get("partial_rotary_factor", options.get("partial_rotary_factor", 1.0))
    if share != 1 and "partial_rotary_factor" not in options:
        raise UnsupportedError(f"partial_rotary_factor {share} is not known for this family")
    own = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_SCALINGS[kind]}
    for name in found.keys() - own:
        raise UnsupportedError(f"{where} {name} {found[name]!r} is not known for {kind!r}")
    numbers = {"original_max_position_embeddings": options["max_position_embeddings"], **found}
    for name in _SCALINGS[kind]:
        if name not in numbers:
            raise UnsupportedError(f"{where} of {kind!r} lacks {name}")
    scaling = [numbers[name] for name in _SCALINGS[kind]]
    rescale = {"default": None, "linear": Stretched, "llama3": Llama3}[kind]
    width = options["hidden_size"] // options["num_attention_heads"]
    return Rotary(
        base=float(found.get("rope_theta", base)),
        size=None if share == 1 else int((options.get("head_dim") or width) * share),
        rescale=rescale(*scaling) if rescale else None,
    )


def _activation(family: Family, options: Mapping[str, Any]) -> Activation:
    name = _first(options, "hidden_activation", "hidden_act", "activation_function")
    if name not in family.activations:
        raise UnsupportedError(f"activation {name!r} is none of {', '.join(family.activations)}")
    return family.activations[name]


def _decided(options: Mapping[str, Any]) -> dict[str, Any]:
    """Switches that options of some families decide."""
    decided: dict[str, Any] = {}
    if "attention_bias" in options:
        decided |= {name: options["attention_bias"] for name in ("qkv_bias", "output_bias")}
    if "query_pre_attn_scalar" in options:
        decided["query_divisor"] = options["query_pre_attn_scalar"] ** 0.5
    if not options.get("scale_attn_weights", True):
        decided["query_divisor"] = 1.0
    for theirs, ours in (
        ("mlp_bias", "bias"),
        ("attn_logit_softcapping", "attention_cap"),
        ("final_logit_softcapping", "logit_cap"),
        ("use_parallel_residual", "parallel"),
    ):
        if theirs in options:
            decided[ours] = options[theirs]
    return decided


def _first(options: Mapping[str, Any], *names: str) -> Any:
    return next(options[name] for name in names if options.get(name) is not None)


def _entries(family: Family, config: DecoderConfig) -> tuple[Entry, ...]:
    """How each parameter of the decoder is stored."""
    shapes = jax.eval_shape(decoder(config).init, jax.random.key(0))
    entries = []
    for keys, leaf in jax.tree.leaves_with_path(shapes):
        path = tuple(key.key for key in keys)
        number = next(iter(re.findall(r"\d+", path[0])), "")
        names = family.names[re.sub(r"\d+", "#", "/".join(path))]
        layout = _layout(family, config, path, leaf.shape, len(names))
        names = tuple(name.replace("#", number) for name in names)
        entries.append(Entry(path, leaf.shape, names, *layout))
    return tuple(entries)


def _layout(
    family: Family, config: DecoderConfig, path: tuple[str, ...], shape: tuple[int, ...], num: int
) -> _Layout:
    if path[-1] == "embedding" or (family.untransposed and path != ("head",)):
        return _as_it_is(shape)
    if path[-2:-1] == ("qkv",) and family.by_head:
        return _by_head(shape, config.num_heads)
    heads = (config.num_heads, config.kv_heads, config.kv_heads)
    return _transposed(shape, [n * config.head_dim for n in heads] if num > 1 else shape[-1:])


def _score_head(width: int) -> Entry:
    return Entry(
        path=("head", "kernel"),
        shape=(width,),
        names=("score.weight",),
        shapes=((1, width),),
        join=lambda parts: parts[0][0],
        split=lambda kernel: [kernel[None]],
    )


class _Layout(NamedTuple):
    """How tensors hold one parameter: their shapes, the way from them, and the way back."""

    shapes: tuple[tuple[int, ...], ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], list[np.ndarray]]


def _as_it_is(shape: tuple[int, ...]) -> _Layout:
    return _Layout((shape,), lambda parts: parts[0], lambda x: [x])


def _transposed(shape: tuple[int, ...], sizes: Sequence[int]) -> _Layout:
    """Matrices [out, in] or vectors [out], one behind the other in ours [in, Σ out]."""
    ends = np.cumsum(sizes)[:-1]

    def join(parts: Sequence[np.ndarray]) -> np.ndarray:
        return parts[0].T if len(parts) == 1 else np.concatenate([p.T for p in parts], axis=-1)

    def split(x: np.ndarray) -> list[np.ndarray]:
        return [part.T for part in np.split(x, ends, axis=-1)]

    return _Layout(tuple((size, *shape[:-1]) for size in sizes), join, split)


def _by_head(shape: tuple[int, ...], num_heads: int) -> _Layout:
    """[H·3·d, in]: query, key and value of a head, then those of the next."""

    def turn(x: np.ndarray, outer: int, inner: int) -> np.ndarray:
        return x.reshape(outer, inner, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return _Layout(
        (shape[::-1],),
        lambda parts: turn(parts[0], num_heads, 3).T,
        lambda x: [turn(x.T, 3, num_heads)],
    )
