"""RLHF as pure JAX functions: from rollout to update in one compiled program."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhfjax import (
        advantages,
        algorithms,
        checkpoint,
        data,
        feedback,
        kl,
        lm_head,
        log_probs,
        losses,
        masked,
        models,
        pretrained,
        rewards,
        rollout,
        sampling,
        sequences,
        sharding,
        stopping,
        tasks,
        tools,
        types,
    )

__version__ = "0.1.0"

__all__ = [
    "advantages",
    "algorithms",
    "checkpoint",
    "data",
    "feedback",
    "kl",
    "lm_head",
    "log_probs",
    "losses",
    "masked",
    "models",
    "pretrained",
    "rewards",
    "rollout",
    "sampling",
    "sequences",
    "sharding",
    "stopping",
    "tasks",
    "tools",
    "types",
]


def __getattr__(name: str) -> ModuleType:
    """Modules are imported when they are asked for: a command answers before jax is there."""
    if name in __all__:
        return import_module(f"rlhfjax.{name}")
    raise AttributeError(f"module 'rlhfjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
