"""Arrays on disk, in Orbax's format: parameters, and runs that can be broken off and go on."""

from rlhfjax.checkpoint.digests import digest, digests, flatten, unflatten
from rlhfjax.checkpoint.files import write_json, write_text
from rlhfjax.checkpoint.parameters import restore, save
from rlhfjax.checkpoint.steps import (
    CheckpointError,
    Checkpoints,
    Restored,
    same_config,
    versions,
)

__all__ = [
    "CheckpointError",
    "Checkpoints",
    "Restored",
    "digest",
    "digests",
    "flatten",
    "restore",
    "same_config",
    "save",
    "unflatten",
    "versions",
    "write_json",
    "write_text",
]
