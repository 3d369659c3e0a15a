"""Models in the Hugging Face layout: from a directory to functions and parameters, and back."""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from rlhfjax import models, sharding
from rlhfjax.checkpoint.together import error_of, failure_anywhere
from rlhfjax.models.lora import Adapters
from rlhfjax.pretrained import peft, reading, writing
from rlhfjax.pretrained.families import (
    Architecture,
    UnsupportedError,
    architecture,
    config_json,
)
from rlhfjax.pretrained.reading import CONFIG, DirectoryError
from rlhfjax.pretrained.tensors import Entry
from rlhfjax.pretrained.tokenizer import (
    FILES,
    GENERATION,
    TOKENIZER,
    Tokenizer,
    chat_template,
    tokenizer,
)
from rlhfjax.types import LanguageModel, Params, ScalarModel

Model = TypeVar("Model")
SHARD = 5_000_000_000


class Pretrained(NamedTuple, Generic[Model]):
    """What a model directory holds.

    Attributes:
      model: a `LanguageModel` or a `ScalarModel`.
      params: its parameters; those of a scalar model are `{"backbone", "head"}`.
      tokenizer: None where the directory has none.
      chat_template: Jinja source, or None.
      config: the parsed `config.json`.
      architecture: what was made of it.
      files: name → content of what goes along unchanged when the model is saved.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer | None
    chat_template: str | None
    config: dict[str, Any]
    architecture: Architecture
    files: Mapping[str, bytes]


def load(
    directory: Path | str,
    *,
    adapter: Path | str | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    remat: bool = False,
) -> Pretrained[LanguageModel]:
    """A language model from a directory in the Hugging Face layout.

    All names, shapes and sizes are checked before a tensor is read; then one parameter at a time
    is read, cast and put where it belongs. No pickle is opened and no code of the model's is run.

    An adapter in PEFT's format is merged as the matrices are read. A tokenizer that lies beside it
    goes before that of the model.

    Args:
      directory: with `config.json`, safetensors and, if there is a tokenizer, `tokenizer.json`; or
        of an adapter that says where its model is.
      adapter: directory of an adapter on it.
      mesh: the devices; None for the default device.
      rules: see `sharding.shardings`.
      dtype: of the computation.
      param_dtype: of the parameters; None means `dtype`.
      remat: see `DecoderConfig`.

    Returns:
      the model, its parameters and what belongs to them.

    Raises:
      DirectoryError: a file is not as it should be; it says which one, and which tensor.
      UnsupportedError: `config.json` asks for what the decoder does not have.
      ImportError: there is a tokenizer and `tokenizers` is not installed.
    """
    base, adapters = _parts(directory, adapter)
    opened = _open(base, adapters, dtype, remat)
    known = opened.architecture
    if known.head is not None:
        raise DirectoryError(
            f"{base / CONFIG}: a reward model, which gives scores and has no LM head: give the "
            "directory of a language model"
        )
    places = _Places(mesh, rules, dtype if param_dtype is None else param_dtype)
    changes = _changes(adapters, known).adapters
    params = _read(base, known.entries, known.ignored, changes, places)
    return opened._replace(model=models.decoder(known.config), params=params)


def load_scalar(
    directory: Path | str,
    *,
    adapter: Path | str | None = None,
    key: Array | None = None,
    stddev: float | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    remat: bool = False,
) -> Pretrained[ScalarModel]:
    """A reward model or value function from a directory in the Hugging Face layout.

    The directory of a `…ForSequenceClassification` with one label has a head, and so has an adapter
    of a reward model; on the states of a language model a fresh one is put.

    Args:
      directory: as for `load`.
      adapter: likewise.
      key: of a fresh head; needed where the directory has none, and used nowhere else.
      stddev: of a fresh head; None means 1/√(D + 1). A value function begins with 0.
      mesh: as for `load`.
      rules: likewise; paths begin with "backbone" or "head".
      dtype: likewise.
      param_dtype: likewise.
      remat: likewise.

    Returns:
      the model, its parameters `{"backbone", "head": {"kernel"}}` and what belongs to them; the
      score of a sequence is `models.last_value` of its values.

    Raises:
      ValueError: the directory has no head and there is no key.
      DirectoryError, UnsupportedError, ImportError: as for `load`.
    """
    base, adapters = _parts(directory, adapter)
    opened = _open(base, adapters, dtype, remat)
    known = _with_scores(opened)
    changes = _changes(adapters, known)
    stored = opened.architecture.head is not None
    fresh = changes.head is None and not stored
    if fresh and key is None:
        raise ValueError(
            f"{directory} holds a language model, without a head for scores: give the directory of "
            "a reward model, or load_scalar a key for a fresh head"
        )
    head = score_head(known.config.width, stddev=stddev)
    places = _Places(mesh, rules, dtype if param_dtype is None else param_dtype)
    entries = _scalar_entries(known)
    of_backbone = {f"backbone/{name}": adapter for name, adapter in changes.adapters.items()}
    wanted = entries if stored else entries[:-1]
    params = _read(base, wanted, known.ignored, of_backbone, places)
    if changes.head is not None:
        kernel = np.asarray(changes.head["kernel"], places.dtype)
        params["head"] = {"kernel": _put(kernel, *places.of(entries[-1:]))}
    elif key is not None and fresh:
        params |= places.born(lambda key: {"head": head.init(key)}, key)
    model = models.scalar_model(models.decoder(known.config), head)
    return opened._replace(model=model, params=params, architecture=known)


def gives_scores(directory: Path | str, *, adapter: Path | str | None = None) -> bool:
    """Is it a reward model or value function, which `load_scalar` reads without a key?

    Args:
      directory: as for `load`.
      adapter: likewise.

    Returns:
      whether it has a head for scores.

    Raises:
      DirectoryError, UnsupportedError: as for `load`.
    """
    base, adapters = _parts(directory, adapter)
    opened = _open(base, [], jnp.float32, remat=False)
    return opened.architecture.head is not None or any(map(peft.has_head, adapters))


def init(
    key: Array,
    config: dict[str, Any],
    *,
    files: Mapping[str, bytes] | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike | None = None,
    remat: bool = False,
) -> Pretrained[LanguageModel]:
    """A language model that nobody has trained, of a shape that `load` could have read.

    Args:
      key: of the parameters.
      config: what `config.json` will say.
      files: name → content of the tokenizer's files, such as "tokenizer.json".
      mesh: as for `load`.
      rules: likewise.
      dtype: likewise.
      param_dtype: likewise.
      remat: likewise.

    Returns:
      as `load`.

    Raises:
      DirectoryError, UnsupportedError, ImportError: as for `load`.
    """
    opened = _described("the new model", config, files or {}, dtype, remat)
    model = models.decoder(opened.architecture.config)
    places = _Places(mesh, rules, dtype if param_dtype is None else param_dtype)
    return opened._replace(model=model, params=places.born(model.init, key))


def score_head(width: int, *, stddev: float | None = None) -> models.ScalarHead:
    """w·h, with w ~ Normal(0, stddev²): `models.linear_head` without a bias, as in transformers.

    Args:
      width: D.
      stddev: None means 1/√(D + 1).

    Returns:
      a `ScalarHead` with parameters `{"kernel": [D]}`.
    """
    stddev = 1 / math.sqrt(width + 1) if stddev is None else stddev

    def initialise(key: Array) -> Params:
        return {"kernel": stddev * jax.random.normal(key, (width,))}

    def apply(params: Params, hidden: Array) -> Array:
        return hidden.astype(jnp.float32) @ params["kernel"]

    return models.ScalarHead(initialise, apply)


def save(
    directory: Path | str,
    pretrained: Pretrained[Any],
    params: Params,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
) -> None:
    """Writes a language model so that `load`, transformers and others read it.

    The directory is whole and on the disk when this returns, or not there. With several processes
    all make the call, and the first one writes what it gathers, one parameter at a time.

    Args:
      directory: a new or an empty one.
      pretrained: as `load` or `init` returned it, for all but the parameters.
      params: the parameters.
      dtype: of the files; None for that of each parameter.
      max_shard_bytes: of one file; what is larger is divided into several.
      overwrite: the model directory that is there goes when the new one is whole.

    Raises:
      FileExistsError: something is there.
      ValueError: the parameters are not those of the architecture, or of no floating dtype.
    """
    known = pretrained.architecture
    config = config_json(pretrained.config, scalar=False)
    options = _Options(dtype, max_shard_bytes, overwrite)
    _write(Path(directory), known.entries, params, config, pretrained.files, options)


def save_scalar(
    directory: Path | str,
    pretrained: Pretrained[Any],
    params: Params,
    *,
    pad_token: int | None = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD,
    overwrite: bool = False,
) -> None:
    """Writes a reward model or value function as a `…ForSequenceClassification` of one label.

    transformers reads the score at the last token that is not `pad_token`, `models.last_value` at
    the last one that the mask calls real: the same, unless a text ends with a real `pad_token`.

    Args:
      directory: a new or an empty one.
      pretrained: as `load_scalar` returned it, or `load` for the language model beneath.
      params: `{"backbone", "head"}`.
      pad_token: what pads in transformers; None for that of the tokenizer.
      dtype: as for `save`.
      max_shard_bytes: likewise.
      overwrite: likewise.

    Raises:
      FileExistsError: something is there.
      ValueError: the parameters are not those of the architecture; the head has a bias, for which
        the layout has no place; nobody says which token pads.
    """
    if pad_token is None:
        if pretrained.tokenizer is None:
            raise ValueError("without a tokenizer, pad_token says where transformers finds scores")
        pad_token = pretrained.tokenizer.pad_token
        if pad_token in pretrained.tokenizer.end_tokens:
            warnings.warn(
                f"{directory}: the end token pads, so that transformers will read the score of a "
                "text that ends with it one token before it",
                stacklevel=2,
            )
    backbone, head = dict(params["backbone"]), writing.without_bias(params["head"], directory)
    backbone.pop("head", None)
    config = config_json(pretrained.config, scalar=True) | {"pad_token_id": int(pad_token)}
    _write(
        Path(directory),
        _scalar_entries(_with_scores(pretrained)),
        {"backbone": backbone, "head": head},
        config,
        pretrained.files,
        _Options(dtype, max_shard_bytes, overwrite),
    )


def _parts(directory: Path | str, adapter: Path | str | None) -> tuple[Path, list[Path]]:
    """The directory of the model, and those of the adapters on it."""
    directory = Path(directory)
    adapters = [] if adapter is None else [Path(adapter)]
    if not peft.is_adapter(directory):
        return directory, adapters
    return peft.base_of(directory), [directory, *adapters]


def _open(
    directory: Path, adapters: Sequence[Path], dtype: DTypeLike, remat: bool
) -> Pretrained[Any]:
    """All that is in directories but the parameters."""
    config, content = reading.config(directory), _content(directory)
    for own in map(_content, adapters):
        if TOKENIZER in own:  # of two tokenizers no file goes with those of the other
            content = {name: content[name] for name in (GENERATION,) if name in content} | own
    return _described(str(directory), config, content, dtype, remat)


def _content(directory: Path) -> dict[str, bytes]:
    files = {name: directory / name for name in FILES}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def _changes(adapters: Sequence[Path], known: Architecture) -> peft.Loaded:
    """What adapters change together."""
    return peft.added(*(peft.load(directory, known) for directory in adapters))


def _described(
    where: str, config: dict[str, Any], files: Mapping[str, bytes], dtype: DTypeLike, remat: bool
) -> Pretrained[Any]:
    try:
        known = architecture(config, dtype=dtype, remat=remat)
    except UnsupportedError as error:
        raise UnsupportedError(f"{where}/{CONFIG}: {error}") from None
    return Pretrained(
        model=None,
        params=None,
        tokenizer=tokenizer(files, config, where=where),
        chat_template=chat_template(files, where=where),
        config=config,
        architecture=known,
        files=files,
    )


def _with_scores(opened: Pretrained[Any]) -> Architecture:
    """The same states under a head for scores."""
    config, own = config_json(opened.config, scalar=True), opened.architecture.config
    return architecture(config, dtype=own.dtype, remat=own.remat)


def _scalar_entries(known: Architecture) -> list[Entry]:
    assert known.head is not None
    backbone = [entry._replace(path=("backbone", *entry.path)) for entry in known.entries]
    return [*backbone, known.head]


class _Places(NamedTuple):
    """Where parameters go, and as what."""

    mesh: Mesh | None
    rules: sharding.Rules
    dtype: DTypeLike

    def born(self, function: Callable[[Array], Params], key: Array) -> Params:
        def cast(key: Array) -> Params:
            return jax.tree.map(lambda x: x.astype(self.dtype), function(key))

        if self.mesh is None:
            return jax.jit(cast)(key)
        return sharding.init(cast, self.mesh, self.rules)(key)

    def of(self, entries: Sequence[Entry]) -> list[jax.sharding.Sharding | None]:
        if self.mesh is None:
            return [None] * len(entries)
        shapes = {e.path: jax.ShapeDtypeStruct(e.shape, self.dtype) for e in entries}
        places = sharding.shardings(_nested(shapes), self.mesh, self.rules)
        return [reduce(getitem, entry.path, places) for entry in entries]


def _read(
    directory: Path,
    entries: Sequence[Entry],
    ignored: Sequence[str],
    changes: Adapters,
    places: _Places,
) -> Params:
    claimed = reading.claim(entries, reading.tensors(directory), ignored, directory)
    arrays = {}
    for entry, place in zip(entries, places.of(entries), strict=True):
        parts = (reading.read(claimed[name], places.dtype) for name in entry.names)
        change = changes.get("/".join(entry.path).removesuffix("/kernel"))
        # No name for it, so that it is gone before the next one is read.
        arrays[entry.path] = _put(_changed(entry.join(list(parts)), change), place)
        # jax keeps what it copied from until it looks for garbage.
        gc.collect(0)
    return _nested(arrays)


def _changed(host: np.ndarray, change: Mapping[str, Any] | None) -> np.ndarray:
    return host if change is None else (host + change["a"] @ change["b"]).astype(host.dtype)


def _put(host: np.ndarray, place: jax.sharding.Sharding | None) -> Array:
    if place is None:
        return jax.device_put(host).block_until_ready()
    array = jax.make_array_from_callback(host.shape, place, lambda index: host[index])
    return array.block_until_ready()


def _nested(leaves: Mapping[tuple[str, ...], Any]) -> Params:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        branch = reduce(lambda branch, name: branch.setdefault(name, {}), path[:-1], tree)
        branch[path[-1]] = leaf
    return tree


class _Options(NamedTuple):
    """How a directory is written."""

    dtype: DTypeLike | None
    max_shard_bytes: int
    overwrite: bool


def _write(
    directory: Path,
    entries: Sequence[Entry],
    params: Params,
    config: dict[str, Any],
    files: Mapping[str, bytes],
    options: _Options,
) -> None:
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    _same_parameters(entries, arrays)
    plan = []
    for entry in entries:
        own = arrays["/".join(entry.path)].dtype
        dtype = np.dtype(own if options.dtype is None else options.dtype)
        for name, shape in zip(entry.names, entry.shapes, strict=True):
            plan.append(writing.Planned(name, dtype, shape))
    for tensor in plan:
        if tensor.dtype not in writing.NAMES:
            raise ValueError(f"{tensor.name} is {tensor.dtype}: give a floating dtype to save as")
    config = config | {"dtype": plan[0].dtype.name, "torch_dtype": plan[0].dtype.name}

    def gathered() -> Iterator[np.ndarray]:
        for entry in entries:
            yield from entry.split(writing.whole(arrays["/".join(entry.path)]))

    theirs = gathered()

    def fill() -> None:
        with writing.new_directory(directory, overwrite=options.overwrite) as folder:
            writing.write_tensors(folder, plan, theirs, max_shard_bytes=options.max_shard_bytes)
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name, content in files.items():
                (folder / name).write_bytes(content)

    error = error_of(fill) if jax.process_index() == 0 else None
    # The other processes gather with the first one, and so it goes on where it could not write.
    for _ in theirs:
        pass
    failed = failure_anywhere(error)
    if error is not None:
        raise error
    if failed:
        raise OSError(f"{directory}: the first process could not write it: {failed}")


def _same_parameters(entries: Sequence[Entry], arrays: Mapping[str, Any]) -> None:
    wanted = {"/".join(entry.path): entry.shape for entry in entries}
    for name in sorted(wanted.keys() | arrays.keys()):
        found = arrays[name].shape if name in arrays else "missing"
        if found != wanted.get(name):
            raise ValueError(
                f"{name} is {found} in the parameters and {wanted.get(name, 'missing')} in the "
                "architecture: save those of this model, with adapters merged"
            )
