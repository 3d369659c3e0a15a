"""Records to batches: text files, splits, preference pairs, fixed-shape batches."""

from rlhfjax.data import batches, cursor, generated, preferences, text

__all__ = ["batches", "cursor", "generated", "preferences", "text"]
