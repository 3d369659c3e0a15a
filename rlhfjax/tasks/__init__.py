"""Tasks that are small enough to be solved exactly: what an algorithm finds can be checked."""

from rlhfjax.tasks import tabular

__all__ = ["tabular"]
