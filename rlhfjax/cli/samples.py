"""Samples before and after training, side by side, for a reader."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

HEADER = "| prompt | before | after | proxy score | gold verdict |\n|---|---|---|---|---|\n"
MARKUP = re.compile(r"([\\`*_{}\[\]<>#|~&$])")
LINE_BREAK = re.compile(r"\r\n|[\r\n\u2028\u2029]")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def write_samples(
    path: Path,
    prompts: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    *,
    scores_before: ArrayLike,
    scores_after: ArrayLike,
    gold_before: ArrayLike,
    gold_after: ArrayLike,
) -> None:
    """Writes a Markdown table, a row a prompt.

    Texts appear as they are: what Markdown would read as markup is escaped, and characters that
    cannot be seen are written as their code.

    Args:
      path: the file, replaced if it exists.
      prompts: N prompts.
      before: N continuations by the policy before training.
      after: N continuations of the same prompts after it.
      scores_before: [N] reward model's scores of `before`.
      scores_after: [N] of `after`.
      gold_before: [N] bool, whether the gold judge likes `before`.
      gold_after: [N] of `after`.

    Raises:
      ValueError: arguments of unequal lengths.
    """
    rows = zip(
        prompts,
        before,
        after,
        np.asarray(scores_before),
        np.asarray(scores_after),
        np.asarray(gold_before),
        np.asarray(gold_after),
        strict=True,
    )
    lines = [
        f"| {_cell(prompt)} | {_cell(old)} | {_cell(new)} | {score_old:+.2f} → {score_new:+.2f} "
        f"| {_verdict(gold_old)} → {_verdict(gold_new)} |\n"
        for prompt, old, new, score_old, score_new, gold_old, gold_new in rows
    ]
    Path(path).write_text("# Samples\n\n" + HEADER + "".join(lines), encoding="utf-8")


def write_completions(
    path: Path, prompts: Sequence[str], completions: Sequence[str], scores: ArrayLike
) -> None:
    """Writes a Markdown table of an iteration's samples, a row a sample.

    Args:
      path: the file, replaced if it exists; its folder is made.
      prompts: N prompts.
      completions: N completions.
      scores: [N], NaN where there is none.

    Raises:
      ValueError: arguments of unequal lengths.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        f"| {_cell(prompt)} | {_cell(completion)} | {score:+.3g} |\n"
        for prompt, completion, score in zip(prompts, completions, np.asarray(scores), strict=True)
    ]
    header = "| prompt | completion | score |\n|---|---|---|\n"
    path.write_text(header + "".join(lines), encoding="utf-8")


def write_transcripts(
    path: Path, transcripts: Sequence[Sequence[tuple[bool, str]]], returns: ArrayLike
) -> None:
    """Writes a Markdown table of episodes, a row an episode: what was read and written, in turns.

    What the policy wrote is bold, what it was given is not. A line break is written as a space, and
    of a turn that is blank nothing; else as `write_samples` does.

    Args:
      path: the file, replaced if it exists; its folder is made.
      transcripts: for each episode its pieces, `(whether the policy wrote it, text)`, such as
        `rollout.transcripts` with its tokens as text.
      returns: [N], NaN where there is none.

    Raises:
      ValueError: arguments of unequal lengths.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        [f"**{cell}**" if wrote and cell else cell for wrote, cell in pieces]
        for pieces in (
            [(wrote, _cell(LINE_BREAK.sub(" ", text))) for wrote, text in pieces]
            for pieces in transcripts
        )
    ]
    width = max(map(len, rows), default=0)
    names = ["prompt", *(f"turn {i // 2 + 1}" if i % 2 else "given" for i in range(1, width))]
    lines = [f"| {' | '.join([*names[:width], 'return'])} |\n", "|---" * (width + 1) + "|\n"]
    for cells, score in zip(rows, np.asarray(returns), strict=True):
        padded = cells + [""] * (width - len(cells))
        lines.append(f"| {' | '.join(padded)} | {score:+.3g} |\n")
    header = "What the policy wrote is **bold**, what it was given is not.\n\n"
    path.write_text("# Episodes\n\n" + header + "".join(lines), encoding="utf-8")


def _cell(text: str) -> str:
    escaped = MARKUP.sub(r"\\\1", text.strip())
    return UNPRINTABLE.sub(lambda match: f"\\\\x{ord(match[0]):02x}", escaped)


def _verdict(liked: bool) -> str:
    return "positive" if liked else "negative"
