"""Losses: the only functions that reduce over tokens or examples."""

from rlhfjax.losses import policy, reward, supervised, value

__all__ = ["policy", "reward", "supervised", "value"]
