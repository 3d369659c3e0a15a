"""Finds every public function of floors 0 and 1 and makes arguments for it from its signature.

A function is known by the names of its parameters, so that one added tomorrow is tested without
anyone remembering to. A name that is not listed here fails the walk with a request to list it.
"""

import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import jax
import numpy as np

import rlhfjax

ROOMS = (
    "masked",
    "kl",
    "log_probs",
    "lm_head",
    "sampling",
    "sequences",
    "advantages",
    "losses",
)
B, T, K, V, D = 4, 6, 3, 5, 2
MASK = np.array(
    [[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0]], bool
)
GENERATOR = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return GENERATOR.normal(size=shape).astype(np.float32)


def negative(*shape: int) -> np.ndarray:
    return -np.abs(floats(*shape)) - 0.1


def positive(*shape: int) -> np.ndarray:
    return -negative(*shape)


def integers(high: int, *shape: int) -> np.ndarray:
    return GENERATOR.integers(0, high, shape).astype(np.int32)


TOKENS, ROWS = (B, T), (B,)
EITHER = (TOKENS, ROWS, ())
# What a parameter can be: the shapes to try, in this order, and what fills them.
ARRAYS: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., np.ndarray]]] = {
    **dict.fromkeys(("x", "value", "gradient", "uniform", "per_response"), (EITHER, floats)),
    **dict.fromkeys(("values", "old_values", "next_values", "baselines"), (EITHER, floats)),
    **dict.fromkeys(("rewards", "returns", "advantages", "kl"), (EITHER, floats)),
    **dict.fromkeys(("scores", "chosen_scores", "rejected_scores"), (EITHER, floats)),
    **dict.fromkeys(("first_scores", "second_scores"), (EITHER, floats)),
    **dict.fromkeys(("ratings", "differences", "log_ratios"), (EITHER, floats)),
    **dict.fromkeys(("log_probs", "old_log_probs", "ref_log_probs"), (EITHER, negative)),
    **dict.fromkeys(("chosen_log_probs", "ref_chosen_log_probs"), (EITHER, negative)),
    **dict.fromkeys(("rejected_log_probs", "ref_rejected_log_probs"), (EITHER, negative)),
    **dict.fromkeys(("chosen_log_collisions", "rejected_log_collisions"), (EITHER, negative)),
    "sampler_log_probs": (EITHER, negative),
    **dict.fromkeys(("weights", "entropies", "collisions"), (EITHER, positive)),
    "logits": (((B, T, V), (B, V)), floats),
    "ref_logits": (((B, T, V), (B, V)), floats),
    "ranked": (((B, K),), floats),
    "thresholds": (((K,),), lambda *shape: np.sort(floats(*shape))),
    "hidden": (((B, T, D),), floats),
    "ref_hidden": (((B, T, D),), floats),
    "head": (((V, D),), floats),
    "ref_head": (((V, D),), floats),
    "mean": (((),), floats),
    "ended": (EITHER, lambda *shape: integers(2, *shape).astype(bool)),
    "var": (((),), lambda: np.float32(1.5)),
    "tokens": (EITHER, partial(integers, V)),
    "responses": (EITHER, partial(integers, V)),
    "segment_ids": ((TOKENS,), lambda *shape: integers(2, *shape) + 1),
    "turn_rewards": (((B, K),), floats),
    "turn_ids": ((TOKENS,), partial(integers, K)),
    "group_ids": ((ROWS,), lambda *shape: np.array([7, 3, 3, 7], np.int32)),
    "lengths": (EITHER, lambda *shape: integers(T, *shape) + 1),
    "last": ((ROWS,), partial(integers, T)),
    "best": ((ROWS,), partial(integers, T)),
    "first": (((B, K),), partial(integers, T)),
    "second": (((B, K),), partial(integers, T)),
    "levels": ((ROWS,), partial(integers, K)),
    "labels": (EITHER, lambda *shape: integers(2, *shape).astype(bool)),
    "desirable": ((ROWS,), lambda *shape: integers(2, *shape).astype(bool)),
}
# Parameters that are no arrays: their functions are tested elsewhere, by hand.
NOT_WALKED = {"filters", "model", "moments", "terms", "derivative", "num_tokens"}
NUMBERS: dict[str, Any] = {
    "alpha": 0.5,
    "beta": 0.3,
    "buffer": 2,
    "chunk_size": 3,
    "clip_range": 0.2,
    "end_token": 1,
    "gae_lambda": 0.8,
    "gamma": 0.9,
    "high": 1.0,
    "horizon": 100.0,
    "k": 2,
    "kl_coef": 0.1,
    "label_smoothing": 0.1,
    "length": 6.0,
    "length_coef": 0.5,
    "low": -1.0,
    "margin": 0.2,
    "max_kl": 0.1,
    "max_length": 5,
    "min_length": 2,
    "num_samples": 8,
    "num_segments": 2,
    "num_steps": 2,
    "p": 0.7,
    "pad_token": 0,
    "penalty": 1.5,
    "quantile": 0.5,
    "reward_shift": 0.1,
    "size": T,
    "step": 1,
    "stop_token": 2,
    "target": 6.0,
    "temperature": 0.7,
    "total": 12.0,
    "wanted": 1,
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A public function with arguments that it accepts."""

    name: str
    function: Callable[..., Any]
    arrays: dict[str, np.ndarray]
    numbers: dict[str, Any]

    def __str__(self) -> str:
        return self.name

    def __call__(self, arrays: dict[str, Any], **options: Any) -> Any:
        return self.function(**arrays, **{**self.numbers, **options})

    @property
    def masks(self) -> list[str]:
        return [name for name in self.arrays if is_mask(name)]


def is_mask(name: str) -> bool:
    return name == "mask" or name.endswith("_mask")


def modules() -> Iterator[ModuleType]:
    for room in ROOMS:
        module = importlib.import_module(f"rlhfjax.{room}")
        yield module
        for part in pkgutil.iter_modules(getattr(module, "__path__", []), f"{module.__name__}."):
            if not part.name.rsplit(".", 1)[-1].startswith("_"):
                yield importlib.import_module(part.name)


def functions() -> dict[str, Callable[..., Any]]:
    """Every public function, by its name without the package's."""
    return {
        f"{module.__name__}.{name}".removeprefix(f"{rlhfjax.__name__}."): function
        for module in modules()
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
        and not name.startswith("_")
        and not NOT_WALKED & inspect.signature(function).parameters.keys()
    }


def subject(name: str, function: Callable[..., Any]) -> Subject:
    """The function with the first arguments, of the shapes listed for their names, that fit."""
    parameters = inspect.signature(function).parameters.values()
    wanted = [p for p in parameters if p.default is inspect.Parameter.empty or is_mask(p.name)]
    numbers = {p.name: NUMBERS[p.name] for p in wanted if p.name in NUMBERS}
    arrays = [p.name for p in wanted if p.name not in numbers]
    unknown = [entry for entry in arrays if entry not in ARRAYS and not is_mask(entry)]
    assert not unknown, f"{name}: say in tests/catalogue.py what {unknown} can be"
    reasons = []
    for mask in (MASK, MASK.any(-1), MASK[:, :K]):
        choices = [[mask.shape] if is_mask(entry) else ARRAYS[entry][0] for entry in arrays]
        for shapes in itertools.product(*choices):
            made = {
                entry: mask if is_mask(entry) else ARRAYS[entry][1](*shape)
                for entry, shape in zip(arrays, shapes, strict=True)
            }
            found = Subject(name, function, made, numbers)
            try:
                jax.eval_shape(found, found.arrays)
            except (AssertionError, TypeError, ValueError, IndexError) as error:
                reasons.append(f"{shapes}: {error}"[:200])
                continue
            return found
    raise AssertionError(
        f"{name} accepts no arguments of the listed shapes:\n" + "\n".join(reasons)
    )
