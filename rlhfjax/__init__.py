"""RLHF as pure JAX functions: from rollout to update in one compiled program."""

from rlhfjax import (
    advantages,
    algorithms,
    checkpoint,
    data,
    kl,
    lm_head,
    log_probs,
    losses,
    masked,
    models,
    rollout,
    sampling,
    sequences,
    sharding,
    stopping,
    tasks,
    types,
)

__version__ = "0.1.0"

__all__ = [
    "advantages",
    "algorithms",
    "checkpoint",
    "data",
    "kl",
    "lm_head",
    "log_probs",
    "losses",
    "masked",
    "models",
    "rollout",
    "sampling",
    "sequences",
    "sharding",
    "stopping",
    "tasks",
    "types",
]
