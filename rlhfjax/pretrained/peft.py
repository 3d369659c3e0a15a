"""Adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`.

There an adapter belongs to one matrix of theirs. Of a matrix of ours that joins several of theirs,
each gets the same A and its own part of B; on the way back theirs become one of the sum of their
ranks, each with its columns of A and its part of B, unless they share A: then it is as it was.
That of a reward model comes with the head for scores, which is trained with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhfjax.checkpoint.together import on_first
from rlhfjax.data import hub
from rlhfjax.models.lora import Adapters
from rlhfjax.pretrained import reading, writing
from rlhfjax.pretrained.families import Architecture, UnsupportedError
from rlhfjax.pretrained.reading import DirectoryError, Stored
from rlhfjax.pretrained.tensors import Entry
from rlhfjax.types import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Loaded(NamedTuple):
    """What a directory of PEFT holds.

    Attributes:
      adapters: for `models.lora`, of the backbone where the model gives scores.
      scale: α / r.
      head: of a reward model, `{"kernel": [D]}`, in place of that of the base; or None.
    """

    adapters: Adapters
    scale: float
    head: Params | None = None


# Options that change nothing, or are used below.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# PEFT names both in an adapter of a reward model, whichever the model has.
_HEADS = ("classifier", "score")
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others begin with another base than that of the directory.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}


def save(
    directory: Path | str,
    adapters: Adapters,
    architecture: Architecture,
    *,
    scale: float,
    head: Params | None = None,
    base: str | None = None,
    files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes adapters so that PEFT loads them on the model that they belong to.

    With several processes all make the call, and the first one writes.

    Args:
      directory: a new or an empty one.
      adapters: of projections of the decoder.
      architecture: of the base.
      scale: as in `lora.merge`.
      head: that was trained with them, `{"kernel": [D]}`: they are those of a reward model, and the
        architecture is that of `load_scalar`.
      base: directory or name of the base, which PEFT's `AutoPeftModel` looks for.
      files: name → content of what lies beside the adapters, such as the tokenizer of the base:
        `Pretrained.files`.
      overwrite: the adapters that are there go when the new ones are whole.

    Raises:
      FileExistsError: something is there.
      ValueError: an adapter belongs to no projection, or the head to no architecture.
    """
    entries = _projections(architecture)
    task = "CAUSAL_LM" if architecture.head is None else None
    tensors: dict[str, np.ndarray] = {}
    heads = []
    if head is not None:
        if architecture.head is None:
            raise ValueError(f"{directory}: the architecture has no head: take it of load_scalar")
        kernel = writing.whole(writing.without_bias(head, directory)["kernel"]).astype(np.float32)
        task, heads = "SEQ_CLS", _modules(architecture.head)
        tensors = {f"{PREFIX}{heads[0]}.weight": architecture.head.split(kernel)[0]}
    ranks: dict[str, int] = {}
    for name, adapter in adapters.items():
        if name not in entries:
            raise ValueError(f"there is no projection {name!r} among {', '.join(entries)}")
        a, b = (writing.whole(adapter[part]).astype(np.float32) for part in ("a", "b"))
        entry = entries[name]
        parts = [b.T] if architecture.untransposed else entry.split(b)
        for module, part in zip(_modules(entry), parts, strict=True):
            tensors |= {f"{PREFIX}{module}.lora_A.weight": a.T}
            tensors |= {f"{PREFIX}{module}.lora_B.weight": part}
            ranks[module] = a.shape[1]
    rank = max(ranks.values())
    others = {re.escape(module): r for module, r in ranks.items() if r != rank}
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "modules_to_save": heads or None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": scale * rank,
        "rank_pattern": others,
        "alpha_pattern": {module: scale * r for module, r in others.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": architecture.untransposed,
    }
    plan = [writing.Planned(name, x.dtype, x.shape) for name, x in tensors.items()]

    def fill() -> None:
        with writing.new_directory(Path(directory), overwrite=overwrite, config=CONFIG) as folder:
            writing.write_file(folder / TENSORS, plan, iter(tensors.values()))
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name, content in (files or {}).items():
                (folder / name).write_bytes(content)

    failed = on_first(fill)
    if failed is not None:
        raise failed


def load(directory: Path | str, architecture: Architecture) -> Loaded:
    """Reads adapters that PEFT, or `save`, has written.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      architecture: of the base; with a head, as of `load_scalar`, for those of a reward model.

    Returns:
      adapters, their scale, and the head where they have one.

    Raises:
      DirectoryError: a file is not as it should be, or a tensor belongs to no projection.
      UnsupportedError: an option would change the result and is not supported.
    """
    directory = Path(directory)
    config = reading.json_of(directory / CONFIG)
    _check(config, directory / CONFIG)
    trained = config.get("modules_to_save")
    if trained and architecture.head is None:
        raise DirectoryError(
            f"{directory / CONFIG}: the adapter of a reward model, which gives scores and no "
            "tokens: give that of a language model"
        )
    file = directory / TENSORS
    if not file.is_file():
        raise DirectoryError(f"{file}: no such file")
    stored = reading.header(file)
    scale = _scale(config, "", config["r"])
    adapters, head = {}, None
    if trained and architecture.head is not None:
        name, shape = PREFIX + architecture.head.names[0], architecture.head.shapes[0]
        kernel = architecture.head.join([_taken(stored, name, shape, file=file)])
        head = {"kernel": jnp.asarray(kernel)}
    for name, entry in _projections(architecture).items():
        found = {}
        for module, shape in zip(_modules(entry), entry.shapes, strict=True):
            sizes = shape if architecture.untransposed else shape[::-1]
            pair = _pair(stored, module, *sizes, file=file)
            if pair is not None:
                a, b = pair
                found[module] = a, b * np.float32(_scale(config, module, len(a)) / scale)
        if found:
            a, b = _joined(entry, found, untransposed=architecture.untransposed)
            adapters[name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    for tensor in stored:
        raise DirectoryError(f"{file}: {tensor} belongs to no projection of the model")
    return Loaded(adapters, scale, head)


def added(*several: Loaded) -> Loaded:
    """Adapters that change a matrix as several do together: scale·a·b is Σ scaleᵢ·aᵢ·bᵢ.

    With several processes all make the call.

    Args:
      *several: of one model, in the order in which they were trained.

    Returns:
      adapters of the sum of their ranks, exactly, at scale 1, and the last head; of none, none.
    """
    adapters: dict[str, Any] = {}
    for name in dict.fromkeys(name for one in several for name in one.adapters):
        parts = [(one.adapters[name], one.scale) for one in several if name in one.adapters]
        a = [writing.whole(adapter["a"]) for adapter, _ in parts]
        b = [scale * writing.whole(adapter["b"]) for adapter, scale in parts]
        adapters[name] = {"a": np.concatenate(a, axis=1), "b": np.concatenate(b, axis=0)}
    heads = [one.head for one in several if one.head is not None]
    return Loaded(adapters, 1.0, heads[-1] if heads else None)


def pattern_of(architecture: Architecture, modules: Sequence[str]) -> str:
    """The pattern for `lora.init` that finds the projections of PEFT's `target_modules`.

    Args:
      architecture: of the base.
      modules: last parts of their names, such as "q_proj", or "all-linear". Where q, k and v are
        one matrix, it is found by any of them.

    Returns:
      a regular expression.

    Raises:
      ValueError: a module that the model does not have; it names those that it has.
    """
    projections = _projections(architecture)
    names = {
        module.rpartition(".")[2] for entry in projections.values() for module in _modules(entry)
    }
    wanted = names if "all-linear" in modules else set(modules)
    if unknown := wanted - names:
        raise ValueError(
            f"there is no module {', '.join(sorted(unknown))}: choose of "
            f"{', '.join(sorted(names))}, or all-linear"
        )
    found = [
        path
        for path, entry in projections.items()
        if wanted & {module.rpartition(".")[2] for module in _modules(entry)}
    ]
    return f"^({'|'.join(map(re.escape, found))})$"


def is_adapter(directory: Path | str) -> bool:
    """Does it hold an adapter, and no model?"""
    directory = Path(directory)
    return (directory / CONFIG).is_file() and not (directory / reading.CONFIG).is_file()


def has_head(directory: Path | str) -> bool:
    """Is its adapter one of a reward model, with a head for scores?"""
    return bool(reading.json_of(Path(directory) / CONFIG).get("modules_to_save"))


def base_of(directory: Path | str) -> Path:
    """The directory of the model that adapters belong to.

    Args:
      directory: with `adapter_config.json`.

    Returns:
      as it says.

    Raises:
      DirectoryError: it does not say, or there is no such directory.
    """
    file = Path(directory) / CONFIG
    base = reading.json_of(file).get("base_model_name_or_path")
    if base is None or not Path(base).is_dir():
        raise DirectoryError(
            f"{file}: its base {base!r} is no directory here: write there where it is"
            + hub.advice(base or "", "model")
        )
    return Path(base)


def _projections(architecture: Architecture) -> dict[str, Entry]:
    """Path of an adapter → the kernel that it belongs to."""
    entries = (entry for entry in architecture.entries if entry.path[-1] == "kernel")
    return {"/".join(entry.path[:-1]): entry for entry in entries}


def _modules(entry: Entry) -> list[str]:
    return [name.removesuffix(".weight") for name in entry.names]


def _check(config: Mapping[str, Any], file: Path) -> None:
    for name, only in _ONLY.items():
        if config.get(name, only[0]) not in only:
            raise UnsupportedError(f"{file}: {name} {config[name]!r} is none of {only}")
    for name, x in config.items():
        # What is new in PEFT is off unless it is asked for.
        if x and name not in _KNOWN | _ONLY.keys():
            raise UnsupportedError(f"{file}: {name} {x!r} is not supported")
    trained = config.get("modules_to_save") or []
    if not isinstance(trained, list) or any(module not in _HEADS for module in trained):
        raise UnsupportedError(
            f"{file}: modules_to_save {trained!r} is not supported, but for the head of a reward "
            f"model, {_HEADS[1]!r}"
        )
    for name in ("r", "lora_alpha"):
        if type(config.get(name)) not in (int, float) or not config[name] > 0:
            raise UnsupportedError(f"{file}: {name} {config.get(name)!r} is no positive number")


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """α / r of a module, or α / √r."""
    alphas = config.get("alpha_pattern") or {}
    fits = (x for pattern, x in alphas.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(fits, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _pair(
    stored: dict[str, Stored], module: str, inputs: int, outputs: int, *, file: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """A [r, in] and B [out, r] of a module, which then are no longer in `stored`."""
    names = [f"{PREFIX}{module}.lora_{part}.weight" for part in "AB"]
    found = [stored[name].shape for name in names if name in stored]
    if not found:
        return None
    rank = found[0][0] if found[0] else 0
    shapes = (rank, inputs), (outputs, rank)
    a, b = (_taken(stored, *both, file=file) for both in zip(names, shapes, strict=True))
    return a, b


def _taken(
    stored: dict[str, Stored], name: str, shape: tuple[int, ...], *, file: Path
) -> np.ndarray:
    """The numbers of a tensor, which then is no longer in `stored`."""
    if name not in stored:
        raise DirectoryError(f"{file}: {name} is missing")
    tensor = stored.pop(name)
    if tensor.dtype not in reading.FLOATING:
        raise DirectoryError(f"{file}: {name} is {tensor.dtype}, and cannot be trained")
    if tensor.shape != shape:
        raise DirectoryError(
            f"{file}: {name} has the shape {list(tensor.shape)}, not {list(shape)}"
        )
    return reading.read(tensor, jnp.float32)


def _joined(
    entry: Entry, found: Mapping[str, tuple[np.ndarray, np.ndarray]], *, untransposed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """a [in, r] and b [r, out] of our matrix."""
    modules = _modules(entry)
    first = next(iter(found.values()))[0]
    if len(found) == len(modules) and all(np.array_equal(a, first) for a, _ in found.values()):
        a, parts = first, [found[module][1] for module in modules]
    else:
        a = np.concatenate([found[module][0] for module in modules if module in found])
        parts, before = [], 0
        for module, shape in zip(modules, entry.shapes, strict=True):
            part = np.zeros((shape[0], len(a)), np.float32)
            if module in found:
                b = found[module][1]
                part[:, before : before + b.shape[1]] = b
                before += b.shape[1]
            parts.append(part)
    return a.T, parts[0].T if untransposed else entry.join(parts)
