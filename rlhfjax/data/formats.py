"""What records mean: TRL's dataset formats, told apart by the names of their columns.

| columns | example |
|---|---|
| `text`, or `messages` | `Text` |
| `prompt` | `Prompt` |
| `prompt`, `completion` | `Completion` |
| `prompt`, `chosen`, `rejected` | `Pair` |
| `prompt`, `chosen`, `rejected`, `chosen_prob` (0 to 1) | `Pair` with a soft label |
| `chosen`, `rejected`, which begin alike | `Pair`, see `split` |
| `prompt`, `completion`, `label` (true, false) | `Unpaired` |
| `prompt`, `completions`, the best first; or with `ranks`, or with `scores` | `Ranking` |
| `prompt`, `completion`, `rating`; or `text`, `rating` | `Rating` |
| `prompt`, `completion`, `class` (0, 1, …); or `text`, `label` | `Class` |

The best rank is the least, the best score the greatest, and equals are no better than each other.
A text is a string, or a conversation: a list of messages with `role` and `content`. All texts of a
record are of one kind. Further columns are kept and handed to reward functions.

References:
  TRL's documentation, "Dataset formats and types"; ranked lists, ratings and classes are not in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rlhfjax.data.records import BadRecords, Place, Record, files_of
from rlhfjax.data.text import DataError

Message = dict[str, Any]
Content = str | list[Message]
TURN = "\n\nAssistant:"
# Columns that are called otherwise elsewhere.
USUAL = {
    "answer": "completion",
    "conversations": "messages",
    "instruction": "prompt",
    "output": "completion",
    "question": "prompt",
    "response": "completion",
}


@dataclass(frozen=True, kw_only=True)
class Example:
    """One record.

    Attributes:
      columns: the columns that have no meaning here.
      place: of the record; None for an example that was made otherwise.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    place: Place | None = None


@dataclass(frozen=True, kw_only=True)
class Text(Example):
    """A text to be learned.

    Attributes:
      text: itself.
    """

    text: Content


@dataclass(frozen=True, kw_only=True)
class Prompt(Example):
    """A prompt.

    Attributes:
      prompt: itself; empty where there is none to a response that is judged.
    """

    prompt: Content

    @property
    def responses(self) -> tuple[Content, ...]:
        """Those that the record holds."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Completion(Prompt):
    """A prompt with one response.

    Attributes:
      completion: the response.
    """

    completion: Content

    @property
    def responses(self) -> tuple[Content, ...]:
        """The completion."""
        return (self.completion,)


@dataclass(frozen=True, kw_only=True)
class Unpaired(Completion):
    """A response that is desirable or is not.

    Attributes:
      label: True where it is.
    """

    label: bool


@dataclass(frozen=True, kw_only=True)
class Rating(Completion):
    """A response with a number that people gave it.

    Attributes:
      label: the number, the more the better.
    """

    label: float


@dataclass(frozen=True, kw_only=True)
class Class(Completion):
    """A response of one of several classes.

    Attributes:
      label: which one, from 0 on.
    """

    label: int


@dataclass(frozen=True, kw_only=True)
class Pair(Prompt):
    """Two responses to a prompt.

    Attributes:
      chosen: the one that is preferred.
      rejected: the other.
      chosen_prob: the probability that `chosen` is the better one; None where that is certain.
    """

    chosen: Content
    rejected: Content
    chosen_prob: float | None = None

    @property
    def responses(self) -> tuple[Content, ...]:
        """The chosen one and the rejected one."""
        return self.chosen, self.rejected


@dataclass(frozen=True, kw_only=True)
class Ranking(Prompt):
    """Two or more responses to a prompt.

    Attributes:
      completions: the best first.
      ranks: of each the number of those that are better; equal where neither is.
    """

    completions: tuple[Content, ...]
    ranks: tuple[int, ...]

    @property
    def responses(self) -> tuple[Content, ...]:
        """The completions."""
        return self.completions


class Format(NamedTuple):
    """A format: the columns it needs, and what their values are.

    Attributes:
      columns: their names.
      make: from the values in that order to an example; a `ValueError` says what is wrong.
    """

    columns: tuple[str, ...]
    make: Callable[..., Example]


def examples(
    records: Sequence[Record], formats: Sequence[Format], *, bad: BadRecords | None = None
) -> list[Any]:
    """Records as examples of the first format whose columns at least half of them have.

    A column that is null is not there.

    Args:
      records: of one format.
      formats: those that will do, such as `PREFERENCES`; one with more columns goes before one
        with some of them.
      bad: takes the records that lack a column or hold something else in it; by default the first
        ones are refused.

    Returns:
      An example for each good record, in their order.

    Raises:
      DataError: none of the formats, too many bad records, or none that is good.
    """
    bad = BadRecords() if bad is None else bad
    given = [{k: v for k, v in record.fields.items() if v is not None} for record in records]
    chosen = _first_that_fits(given, formats, files_of(records))
    found = []
    for fields, (_, place) in zip(given, records, strict=True):
        try:
            if missing := [column for column in chosen.columns if column not in fields]:
                raise ValueError(f"no {missing[0]!r}, only {', '.join(map(repr, sorted(fields)))}")
            example = chosen.make(*(fields[column] for column in chosen.columns))
        except ValueError as error:
            bad.add(place, str(error))
        else:
            columns = {k: v for k, v in fields.items() if k not in chosen.columns}
            found.append(replace(example, columns=columns, place=place))
    bad.check()
    if not found:
        raise DataError(f"no good record among {len(records)}; give at least one")
    return found


def _first_that_fits(
    given: Sequence[dict[str, Any]], formats: Sequence[Format], where: str
) -> Format:
    for candidate in formats:
        if 2 * sum(fields.keys() >= set(candidate.columns) for fields in given) >= len(given) > 0:
            return candidate
    columns = sorted({column for fields in given for column in fields})
    known = "; ".join(dict.fromkeys(", ".join(candidate.columns) for candidate in formats))
    raise DataError(
        f"{where}: the records have the columns {', '.join(columns) or '(none)'}, which is none of "
        f"the formats that are of use here: {known}; {_advice(given, columns, formats)}"
    )


def _advice(
    given: Sequence[dict[str, Any]], columns: Sequence[str], formats: Sequence[Format]
) -> str:
    turns = given[0].get("conversations") if given else None
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
        return (
            "conversations of `from` and `value`, ShareGPT's, cannot be renamed: write messages of "
            "`role` and `content`"
        )
    theirs = {USUAL[column]: column for column in columns if column in USUAL}
    for candidate in formats:
        missing = [column for column in candidate.columns if column not in columns]
        if missing and theirs.keys() >= set(missing):
            more = "; an input belongs into the prompt" if "input" in columns else ""
            return f"rename {' '.join(f'{theirs[ours]}={ours}' for ours in missing)}{more}"
    return "rename or add columns"


def split(chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """The prompt that two responses share, and what is left of either.

    Of conversations it is the messages at the beginning that are equal. Of strings it is what they
    have in common at the beginning, up to the last turn of the assistant that opens there
    (`Assistant:` after an empty line, as in hh-rlhf). Without such a turn all they have in common,
    less one space at its end, as TRL does it; this may end within a word, so give prompts a column
    of their own wherever that is possible.

    Args:
      chosen: prompt and response.
      rejected: prompt and response.

    Returns:
      the prompt, the chosen response, the rejected response.

    References:
      TRL's `extract_prompt`.
    """
    end = common_prefix(chosen, rejected)
    shared = chosen[:end]
    if isinstance(shared, str):
        turn = shared.rfind(TURN)
        end = turn + len(TURN) if turn >= 0 else len(shared.removesuffix(" "))
    return chosen[:end], chosen[end:], rejected[end:]


def common_prefix(first: Sequence[Any], *others: Sequence[Any]) -> int:
    """How many items at the beginning all sequences have in common.

    Args:
      first: a string, a list of messages, of token ids.
      others: of the same type.

    Returns:
      their number.
    """
    low, high = 0, min(map(len, (first, *others)))
    while low < high:
        middle = (low + high + 1) // 2
        if all(other[:middle] == first[:middle] for other in others):
            low = middle
        else:
            high = middle - 1
    return low


def _content(column: str, value: Any) -> Content:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{column!r} has half a surrogate pair, which is no text") from error
    except TypeError as error:
        raise ValueError(f"{column!r}: {error}") from error
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{column!r} is {_kind(value)}, not a string or a list of messages")
    if not value:
        raise ValueError(f"{column!r} is a list of no messages")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} of {column!r} is not an object with a 'role'")
        content = message.get("content")
        if not isinstance(content, str | list) and "tool_calls" not in message:
            raise ValueError(
                f"'content' of message {number} of {column!r} is {_kind(content)}, not a string"
            )
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _alike(**contents: Any) -> tuple[Content, ...]:
    """Texts of one kind."""
    checked = {column: _content(column, value) for column, value in contents.items()}
    if len({type(content) for content in checked.values()}) > 1:
        raise ValueError(f"{', '.join(checked)} mix strings and messages; use one of them")
    return tuple(checked.values())


def _text(text: Any) -> Text:
    return Text(text=_content("text", text))


def _messages(messages: Any) -> Text:
    if isinstance(messages, str):
        raise ValueError(f"'messages' is {messages!r:.40}, not a list of messages")
    return Text(text=_content("messages", messages))


def _prompt(prompt: Any) -> Prompt:
    return Prompt(prompt=_content("prompt", prompt))


def _completion(prompt: Any, completion: Any) -> Completion:
    prompt, completion = _alike(prompt=prompt, completion=completion)
    return Completion(prompt=prompt, completion=completion)


def _pair(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    if isinstance(prompt, str) and isinstance(chosen, list):
        # Such data holds whole conversations, and the first question once more.
        return _implicit_pair(chosen, rejected)
    prompt, chosen, rejected = _alike(prompt=prompt, chosen=chosen, rejected=rejected)
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are equal")
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected)


def _soft_pair(prompt: Any, chosen: Any, rejected: Any, chosen_prob: Any) -> Pair:
    prob = _number("chosen_prob", chosen_prob)
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"'chosen_prob' is {prob}, not a probability from 0 to 1")
    return replace(_pair(prompt, chosen, rejected), chosen_prob=prob)


def _implicit_pair(chosen: Any, rejected: Any) -> Pair:
    prompt, chosen, rejected = split(*_alike(chosen=chosen, rejected=rejected))
    if not prompt:
        raise ValueError("'chosen' and 'rejected' begin with nothing in common, and no 'prompt'")
    if isinstance(prompt, list) and not (chosen and rejected):
        raise ValueError("all messages of 'chosen' or of 'rejected' are part of the other")
    return _pair(prompt, chosen, rejected)


def _chosen(pair: Pair) -> Completion:
    return Completion(prompt=pair.prompt, completion=pair.chosen)


def _unpaired(prompt: Any, completion: Any, label: Any) -> Unpaired:
    if label not in (0, 1) or isinstance(label, float):
        hint = "; to a reward model classes are 'class' and ratings 'rating'"
        is_number = isinstance(label, int | float)
        raise ValueError(f"'label' is {label!r:.40}, not true or false{hint * is_number}")
    given = _completion(prompt, completion)
    return Unpaired(prompt=given.prompt, completion=given.completion, label=bool(label))


def _rating(prompt: Any, completion: Any, rating: Any) -> Rating:
    given = _completion(prompt, completion)
    label = _number("rating", rating)
    return Rating(prompt=given.prompt, completion=given.completion, label=label)


def _class(prompt: Any, completion: Any, label: Any) -> Class:
    if not isinstance(label, int) or label < 0:
        raise ValueError(f"the class is {label!r:.40}, not one of 0, 1, …")
    given = _completion(prompt, completion)
    return Class(prompt=given.prompt, completion=given.completion, label=int(label))


def _ranking(prompt: Any, completions: Any, keys: Sequence[float]) -> Ranking:
    """Completions by their keys, of which the least is the best."""
    if not isinstance(completions, list) or len(completions) < 2:
        raise ValueError("'completions' is not a list of two or more")
    if len(keys) != len(completions):
        raise ValueError(f"{len(completions)} completions, but {len(keys)} say how good they are")
    texts = {f"completions[{i}]": text for i, text in enumerate(completions)}
    prompt, *completions = _alike(prompt=prompt, **texts)
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    return Ranking(
        prompt=prompt,
        completions=tuple(completions[i] for i in order),
        ranks=tuple(sum(other < keys[i] for other in keys) for i in order),
    )


def _ranked(prompt: Any, completions: Any, ranks: Any) -> Ranking:
    return _ranking(prompt, completions, _numbers("ranks", ranks))


def _scored(prompt: Any, completions: Any, scores: Any) -> Ranking:
    return _ranking(prompt, completions, [-score for score in _numbers("scores", scores)])


def _stepwise(prompt: Any, completions: Any, labels: Any) -> Ranking:
    raise ValueError(
        "'completions' with 'labels' are the steps of one answer, and a reward of steps is not "
        "learned here; a ranking has no 'labels', but 'ranks' or 'scores', or the best first"
    )


def _listed(prompt: Any, completions: Any) -> Ranking:
    num = len(completions) if isinstance(completions, list) else 0
    return _ranking(prompt, completions, range(num))


def _numbers(column: str, values: Any) -> list[float]:
    if not isinstance(values, list):
        raise ValueError(f"{column!r} is {_kind(values)}, not a list of numbers")
    return [_number(column, value) for value in values]


def _number(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} of {column!r} is not a finite number")
    return float(value)


RANKED = Format(("prompt", "completions", "ranks"), _ranked)
SCORED = Format(("prompt", "completions", "scores"), _scored)
STEPWISE = Format(("prompt", "completions", "labels"), _stepwise)
LISTED = Format(("prompt", "completions"), _listed)
SOFT_PAIR = Format(("prompt", "chosen", "rejected", "chosen_prob"), _soft_pair)
PAIR = Format(("prompt", "chosen", "rejected"), _pair)
IMPLICIT_PAIR = Format(("chosen", "rejected"), _implicit_pair)
UNPAIRED = Format(("prompt", "completion", "label"), _unpaired)
RATING = Format(("prompt", "completion", "rating"), _rating)
TEXT_RATING = Format(("text", "rating"), lambda text, rating: _rating("", text, rating))
CLASS = Format(("prompt", "completion", "class"), _class)
TEXT_CLASS = Format(("text", "label"), lambda text, label: _class("", text, label))
COMPLETION = Format(("prompt", "completion"), _completion)
CHOSEN = Format(("prompt", "chosen", "rejected"), lambda *values: _chosen(_pair(*values)))
IMPLICIT_CHOSEN = Format(("chosen", "rejected"), lambda *values: _chosen(_implicit_pair(*values)))
PROMPT = Format(("prompt",), _prompt)
IMPLICIT_PROMPT = Format(
    ("chosen", "rejected"), lambda *values: _prompt(_implicit_pair(*values).prompt)
)
MESSAGES = Format(("messages",), _messages)
TEXT = Format(("text",), _text)

SUPERVISED = (COMPLETION, MESSAGES, TEXT, CHOSEN, IMPLICIT_CHOSEN)
"""To learn from: of pairs the chosen responses."""

PROMPTS = (PROMPT, IMPLICIT_PROMPT)
"""To sample responses to, whatever else the records hold."""

PREFERENCES = (SOFT_PAIR, PAIR, IMPLICIT_PAIR)
"""For the direct methods, and reward models."""

JUDGED = (
    *PREFERENCES,
    RANKED,
    SCORED,
    STEPWISE,
    LISTED,
    RATING,
    CLASS,
    UNPAIRED,
    TEXT_RATING,
    TEXT_CLASS,
)
"""For reward models."""
