"""Formats by the names of columns: what is told apart, what it means, what is refused and why."""

import pytest

from rlhfjax.data import formats
from rlhfjax.data.formats import Class, Completion, Pair, Prompt, Ranking, Rating, Text, Unpaired
from rlhfjax.data.records import BadRecords, Place, Record
from rlhfjax.data.text import DataError

USER = {"role": "user", "content": "What color is the sky?"}
BLUE, GREEN = ({"role": "assistant", "content": color} for color in ("It is blue.", "Green."))
ALL = (*formats.JUDGED, *formats.SUPERVISED, *formats.PROMPTS)


def records(*rows: dict) -> list[Record]:
    return [Record(row, Place("f.jsonl", line)) for line, row in enumerate(rows, start=1)]


def only(row: dict, kinds=ALL):
    (example,) = formats.examples(records(row), kinds)
    return example


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a"}, Text(text="a")),
        ({"messages": [USER, BLUE]}, Text(text=[USER, BLUE])),
        ({"prompt": "a"}, Prompt(prompt="a")),
        ({"prompt": [USER]}, Prompt(prompt=[USER])),
        ({"prompt": "a", "completion": "b"}, Completion(prompt="a", completion="b")),
        (
            {"prompt": [USER], "completion": [BLUE]},
            Completion(prompt=[USER], completion=[BLUE]),
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            Pair(prompt="a", chosen="b", rejected="c"),
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_prob": 0.75},
            Pair(prompt="a", chosen="b", rejected="c", chosen_prob=0.75),
        ),
        (
            {"prompt": [USER], "chosen": [BLUE], "rejected": [GREEN]},
            Pair(prompt=[USER], chosen=[BLUE], rejected=[GREEN]),
        ),
        (
            {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            Pair(prompt=[USER], chosen=[BLUE], rejected=[GREEN]),
        ),
        (
            {"prompt": "What?", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            Pair(prompt=[USER], chosen=[BLUE], rejected=[GREEN]),
        ),
        (
            {"prompt": "a", "completion": "b", "label": True},
            Unpaired(prompt="a", completion="b", label=True),
        ),
        (
            {"prompt": "a", "completion": "b", "label": 0},
            Unpaired(prompt="a", completion="b", label=False),
        ),
        (
            {"prompt": "a", "completion": "b", "rating": 4},
            Rating(prompt="a", completion="b", label=4.0),
        ),
        ({"text": "b", "rating": 0.5}, Rating(prompt="", completion="b", label=0.5)),
        (
            {"prompt": "a", "completion": "b", "class": 2},
            Class(prompt="a", completion="b", label=2),
        ),
        ({"text": "b", "label": 1}, Class(prompt="", completion="b", label=1)),
        (
            {"prompt": "p", "completions": ["a", "b", "c"]},
            Ranking(prompt="p", completions=("a", "b", "c"), ranks=(0, 1, 2)),
        ),
        (
            {"prompt": "p", "completions": ["a", "b", "c", "d"], "ranks": [3, 1, 2, 1]},
            Ranking(prompt="p", completions=("b", "d", "c", "a"), ranks=(0, 0, 2, 3)),
        ),
        (
            {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 1]},
            Ranking(prompt="p", completions=("b", "a", "c"), ranks=(0, 1, 1)),
        ),
    ],
)
def test_a_record_is_what_its_columns_say(row: dict, expected) -> None:
    assert only(row) == formats.replace(expected, place=Place("f.jsonl", 1))
    further = {"answer": "18", "id": 3, "nothing": None}
    assert only(row | further).columns == {"answer": "18", "id": 3}


HUMAN = "\n\nHuman: Hi\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected", "split"),
    [
        # The example of TRL's documentation, and its rule: a space belongs to the responses.
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is", "The sky is green.", ("The sky is", "", " green.")),
        (f"{HUMAN} I am", f"{HUMAN} I will", (HUMAN, " I am", " I will")),
        (f"{HUMAN} I", f"{HUMAN} I will", (HUMAN, " I", " I will")),
        (
            f"{HUMAN} Hello{HUMAN} A",
            f"{HUMAN} Hello{HUMAN} B",
            (f"{HUMAN} Hello{HUMAN}", " A", " B"),
        ),
        (f"{HUMAN} 1{HUMAN} A", f"{HUMAN} 2{HUMAN} A", (HUMAN, f" 1{HUMAN} A", f" 2{HUMAN} A")),
        ([USER, BLUE, USER, GREEN], [USER, BLUE, USER], ([USER, BLUE, USER], [GREEN], [])),
        ([USER, BLUE, GREEN], [USER, GREEN, GREEN], ([USER], [BLUE, GREEN], [GREEN, GREEN])),
    ],
)
def test_an_implicit_prompt(chosen, rejected, split) -> None:
    assert formats.split(chosen, rejected) == split


def test_the_common_prefix() -> None:
    assert formats.common_prefix("abcd", "abxd", "abc") == 2
    assert formats.common_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert formats.common_prefix([1], []) == formats.common_prefix("a", "b") == 0
    assert formats.common_prefix("abc") == 3


def test_pairs_serve_those_who_want_less() -> None:
    row = {"chosen": f"{HUMAN} A", "rejected": f"{HUMAN} B", "id": 1}
    supervised, prompt = only(row, formats.SUPERVISED), only(row, formats.PROMPTS)
    assert (supervised.prompt, supervised.completion) == (HUMAN, " A")
    assert (prompt.prompt, prompt.responses, prompt.columns) == (HUMAN, (), {"id": 1})


def test_who_wants_prompts_gets_all_else_as_columns() -> None:
    prompt = only({"prompt": "a", "completion": "b", "answer": "18"}, formats.PROMPTS)
    assert prompt.columns == {"completion": "b", "answer": "18"}


def test_responses_in_their_order() -> None:
    assert only({"prompt": "a", "chosen": "b", "rejected": "c"}).responses == ("b", "c")
    assert only({"prompt": "a", "completions": ["b", "c"]}).responses == ("b", "c")
    assert only({"prompt": "a", "completion": "b"}).responses == ("b",)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no 'rejected', only 'chosen', 'prompt'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "no 'rejected', only"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt' is a int, not a string"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "mix strings and messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "\ud800"}, "'rejected' has half a surrogate"),
        (
            {"prompt": [{"content": "a"}], "chosen": [BLUE], "rejected": [GREEN]},
            "message 1 of 'prompt' is not an object with a 'role'",
        ),
        (
            {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [GREEN]},
            "'content' of message 1 of 'chosen' is missing, not a string",
        ),
        ({"prompt": "", "chosen": [USER], "rejected": [BLUE]}, "begin with nothing in common"),
        ({"prompt": "", "chosen": [USER], "rejected": [USER, BLUE]}, "part of the other"),
    ],
)
def test_a_record_of_another_type_is_bad_with_its_place(row: dict, reason: str) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    bad = BadRecords(1)
    found = formats.examples(records(good, row, good), formats.PREFERENCES, bad=bad)
    assert [example.place.line for example in found] == [1, 3]
    ((place, told),) = bad.found
    assert place == ("f.jsonl", 2)
    assert reason in told
    with pytest.raises(DataError, match=r"f\.jsonl:2: "):
        formats.examples(records(good, row, good), formats.PREFERENCES)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "completion": "b", "label": 2},
            "'label' is 2, not true or false; to a reward",
        ),
        (
            {"prompt": "a", "completion": "b", "label": "yes"},
            r"'label' is 'yes', not true or false\n",
        ),
        ({"prompt": "a", "completion": "b", "rating": "5"}, "'5' of 'rating' is not a finite"),
        ({"prompt": "a", "completion": "b", "rating": True}, "True of 'rating' is not a finite"),
        ({"prompt": "a", "completion": "b", "class": -1}, "the class is -1, not one of 0, 1, …"),
        ({"prompt": "a", "completions": ["b"]}, "'completions' is not a list of two or more"),
        ({"prompt": "a", "completions": ["b", 3]}, r"'completions\[1\]' is a int"),
        (
            {"prompt": "a", "completions": ["b", "c"], "ranks": [1]},
            "2 completions, but 1 say how good they are",
        ),
        ({"prompt": "a", "completions": ["b", "c"], "scores": 2}, "'scores' is a int, not a list"),
        ({"messages": "hello"}, "'messages' is 'hello', not a list"),
        ({"messages": []}, "'messages' is a list of no messages"),
        ({"prompt": [], "completion": [BLUE]}, "'prompt' is a list of no messages"),
    ],
)
def test_labels_that_mean_nothing_are_refused(row: dict, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        only(row)


def test_the_format_is_that_of_most_records() -> None:
    text, pair = {"text": "a"}, {"prompt": "a", "completion": "b"}
    bad = BadRecords(1)
    found = formats.examples(records(pair, text, text), formats.SUPERVISED, bad=bad)
    assert found == [Text(text="a", place=Place("f.jsonl", line)) for line in (2, 3)]
    assert bad.found[0][1] == "no 'text', only 'completion', 'prompt'"


def test_no_format_is_refused_with_the_columns_found_and_the_formats_there_are() -> None:
    with pytest.raises(DataError) as error:
        formats.examples(records({"question": "a", "answer": "b"}), formats.PREFERENCES)
    assert "f.jsonl: the records have the columns answer, question, which" in str(error.value)
    assert "prompt, chosen, rejected; chosen, rejected;" in str(error.value)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"input": "", "instruction": "a", "output": "b"},
            "; rename instruction=prompt output=completion; an input belongs into the prompt$",
        ),
        ({"prompt": "a", "answer": "b", "question": "c"}, "; rename answer=completion$"),
        ({"conversations": [BLUE]}, "; rename conversations=messages$"),
        ({"conversations": [{"from": "gpt", "value": "b"}]}, "ShareGPT's, cannot be renamed"),
        ({"a": 1}, "; rename or add columns$"),
    ],
)
def test_columns_with_other_names_of_long_standing_are_known(row: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        formats.examples(records(row), formats.SUPERVISED)


def test_no_good_record_is_refused() -> None:
    with pytest.raises(DataError, match="no good record among 1"):
        formats.examples(records({"prompt": 1}), formats.PROMPTS, bad=BadRecords(5))


def test_the_steps_of_an_answer_are_no_ranking() -> None:
    row = {"prompt": "1 + 1", "completions": ["One", "two"], "labels": [True, False]}
    with pytest.raises(DataError, match="steps of one answer"):
        only(row)
