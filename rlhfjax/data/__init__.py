"""Records to batches: files, formats, mixtures, chat templates, token ids, fixed shapes."""

from rlhfjax.data import (
    batches,
    chat,
    cursor,
    example_batches,
    formats,
    generated,
    hub,
    mixture,
    packing,
    preferences,
    records,
    text,
    tokenized,
)

__all__ = [
    "batches",
    "chat",
    "cursor",
    "example_batches",
    "formats",
    "generated",
    "hub",
    "mixture",
    "packing",
    "preferences",
    "records",
    "text",
    "tokenized",
]
