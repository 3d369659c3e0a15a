"""Algorithms: each a state, an `init`, and a `make_step` that gives one compiled program."""

from rlhfjax.algorithms import ppo, reward_model, sft

__all__ = ["ppo", "reward_model", "sft"]
