"""Conversations: what a reward function is given where the prompts are lists of messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_of(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text that a completion ends with.

    Args:
      completion: a text, or messages.

    Returns:
      the text, or the content of the last message.
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


def completions_to(prompts: Sequence[Any], texts: Sequence[str]) -> list[Any]:
    """Texts in the form of the prompts that they answer.

    Args:
      prompts: B texts or lists of messages.
      texts: B texts.

    Returns:
      B completions: `[{"role": "assistant", "content": text}]` to messages, the text to a text.
    """
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
