"""Rewards that are Python functions of text, in TRL's signature.

    def reward(prompts, completions, **columns) -> list[float | None]

A Python function fails now and then. `call` raises and says at which prompt; `call_or_mask` leaves
such samples out and goes on. Where it may hang or take the process with it, a `Worker` runs it in
a process of its own:

    with rewards.Worker("rewards.py:polite", time_limit=30) as reward:
        scores = rewards.call(reward, prompts, completions)

`Combined` weighs several of them, `load` finds them by name, `verifiers` are some, `of_texts` makes
a reward model one. `algorithms.reward_model.as_reward` is the other way to score, in the same
program as sampling and learning.
"""

from rlhfjax.rewards import verifiers
from rlhfjax.rewards.arguments import Function, TrainerState
from rlhfjax.rewards.calls import call, call_or_mask
from rlhfjax.rewards.combined import Combined
from rlhfjax.rewards.errors import Failure, RewardError
from rlhfjax.rewards.functions import load
from rlhfjax.rewards.messages import completions_to, text_of
from rlhfjax.rewards.reward_model import of_texts
from rlhfjax.rewards.worker import Worker

__all__ = [
    "Combined",
    "Failure",
    "Function",
    "RewardError",
    "TrainerState",
    "Worker",
    "call",
    "call_or_mask",
    "completions_to",
    "load",
    "of_texts",
    "text_of",
    "verifiers",
]
