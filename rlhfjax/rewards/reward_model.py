"""A reward model as a reward function: its own tokens, whatever tokens the policy has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rlhfjax.rewards.arguments import Function


def of_texts(
    score_tokens: Callable[[np.ndarray, np.ndarray], Any],
    encode: Callable[[Any, Any], Sequence[int]],
    *,
    length: int,
    batch_size: int,
    pad_token: int = 0,
    name: str = "reward_model",
) -> Function:
    """score_tokens(encode(prompt, completion)) of each sample, as a reward function.

    Sequences are padded to the smallest power of two that holds the longest, and to `batch_size`
    rows: so few shapes that a compiled `score_tokens` is compiled a few times.

    Args:
      score_tokens: (tokens [batch_size, S] int32, attention_mask [batch_size, S] bool, padded on
        the right) -> scores [batch_size]; those of rows without a token are not used.
      encode: (prompt, completion), two texts or lists of messages, to the model's tokens of both.
      length: most tokens of a sequence; no opinion on longer ones.
      batch_size: sequences scored at a time.
      pad_token: what stands under the mask.
      name: what it is called in metrics.

    Returns:
      a function of `prompts` and `completions` that runs in this process.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Any]) -> list[float | None]:
        rows = [list(encode(p, c)) for p, c in zip(prompts, completions, strict=True)]
        scorable = [i for i, row in enumerate(rows) if 0 < len(row) <= length]
        scores: list[float | None] = [None] * len(rows)
        for start in range(0, len(scorable), batch_size):
            batch = scorable[start : start + batch_size]
            longest = max(len(rows[i]) for i in batch)
            width = min(1 << (longest - 1).bit_length(), length)
            tokens = np.full((batch_size, width), pad_token, np.int32)
            mask = np.zeros((batch_size, width), bool)
            for place, i in enumerate(batch):
                tokens[place, : len(rows[i])] = rows[i]
                mask[place, : len(rows[i])] = True
            for i, score in zip(batch, np.asarray(score_tokens(tokens, mask)), strict=False):
                scores[i] = float(score)
        return scores

    reward.__name__ = name
    return reward
