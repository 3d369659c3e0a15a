"""Tasks that are small enough to be solved exactly: what an algorithm finds can be checked."""

from rlhfjax.tasks import fixed_points, line_world, sum_to_target, tabular

__all__ = ["fixed_points", "line_world", "sum_to_target", "tabular"]
