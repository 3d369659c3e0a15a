"""Functions of a module, for a process of their own."""

import time
from collections.abc import Sequence

BAD, SLOW = 9, 8


def echo(calls: Sequence[Sequence[int]]) -> list[list[int] | None]:
    """Says what it is told; 3 ends it, 9 breaks it, and 8 takes it too long."""
    if any(BAD in call for call in calls):
        raise KeyError("nothing is stored under 9")
    if any(SLOW in call for call in calls):
        time.sleep(60)
    return [None if 3 in call else list(call) for call in calls]
