"""Rewards that a program can check. Each is made with what it checks, and is in TRL's signature:

    number(answer="solution")(completions=["… #### 18"], solution=["18"]) == [1.0]

From the command line each can be named with its arguments: `number`, `length(target=100)`. Of
conversations the last message is read.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from inspect import Parameter, Signature
from json import loads
from typing import Any

from rlhfjax.rewards.messages import text_of

__all__ = ["exact", "json", "last_number", "length", "number", "overlong", "regex", "tags"]

# A number stands alone: not a part of a word, of a date, a version, a fraction or a power.
DIGITS = r"(?>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = (
    r"(?<![\w.,/^])(?P<sign>[-+]?(?:[$€£] ?)?[-+]?)"
    rf"(?P<digits>{DIGITS})(?![0-9]|[.,][0-9]|[eE][-+]?[0-9]| ?[/^] ?[0-9])"
)
ANYWHERE = re.compile(NUMBER)
BEHIND = re.compile(rf"####[ \t]*{NUMBER}")
ALONE = re.compile(rf"\s*{NUMBER}\s*%?\s*")
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}


class Verifier:
    """A check of one sample after the other, as a reward function.

    Args:
      name: what it is called.
      check: the score of one sample, given its entry of each of the columns; None where it has no
        opinion. A function at the top of a module, or a `partial` of one: it is sent to processes.
      columns: that it reads; of `completions` the texts.
    """

    def __init__(self, name: str, check: Callable[..., float | None], *columns: str) -> None:
        self.__name__, self.check, self.columns = name, check, columns
        self.__signature__ = Signature([Parameter(c, Parameter.KEYWORD_ONLY) for c in columns])

    def __call__(self, **given: Sequence[Any]) -> list[float | None]:
        """The score of every sample."""
        rows = zip(*(given[column] for column in self.columns), strict=True)
        return [self.check(*row) for row in rows]


def number(*, answer: str = "answer") -> Verifier:
    """1 where the number behind `####` is that of the reference, otherwise 0.

    The last number counts that stands directly behind a `####`. Thousands may be set off by commas,
    18 is 18.0 and $18, and a % is no part of a number. No opinion where the reference has none.

    Args:
      answer: the column of references: numbers, or texts that are one or end with `#### 18`.

    Returns:
      a function of `completions` and this column.

    References:
      Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems.
    """
    check = partial(_same_number, BEHIND)
    return Verifier("number", check, "completions", answer)


def last_number(*, answer: str = "answer") -> Verifier:
    """1 where the last number of the text is that of the reference, otherwise 0.

    Numbers and references as in `number`; a `####` is not asked for.

    Args:
      answer: the column of references.

    Returns:
      a function of `completions` and this column.
    """
    check = partial(_same_number, ANYWHERE)
    return Verifier("last_number", check, "completions", answer)


def exact(*, answer: str = "answer") -> Verifier:
    """1 where the text is the reference, otherwise 0.

    Both in Unicode's form NFKC, without case, each run of white space a single space, none at the
    ends and no `.`, `!` or `?` at the end. No opinion where the reference is None.

    Args:
      answer: the column of references, texts.

    Returns:
      a function of `completions` and this column.
    """
    return Verifier("exact", _same_text, "completions", answer)


def regex(pattern: str) -> Verifier:
    r"""1 where the pattern is found in the text, otherwise 0.

    A pattern such as `(a+)+$` may take for ever on a text that a model has written: run it in a
    `Worker`, as the command line does.

    Args:
      pattern: of Python's `re`. `\A` and `\Z` are the ends of the text, `(?s)` lets `.` be any.

    Returns:
      a function of `completions`.
    """
    check = partial(_found, re.compile(pattern))
    return Verifier("regex", check, "completions")


def json(keys: Mapping[str, str] | None = None) -> Verifier:
    """1 where the text is JSON, an object with all these keys if there are any, otherwise 0.

    Args:
      keys: with the type of each: object, array, string, number, integer, boolean or null.

    Returns:
      a function of `completions`.

    Raises:
      ValueError: there is no such type.

    References:
      JSON Schema, the keywords `required` and `type`.
    """
    keys = dict(keys or {})
    unknown = set(keys.values()) - set(TYPES)
    if unknown:
        raise ValueError(f"no JSON type {sorted(unknown)}, but {', '.join(TYPES)}")
    return Verifier("json", partial(_holds, keys), "completions")


def length(*, target: int, of: str = "completions") -> Verifier:
    """-min(|n - target| / target, 1): 0 at the target, -1 at nothing and at twice the target.

    Args:
      target: above 0.
      of: the column that is counted, n: characters of `completions`, tokens of `completion_ids`.

    Returns:
      a function of this column.

    Raises:
      ValueError: the target is not above 0.
    """
    if target <= 0:
        raise ValueError(f"target must be above 0, got {target}")
    return Verifier("length", partial(_distance, target), of)


def overlong(*, limit: int, buffer: int, of: str = "completion_ids") -> Verifier:
    """-clip((n - (limit - buffer)) / buffer, 0, 1): 0 up to limit - buffer, -1 from the limit on.

    Args:
      limit: n from which the whole penalty is due.
      buffer: how long it grows before that, above 0.
      of: the column that is counted, n: tokens of `completion_ids`, characters of `completions`.

    Returns:
      a function of this column.

    Raises:
      ValueError: the buffer is not above 0.

    References:
      Yu et al. 2025, DAPO, eq. 13; `advantages.overlong_penalty` is the same of arrays.
    """
    if buffer <= 0:
        raise ValueError(f"buffer must be above 0, got {buffer}")
    return Verifier("overlong", partial(_excess, limit, buffer), of)


def tags(*names: str) -> Verifier:
    """1 where the text is `<a>…</a><b>…</b>`, with white space at most between, otherwise 0.

    Each tag occurs once, in this order: `tags("think", "answer")`.

    Args:
      *names: of the tags, one at least.

    Returns:
      a function of `completions`.

    Raises:
      ValueError: there is no tag.

    References:
      DeepSeek-AI 2025, DeepSeek-R1, section 2.2.2 (format rewards).
    """
    if not names:
        raise ValueError("name at least one tag")
    return Verifier("tags", partial(_tagged, names), "completions")


def _value(found: re.Match[str]) -> Decimal:
    value = Decimal(found["digits"].replace(",", ""))
    return -value if "-" in found["sign"] else value


def _last(pattern: re.Pattern[str], text: str) -> Decimal | None:
    found = deque(pattern.finditer(text.replace("\N{MINUS SIGN}", "-")), maxlen=1)
    return _value(found[0]) if found else None


def _reference(answer: Any) -> Decimal | None:
    if answer is None or isinstance(answer, int | float):
        return None if answer is None else Decimal(str(answer))
    alone = ALONE.fullmatch(answer.replace("\N{MINUS SIGN}", "-"))
    return _value(alone) if alone else _last(BEHIND, answer)


def _same_number(pattern: re.Pattern[str], completion: Any, answer: Any) -> float | None:
    reference = _reference(answer)
    return None if reference is None else float(_last(pattern, text_of(completion)) == reference)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".!?")


def _same_text(completion: Any, answer: str | None) -> float | None:
    return None if answer is None else float(_normal(text_of(completion)) == _normal(answer))


def _found(pattern: re.Pattern[str], completion: Any) -> float:
    return float(pattern.search(text_of(completion)) is not None)


def _holds(keys: Mapping[str, str], completion: Any) -> float:
    try:
        value = loads(text_of(completion), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return 0.0
    if not keys:
        return 1.0
    return float(
        isinstance(value, dict)
        and all(key in value and _is(value[key], kind) for key, kind in keys.items())
    )


def _refuse(constant: str) -> None:
    """JSON knows neither NaN nor Infinity."""
    raise ValueError(constant)


def _is(value: Any, kind: str) -> bool:
    # To Python True is an integer, to JSON it is none.
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _size(counted: Any) -> int:
    """Characters of a text or of messages, otherwise the number of entries."""
    is_messages = bool(counted) and isinstance(counted[-1], Mapping)
    return len(text_of(counted) if is_messages else counted)


def _distance(target: int, counted: Any) -> float:
    return -min(abs(_size(counted) - target) / target, 1.0)


def _excess(limit: int, buffer: int, counted: Any) -> float:
    return -min(max((_size(counted) - (limit - buffer)) / buffer, 0.0), 1.0)


def _tagged(names: Sequence[str], completion: Any) -> float:
    marks = [mark for name in names for mark in (f"<{name}>", f"</{name}>")]
    rest = text_of(completion)
    for opening, closing in zip(marks[::2], marks[1::2], strict=True):
        before, opened, rest = rest.partition(opening)
        inside, closed, rest = rest.partition(closing)
        if before.strip() or not opened or not closed or any(mark in inside for mark in marks):
            return 0.0
    return float(not rest.strip())
