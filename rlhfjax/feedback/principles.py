r"""A constitution: principles in a YAML file, in the user's words.

    - name: kindness
      critique_request: "{prompt}\n{response}\nName what is unkind in the reply:"
      revision_request: "{prompt}\n{response}\n{critique}\nThe reply, made kind:"
      comparison: "{prompt}\nA: {first}\nB: {second}\nThe kinder reply is"
      question: "{prompt}\n{response}\nIs the reply kind?"
      answers:
        comparison: [" A", " B"]
        question: [" yes", " no"]

A principle needs a name and what is asked of it: both requests for critique and revision, a
comparison or a question with two answers each, the first of which says that the first response is
better, or that the principle is kept. `{prompt}` may be in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rlhfjax.data.text import DataError
from rlhfjax.feedback import templates
from rlhfjax.feedback.templates import Question, Template, Vocabulary

NEEDED = {
    "critique_request": ("response",),
    "revision_request": ("response", "critique"),
    "comparison": ("first", "second"),
    "question": ("response",),
}
ASKED = ("comparison", "question")


@dataclass(frozen=True)
class Principle:
    """What a judge is to apply.

    Attributes:
      name: of the principle.
      critique_request: with `{response}`; what the critique follows.
      revision_request: with `{response}` and `{critique}`; what the revision follows.
      comparison: with `{first}` and `{second}`.
      question: with `{response}`.
      answers: "comparison" and "question" → two answers.
      source: the file that it is from, for messages.
    """

    name: str
    critique_request: str | None = None
    revision_request: str | None = None
    comparison: str | None = None
    question: str | None = None
    answers: dict[str, tuple[str, str]] | None = None
    source: str = "(no file)"

    def __post_init__(self) -> None:
        """Refuses texts without their placeholders, and questions without answers."""
        with _saying(str(self)):
            _check(self)

    def __str__(self) -> str:
        return f"{self.source}: principle {self.name!r}"


def read(path: Path | str) -> tuple[Principle, ...]:
    """The principles of a YAML file, in their order.

    Args:
      path: the file, a list of principles.

    Returns:
      at least one.

    Raises:
      DataError: with the file and the principle's name: no such file, not YAML, unknown or missing
        keys, values that are no texts, missing placeholders, or a name that occurs twice.
      ImportError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("principles are read by PyYAML: pip install 'rlhfjax[cli]'") from error
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        written, listed = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise DataError(f"{path}: not YAML: {told}; texts with braces stand in quotes") from error
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path}: not a list of principles, each beginning with '- name: …'")
    # Of a key that stands twice, YAML would keep the second.
    for line, key in _twice(written):
        raise DataError(f"{path}:{line}: {key!r} stands twice in one principle; remove one")
    found: dict[str, Principle] = {}
    for number, entry in enumerate(listed, start=1):
        principle = _principle(entry, number, path)
        if principle.name in found:
            raise DataError(f"{path}: two principles are called {principle.name!r}; rename one")
        found[principle.name] = principle
    return tuple(found.values())


def critique_request(principle: Principle, vocabulary: Vocabulary) -> Template:
    """The request for a critique as tokens.

    Args:
      principle: that has one.
      vocabulary: of the model that is to criticise.

    Returns:
      a `Template`.

    Raises:
      DataError: it has none, or the vocabulary lacks a part of it.
    """
    return _encoded(principle, "critique_request", vocabulary)


def revision_request(principle: Principle, vocabulary: Vocabulary) -> Template:
    """The request for a revision as tokens.

    Args:
      principle: that has one.
      vocabulary: of the model that is to revise.

    Returns:
      a `Template`.

    Raises:
      DataError: it has none, or the vocabulary lacks a part of it.
    """
    return _encoded(principle, "revision_request", vocabulary)


def comparison(principle: Principle, vocabulary: Vocabulary) -> Question:
    """The question which of two responses is better, as tokens.

    Args:
      principle: that has one.
      vocabulary: of the judge.

    Returns:
      a `Question` with two answers.

    Raises:
      DataError: it has none, the vocabulary lacks a part of it or of an answer, or one answer is
        the beginning of the other.
    """
    return _asked(principle, "comparison", vocabulary)


def question(principle: Principle, vocabulary: Vocabulary) -> Question:
    """The question whether a response keeps to the principle, as tokens.

    Args:
      principle: that has one.
      vocabulary: of the judge.

    Returns:
      a `Question` with two answers.

    Raises:
      DataError: as `comparison`.
    """
    return _asked(principle, "question", vocabulary)


def _principle(entry: Any, number: int, path: Path) -> Principle:
    name = entry.get("name") if isinstance(entry, dict) else None
    if name is not None and not isinstance(name, str):
        raise DataError(
            f"{path}: the name of principle {number} is {name!r}, no text; put it in quotes"
        )
    if name is None or not name.strip():
        raise DataError(f"{path}: principle {number} has no name; begin it with '- name: …'")
    known = [field.name for field in fields(Principle) if field.name != "source"]
    if unknown := [key for key in entry if key not in known]:
        raise DataError(
            f"{path}: principle {name!r}: unknown key {unknown[0]!r}; there are {', '.join(known)}"
        )
    values = {key: value for key, value in entry.items() if value is not None}
    return Principle(**values, source=str(path))


def _twice(document: Any) -> Iterator[tuple[int, str]]:
    """Line and name of every key that its principle, or its answers, have before."""
    entries = [entry for entry in document.value if entry.id == "mapping"]
    for mapping in [*entries, *(value for entry in entries for _, value in entry.value)]:
        if mapping.id == "mapping":
            names = [key.value for key, _ in mapping.value]
            for number, (key, _) in enumerate(mapping.value):
                if key.value in names[:number]:
                    yield key.start_mark.line + 1, key.value


def _check(principle: Principle) -> None:
    given = {name for name in NEEDED if getattr(principle, name) is not None}
    if not given:
        raise DataError(f"has nothing to ask; give one of {', '.join(NEEDED)}")
    for name in NEEDED:
        with _saying(name):
            if name in given:
                _check_text(getattr(principle, name), NEEDED[name])
    answers = {} if principle.answers is None else principle.answers
    if not isinstance(answers, dict) or answers.keys() - set(ASKED):
        raise DataError(f"answers: {answers!r:.60} is not lists under {' and '.join(ASKED)}")
    for name in ASKED:
        if name in given and name not in answers:
            raise DataError(f"{name}: no answers to it; list two under answers")
        if name in answers and name not in given:
            raise DataError(f"answers: there are some to a {name}, and there is none")
        if name in answers:
            with _saying(f"answers to the {name}"):
                _check_answers(answers[name])


def _check_text(text: Any, needed: tuple[str, ...]) -> None:
    if not isinstance(text, str):
        raise DataError(f"{text!r:.60} is no text; put it in quotes")
    own = needed if "first" in needed else {"response", *needed}
    templates.parse(text, needed=needed, known=("prompt", *own))


def _check_answers(answers: Any) -> None:
    if not isinstance(answers, list | tuple) or len(answers) != 2:
        raise DataError(f"{answers!r:.60} is not two texts")
    for answer in answers:
        if not isinstance(answer, str):
            raise DataError(f"{answer!r:.60} is no text; put it in quotes")
    if answers[0] == answers[1]:
        raise DataError(f"both are {answers[0]!r}")


def _encoded(principle: Principle, name: str, vocabulary: Vocabulary) -> Template:
    text = getattr(principle, name)
    with _saying(f"{principle}: {name}"):
        if text is None:
            raise DataError("is missing")
        return templates.encode(text, vocabulary)


def _asked(principle: Principle, name: str, vocabulary: Vocabulary) -> Question:
    template = _encoded(principle, name, vocabulary)
    with _saying(f"{principle}: answers to the {name}"):
        pair = (principle.answers or {})[name]
        return Question(template, *templates.encode_answers(pair, vocabulary))


@contextmanager
def _saying(where: str) -> Iterator[None]:
    """Puts the place before what an error says."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
