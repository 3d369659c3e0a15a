"""Names of the Hugging Face Hub, from which nothing is fetched here."""

from __future__ import annotations

import re
from pathlib import Path

NAME = re.compile(r"[\w.-]+/[\w.-]+")


def advice(path: Path | str, kind: str) -> str:
    """What to say of a path that is not there, where it may be a name of the Hub.

    Args:
      path: that was asked for.
      kind: of what it should be, "model" or "dataset".

    Returns:
      the rest of a message, or nothing.
    """
    path = Path(path)
    if not NAME.fullmatch(str(path)) or path.parent.exists():
        return ""
    return (
        f"; nothing is fetched from the Hub here: `hf download {path} --repo-type {kind} "
        f"--local-dir {path.name}`, and then give {path.name}"
    )
