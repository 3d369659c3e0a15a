"""Records to batches: text files, splits, preference pairs, fixed-shape batches."""

from rlhfjax.data import batches, generated, preferences, text

__all__ = ["batches", "generated", "preferences", "text"]
