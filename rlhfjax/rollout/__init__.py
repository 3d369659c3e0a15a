"""Sampling: responses to prompts, and episodes of several turns in an environment."""

from rlhfjax.rollout.environments import (
    Environment,
    PythonEnvironment,
    WithPythonTool,
    check,
    with_tool,
)
from rlhfjax.rollout.episodes import Episodes, act, make_act, refuse_outside, transcripts
from rlhfjax.rollout.generation import generate

__all__ = [
    "Environment",
    "Episodes",
    "PythonEnvironment",
    "WithPythonTool",
    "act",
    "check",
    "generate",
    "make_act",
    "refuse_outside",
    "transcripts",
    "with_tool",
]
