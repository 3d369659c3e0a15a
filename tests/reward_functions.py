"""Reward functions for the processes of `rewards.Worker`, which import them from here."""

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import NoReturn


class Strange(Exception):
    """An error that cannot be read back from its own pickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def end() -> NoReturn:
    os._exit(3)


def hang() -> None:
    """Takes a process of its own along."""
    with subprocess.Popen(["sleep", "1000"]):
        time.sleep(1000)


def be_strange() -> NoReturn:
    raise Strange("very", "odd")


def leave() -> NoReturn:
    raise SystemExit(4)


ACTIONS: dict[str, Callable[[], object]] = {
    "end": end,
    "hang": hang,
    "strange": be_strange,
    "leave": leave,
    "refuse": lambda: {}["no such key"],  # type: ignore[index]
}


def obedient(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Does what the prompts say; otherwise the score is the number of letters."""
    for prompt in prompts:
        ACTIONS.get(prompt, lambda: None)()
    return [float(len(completion)) for completion in completions]
