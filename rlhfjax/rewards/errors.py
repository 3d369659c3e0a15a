"""What a reward function did wrong, and for which samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Failure(NamedTuple):
    """A sample that got no score.

    Attributes:
      sample: its number in the batch.
      prompt: its prompt.
      reason: what came back.
    """

    sample: int
    prompt: Any
    reason: str


class RewardError(ValueError):
    """A reward function that cannot be loaded, or did not do what it should.

    Attributes:
      failures: the samples that are known to have failed; `call` looks for the first one only.
    """

    def __init__(self, message: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)
