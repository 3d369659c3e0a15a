"""A constitution: what a file says, and how a bad one is refused."""

from pathlib import Path

import numpy as np
import pytest

from rlhfjax.data.text import DataError
from rlhfjax.feedback import principles
from rlhfjax.feedback.principles import Principle
from rlhfjax.feedback.templates import Vocabulary

GOOD = """\
- name: kindness
  critique_request: "{prompt} {response} what is unkind?"
  revision_request: "{prompt} {response} {critique} kinder:"
  comparison: "{first} or {second}? the kinder is the"
  question: "{response} is it kind?"
  answers:
    comparison: [first, second]
    question: ["yes", "no"]
- name: brevity
  comparison: "{prompt} {first} or {second}? the shorter is the"
  answers: {comparison: [first, second]}
"""
LETTERS = Vocabulary(lambda text: [ord(c) for c in text], 128)


def read(tmp_path: Path, text: str) -> tuple[Principle, ...]:
    file = tmp_path / "principles.yaml"
    file.write_text(text, encoding="utf-8")
    return principles.read(file)


def test_a_file_is_read(tmp_path: Path) -> None:
    kindness, brevity = read(tmp_path, GOOD)
    assert kindness.question == "{response} is it kind?"
    assert brevity == Principle(
        name="brevity",
        comparison="{prompt} {first} or {second}? the shorter is the",
        answers={"comparison": ["first", "second"]},
        source=str(tmp_path / "principles.yaml"),
    )


def test_what_is_asked_becomes_tokens(tmp_path: Path) -> None:
    kindness, brevity = read(tmp_path, GOOD)
    asked = principles.question(kindness, LETTERS)
    assert "".join(map(chr, asked.template.pieces[1])) == " is it kind?"
    assert [list(map(chr, row)) for row in asked.answers] == [list("yes"), ["n", "o", "\0"]]
    np.testing.assert_array_equal(asked.mask, [[True, True, True], [True, True, False]])
    assert principles.comparison(kindness, LETTERS).template.names == ("first", "second")
    assert principles.comparison(brevity, LETTERS).template.names == ("prompt", "first", "second")
    request = principles.revision_request(kindness, LETTERS)
    assert request.names == ("prompt", "response", "critique")
    assert principles.critique_request(kindness, LETTERS).names == ("prompt", "response")
    with pytest.raises(DataError, match=r"principles.yaml: principle 'brevity': question: is miss"):
        principles.question(brevity, LETTERS)


QUESTION = "- name: x\n  question: '{response}?'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a list of principles"),
        ("name: x", "not a list of principles"),
        ("- [", "not YAML: .* line 1"),
        ("- question: a", "principle 1 has no name"),
        ("- kindness", "principle 1 has no name"),
        ("- name: 3\n  question: a", "the name of principle 1 is 3, no text; put it in quotes"),
        ("- name: a\n  question: b\n  question: c", r":3: 'question' stands twice"),
        ("- name: a\n  question: {response} is it?", "not YAML: .* braces stand in quotes"),
        ("- name: x", "principle 'x': has nothing to ask; give one of critique_request"),
        ("- name: x\n  quesion: a", "principle 'x': unknown key 'quesion'; there are name, "),
        ("- name: x\n  source: a", "unknown key 'source'"),
        (QUESTION, "principle 'x': question: no answers to it"),
        ("- name: x\n  question: it?", r"'x': question: 'it\?' has no placeholder \{response\}"),
        ("- name: x\n  comparison: '{first}'", r"'x': comparison: .* no placeholder \{second\}"),
        (
            "- name: x\n  revision_request: '{response}'",
            r"'x': revision_request: .* no placeholder \{critique\}",
        ),
        (
            "- name: x\n  comparison: '{first} {second} {response}'",
            r"'x': comparison: \{response\} in .* is none of the placeholders",
        ),
        ("- name: x\n  critique_request: 3", "'x': critique_request: 3 is no text"),
        (QUESTION + "  answers: [a, b]", "'x': answers: .* is not lists under comparison and"),
        (QUESTION + "  answers: {question: [a]}", r"answers to the question: \['a'\] is not two"),
        (QUESTION + "  answers: {question: [yes, no]}", "True is no text; put it in quotes"),
        (QUESTION + "  answers: {question: [a, a]}", "answers to the question: both are 'a'"),
        (
            QUESTION + "  answers: {question: [a, b], comparison: [c, d]}",
            "'x': answers: there are some to a comparison, and there is none",
        ),
        (GOOD + GOOD, "two principles are called 'kindness'"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"principles.yaml: .*{message}|{message}") as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "principles.yaml"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.yaml: No such file"):
        principles.read(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["yes", "né"], "lacks a part of 'né': its tokens are .110, 233., of which 233"),
        (["yes", ""], "the answer '' has no token"),
        (["no", "none"], "'no' and 'none' are the tokens"),
    ],
)
def test_answers_that_a_judge_cannot_give_are_refused(answers: list[str], message: str) -> None:
    principle = Principle("x", question="{response}?", answers={"question": answers}, source="f")
    with pytest.raises(DataError, match=f"f: principle 'x': answers to the question: .*{message}"):
        principles.question(principle, LETTERS)


def test_a_word_that_the_vocabulary_lacks_is_refused() -> None:
    principle = Principle("x", critique_request="{response} pourquoi ça?", source="f")
    with pytest.raises(DataError, match=r"f: principle 'x': critique_request: .*lacks a part"):
        principles.critique_request(principle, LETTERS)
