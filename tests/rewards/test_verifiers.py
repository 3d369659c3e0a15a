"""Verifiers: scores by hand, and what must not pass for an answer."""

import pickle
from typing import Any

import pytest

from rlhfjax.rewards import verifiers


def scores(verifier: Any, *completions: Any, **columns: Any) -> list[float | None]:
    return verifier(completions=list(completions), **columns)


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("She has 9 * 2 = $18.\n#### 18", "16 - 3 - 4 = 9\n#### 18", 1.0),
        ("#### 18", "18", 1.0),
        ("#### 18", 18, 1.0),
        ("####18.0", 18.0, 1.0),
        ("#### 18.", "#### 18", 1.0),
        ("#### $1,234,567.50", "1234567.5", 1.0),
        ("#### -3", "#### -3", 1.0),
        ("#### \N{MINUS SIGN}3", "-3", 1.0),
        ("#### -$3", "#### $-3", 1.0),
        ("#### +3 apples", "3", 1.0),
        ("#### 50%", "50", 1.0),
        ("#### .5", "0.5", 1.0),
        ("#### 17\n#### 18", "18", 1.0),
        ("#### 18 #### ", "18", 1.0),
        ("#### 18\n#### 17", "18", 0.0),
        ("18", "18", 0.0),
        ("#### eighteen, 18", "18", 0.0),
        ("####\n18", "18", 0.0),
        ("#### 3", "-3", 0.0),
        ("#### 180", "18", 0.0),
        ("#### 18.5", "18", 0.0),
        ("#### 1/2", "1", 0.0),
        ("#### 1 / 2", "1", 0.0),
        ("#### 1,80", "1", 0.0),
        ("#### 1.2.3", "1.2", 0.0),
        ("#### 1e5", "1", 0.0),
        ("#### 2^3", "2", 0.0),
        ("", "18", 0.0),
        ("#### 18", "eighteen", None),
        ("#### 18", "the 18th", None),
        ("#### 18", None, None),
        ("####" + " 9" * 10**5, "9", 1.0),
        ("#### " + "9" * 10**5, "9" * 10**5, 1.0),
        ("#### " + "9" * 10**5, "9", 0.0),
    ],
)
def test_number_is_what_stands_behind_the_marks(completion: str, answer: Any, score: Any) -> None:
    assert scores(verifiers.number(), completion, answer=[answer]) == [score]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("first 17, then **18**.", 1.0),
        ("so the answer is \\boxed{18}", 1.0),
        ("$18$", 1.0),
        ("28-18=10, hence x=18", 1.0),
        ("it is 20-18", 1.0),
        ("it is -18", 0.0),
        ("18 of 20", 0.0),
        ("in May 18/20", 0.0),
        ("room A18", 0.0),
        ("none", 0.0),
    ],
)
def test_last_number_asks_for_no_marks(completion: str, score: float) -> None:
    assert scores(verifiers.last_number(), completion, answer=["#### 18"]) == [score]


def test_the_reference_may_be_in_any_column() -> None:
    verifier = verifiers.number(answer="solution")
    assert scores(verifier, "#### 1", "#### 2", solution=["1", "1"]) == [1.0, 0.0]


def test_of_conversations_the_last_message_is_read() -> None:
    said = [
        {"role": "assistant", "content": "#### 17"},
        {"role": "assistant", "content": "#### 18"},
    ]
    assert scores(verifiers.number(), said, answer=["18"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("  Paris.\n", "paris", 1.0),
        ("The  Hague", "the hague!", 1.0),
        ("STRASSE", "straße", 1.0),
        ("\N{FULLWIDTH DIGIT FIVE}", "5", 1.0),
        ("-5", "5", 0.0),
        (".5", "5", 0.0),
        ("Paris, France", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_exact_is_equal_but_for_case_and_space(completion: str, answer: Any, score: Any) -> None:
    assert scores(verifiers.exact(), completion, answer=[answer]) == [score]


def test_regex_is_found_anywhere() -> None:
    verifier = verifiers.regex(r"#### -?\d+\Z")
    assert scores(verifier, "so\n#### 18", "#### 18 or so", "18") == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("completion", "plain", "keyed"),
    [
        ('{"name": "Ada", "age": 36}', 1.0, 1.0),
        (' {"age": 36.5, "name": "", "more": null}\n', 1.0, 1.0),
        ('{"name": "Ada"}', 1.0, 0.0),
        ('{"name": "Ada", "age": true}', 1.0, 0.0),
        ('{"name": 3, "age": 36}', 1.0, 0.0),
        ('["name", "age"]', 1.0, 0.0),
        ("3", 1.0, 0.0),
        ('{"name": "Ada", "age": NaN}', 0.0, 0.0),
        ('Here: {"name": "Ada", "age": 36}', 0.0, 0.0),
        ('{"name": "Ada", "age": 36', 0.0, 0.0),
        ("", 0.0, 0.0),
        ("[" * 10**5, 0.0, 0.0),
    ],
)
def test_json_parses_and_has_its_keys(completion: str, plain: float, keyed: float) -> None:
    assert scores(verifiers.json(), completion) == [plain]
    assert scores(verifiers.json({"name": "string", "age": "number"}), completion) == [keyed]


@pytest.mark.parametrize(
    ("kind", "values"),
    {
        "object": ["{}"],
        "array": ["[]"],
        "string": ['""'],
        "number": ["1", "1.5"],
        "integer": ["1"],
        "boolean": ["true"],
        "null": ["null"],
    }.items(),
)
def test_json_knows_the_types_of_json(kind: str, values: list[str]) -> None:
    every = ["{}", "[]", '""', "1", "1.5", "true", "null"]
    passed = scores(verifiers.json({"k": kind}), *(f'{{"k": {value}}}' for value in every))
    assert passed == [float(value in values) for value in every]


def test_length_costs_by_the_distance_to_the_target() -> None:
    verifier = verifiers.length(target=4)
    assert scores(verifier, "abcd", "abc", "abcdef", "", "a" * 8, "a" * 99) == [
        0.0, -0.25, -0.5, -1.0, -1.0, -1.0,
    ]  # fmt: skip
    assert scores(verifier, [{"role": "assistant", "content": "abc"}]) == [-0.25]
    assert verifiers.length(target=4, of="completion_ids")(completion_ids=[[1] * 6]) == [-0.5]


def test_overlong_costs_from_the_buffer_on() -> None:
    # TRL's example: 90 tokens at a limit of 100 and a buffer of 20.
    tokens = [[1] * n for n in (0, 80, 90, 100, 200)]
    verifier = verifiers.overlong(limit=100, buffer=20)
    assert verifier(completion_ids=tokens) == [0.0, 0.0, -0.5, -1.0, -1.0]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>2 + 2</think><answer>4</answer>", 1.0),
        ("\n<think>a <b>\n</think>\n\n<answer></answer> ", 1.0),
        ("<think>2 + 2</think> so <answer>4</answer>", 0.0),
        ("<answer>4</answer><think>2 + 2</think>", 0.0),
        ("<think>2 + 2</think><answer>4", 0.0),
        ("<think>2<think></think><answer>4</answer>", 0.0),
        ("<think>2<answer></think><answer>4</answer>", 0.0),
        ("<think>2 + 2</think><answer>4</answer><answer>5</answer>", 0.0),
        ("<think>2 + 2</think><answer>4</answer>!", 0.0),
        ("4", 0.0),
    ],
)
def test_tags_hold_the_whole_text(completion: str, score: float) -> None:
    assert scores(verifiers.tags("think", "answer"), completion) == [score]


ONE_EACH = {
    "number": verifiers.number(),
    "last_number": verifiers.last_number(),
    "exact": verifiers.exact(),
    "regex": verifiers.regex("a"),
    "json": verifiers.json({"a": "null"}),
    "length": verifiers.length(target=1),
    "overlong": verifiers.overlong(limit=2, buffer=1, of="completions"),
    "tags": verifiers.tags("a"),
}


def test_every_verifier_is_tried_here() -> None:
    assert sorted(ONE_EACH) == sorted(verifiers.__all__)


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_verifier_can_be_sent_to_a_process_under_its_name(name: str) -> None:
    verifier = ONE_EACH[name]
    sent = pickle.loads(pickle.dumps(verifier))
    given = {"completions": ["a", ""], "answer": ["a", "a"]}
    assert sent.__name__ == name
    assert sent(**given) == verifier(**given)


@pytest.mark.parametrize(
    "make",
    [
        lambda: verifiers.length(target=0),
        lambda: verifiers.overlong(limit=1, buffer=0),
        lambda: verifiers.json({"a": "date"}),
        lambda: verifiers.tags(),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"above 0, got 0|no JSON type \['date'\], but|one tag"):
        make()
