"""Losses: the only functions that reduce over tokens or examples."""

from rlhfjax.losses import (
    anchored,
    policy,
    preference,
    ranking,
    reductions,
    reference_free,
    responses,
    reward,
    selection,
    sequence_policy,
    supervised,
    unpaired,
    value,
)

__all__ = [
    "anchored",
    "policy",
    "preference",
    "ranking",
    "reductions",
    "reference_free",
    "responses",
    "reward",
    "selection",
    "sequence_policy",
    "supervised",
    "unpaired",
    "value",
]
