"""Low-rank adapters as a tree of their own, for any model whose parameters hold matrices.

An adapter belongs to a matrix W [in, out] and stands for scale·a·b. Adapters are a dictionary from
the path of the matrix, such as "layers_0/qkv" (a last "kernel" is left out), to
`{"a": [in, r], "b": [r, out]}`: nothing but what is trained, so it can be differentiated, optimised
and vmapped by itself. The reference policy costs no parameters: it is the base without adapters.

```python
policy = models.decoder(config)
adapters = lora.init(key, base, rank=8, pattern=r"/(qkv|output)$")
reference = lora.nothing(adapters)

@partial(jax.jit, donate_argnums=0)
def step(state, base, batch):
    adapted = lora.on(policy, base, combine=partial(lora.beside, scale=2.0))
    return dpo.make_step(adapted, optimizer)(state, batch, reference, dpo.Hyperparameters())

state = dpo.init(adapters, optimizer)
state, metrics = step(state, base, batch)
```

References:
  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rlhfjax.types import LanguageModel, Params

Adapters = dict[str, dict[str, Array]]


def init(key: Array, params: Params, *, rank: int, pattern: str) -> Adapters:
    """Adapters that change nothing yet: a ~ Uniform(-1/√in, 1/√in) and b = 0.

    Args:
      key: a typed key; consumed.
      params: of the base, or their shapes.
      rank: r.
      pattern: a regular expression that is searched for in the paths of all matrices.

    Returns:
      adapters of the matrices that it is found in, float32.

    Raises:
      ValueError: it is found in none.

    References:
      The distribution is that of PEFT (`init_lora_weights=True`).
    """
    matrices = {name: leaf.shape for name, leaf in _named(params) if len(leaf.shape) == 2}
    chosen = {name: shape for name, shape in matrices.items() if re.search(pattern, name)}
    if not chosen:
        raise ValueError(f"{pattern!r} is found in none of {', '.join(matrices)}")

    def adapter(key: Array, shape: tuple[int, int]) -> dict[str, Array]:
        a = jax.random.uniform(key, (shape[0], rank), minval=-1.0) / math.sqrt(shape[0])
        return {"a": a, "b": jnp.zeros((rank, shape[1]))}

    keys = jax.random.split(key, len(chosen))
    return {name: adapter(*both) for name, *both in zip(chosen, keys, chosen.values(), strict=True)}


def nothing(adapters: Adapters) -> Adapters:
    """Adapters of zero: the base as it is, for example as the reference policy.

    Args:
      adapters: any.

    Returns:
      zeros of the same shapes.
    """
    return jax.tree.map(jnp.zeros_like, adapters)


def merge(params: Params, adapters: Adapters, *, scale: float | Array) -> Params:
    """W + scale·a·b, for every adapter.

    Args:
      params: of the base.
      adapters: of any of its matrices.
      scale: α / r in the terms of the paper.

    Returns:
      parameters of the structure of the base, which any function of them takes.

    Raises:
      ValueError: an adapter belongs to no matrix.
    """
    _all_known(adapters, (name for name, _ in _named(params)))

    def merged(path: Any, x: Array) -> Array:
        if (name := _name(path)) not in adapters:
            return x
        a, b = adapters[name]["a"], adapters[name]["b"]
        return (x + scale * (a @ b)).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(merged, params)


def beside(params: Params, adapters: Adapters, *, scale: float | Array) -> Params:
    """The parameters with `lora_a` and scale·`lora_b` next to each `kernel` that has an adapter.

    For the built-in decoder, whose projections add (x·a)·b: W + a·b is never built.

    Args:
      params: of the base, nested dictionaries.
      adapters: of any of its kernels.
      scale: as in `merge`.

    Returns:
      the parameters, for the functions of the same model.

    Raises:
      ValueError: an adapter belongs to no kernel.
    """
    ends = "/kernel"
    paths = (jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in _leaves(params))
    _all_known(adapters, (path.removesuffix(ends) for path in paths if path.endswith(ends)))

    def attach(branch: Any, name: str) -> Any:
        if not isinstance(branch, Mapping):
            return branch
        grown = {key: attach(x, f"{name}/{key}".lstrip("/")) for key, x in branch.items()}
        if name in adapters:
            grown |= {"lora_a": adapters[name]["a"], "lora_b": scale * adapters[name]["b"]}
        return grown

    return attach(params, "")


def on(
    model: LanguageModel, base: Params, *, combine: Callable[[Params, Adapters], Params]
) -> LanguageModel:
    """The model as a function of its adapters alone.

    It closes over the base, so make it inside of the function that is compiled, from a base that
    is an argument there: so the base is no constant of the program, and in no state.

    Args:
      model: any language model, for `beside` the built-in one.
      base: its parameters.
      combine: `(base, adapters) -> params`, such as `partial(lora.merge, scale=2.0)`.

    Returns:
      a `LanguageModel` whose parameters are adapters. They come from `lora.init`; its own `init`
      refuses.
    """

    def of_adapters(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda adapters, *args, **kw: function(combine(base, adapters), *args, **kw)

    def refuse(key: Array) -> Params:
        raise TypeError("adapters come from lora.init, which needs a rank and a pattern")

    return model._replace(
        init=refuse,
        hidden=of_adapters(model.hidden),
        prefill=of_adapters(model.prefill),
        decode=of_adapters(model.decode),
        logits=of_adapters(model.logits),
        extend=None if model.extend is None else of_adapters(model.extend),
    )


def _leaves(params: Params) -> list[tuple[Any, Array]]:
    return jax.tree.leaves_with_path(params)


def _named(params: Params) -> list[tuple[str, Array]]:
    return [(_name(path), leaf) for path, leaf in _leaves(params)]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/kernel")


def _all_known(adapters: Adapters, names: Iterable[str]) -> None:
    known = list(names)
    for name in adapters:
        if name not in known:
            raise ValueError(f"there is no matrix {name!r} for an adapter among {', '.join(known)}")
