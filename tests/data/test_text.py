from collections import Counter
from pathlib import Path

import pytest

from rlhfjax.data.text import DataError, LabelledText, read_labelled, split_by_hash


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.pos").write_bytes(b"good\n")
    (tmp_path / "a.neg").write_bytes(b"bad\n")
    return tmp_path


def test_reads_every_file_of_both_kinds_in_the_order_of_names(folder: Path) -> None:
    (folder / "b.pos").write_bytes(b"fine\nnice\n")
    (folder / "README.txt").write_bytes(b"not a text")
    (folder / "folder.pos").mkdir()
    assert read_labelled(folder) == [
        LabelledText("good", True),
        LabelledText("fine", True),
        LabelledText("nice", True),
        LabelledText("bad", False),
    ]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"one\ntwo", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        ("one\u2028still one\ntwo\n".encode(), ["one\u2028still one", "two"]),
        (b"one\x0bstill\x0cone\x1cyes\rand on\ntwo", ["one\x0bstill\x0cone\x1cyes\rand on", "two"]),
        ("  caf\u00e9 \n".encode(), ["caf\u00e9"]),
    ],
    ids=["no last line feed", "byte order mark", "CRLF", "U+2028", "other separators", "spaces"],
)
def test_only_a_line_feed_ends_a_text(folder: Path, content: bytes, texts: list[str]) -> None:
    (folder / "a.pos").write_bytes(content)
    assert [t.text for t in read_labelled(folder) if t.label] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.pos: empty file"),
        (b"\xef\xbb\xbf", "a.pos: empty file"),
        (b"one\n\nthree\n", "a.pos:2: empty line"),
        (b"one\n \t\r\nthree\n", "a.pos:2: empty line"),
        (b"\n", "a.pos:1: empty line"),
        (b"one\n\n", "a.pos:2: empty line"),
        (b"one\ntwo\nabc\xff\n", "a.pos:3: byte 4 of the line is not UTF-8"),
        ("one".encode("utf-16"), "a.pos:1: byte 1 of the line is not UTF-8"),
    ],
)
def test_bad_content_names_file_and_line(folder: Path, content: bytes, message: str) -> None:
    (folder / "a.pos").write_bytes(content)
    with pytest.raises(DataError) as error:
        read_labelled(folder)
    assert message in str(error.value)


def test_a_missing_folder_or_file_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="nowhere: not a folder"):
        read_labelled(folder / "nowhere")
    with pytest.raises(DataError, match="not a folder"):
        read_labelled(folder / "a.pos")
    (folder / "a.neg").unlink()
    with pytest.raises(DataError, match=r"no \*\.neg file; add one"):
        read_labelled(folder)
    (folder / "a.pos").unlink()
    with pytest.raises(DataError, match=r"no \*\.pos file"):
        read_labelled(folder)


TEXTS = [LabelledText(f"text {i}", i % 3 == 0) for i in range(4000)]
FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def test_every_text_is_in_one_split_and_shares_are_as_asked() -> None:
    splits = split_by_hash(TEXTS, FRACTIONS)
    assert list(splits) == list(FRACTIONS)
    assert Counter(t for split in splits.values() for t in split) == Counter(TEXTS)
    for name, fraction in FRACTIONS.items():
        # Four standard deviations of a binomial share.
        bound = 4 * (fraction * (1 - fraction) / len(TEXTS)) ** 0.5
        assert abs(len(splits[name]) / len(TEXTS) - fraction) < bound


def test_order_of_the_input_does_not_matter() -> None:
    assert split_by_hash(TEXTS[::-1], FRACTIONS) == split_by_hash(TEXTS, FRACTIONS)


def test_a_text_keeps_its_split_when_others_come_or_go() -> None:
    few, many = split_by_hash(TEXTS[:100], FRACTIONS), split_by_hash(TEXTS, FRACTIONS)
    assert all(set(few[name]) <= set(many[name]) for name in FRACTIONS)


def test_the_hash_is_the_same_in_every_process_and_version() -> None:
    # From `printf '\0text 0' | b2sum -l 64` and so on, over 2^64:
    # 0.842, 0.994, 0.720, 0.771 for text 0, 1, 2, 3.
    splits = split_by_hash(TEXTS[:4], {"low": 0.8, "high": 0.2})
    assert [t.text for t in splits["low"]] == ["text 2", "text 3"]
    assert [t.text for t in splits["high"]] == ["text 0", "text 1"]


def test_another_salt_is_another_split() -> None:
    plain, salted = (split_by_hash(TEXTS, FRACTIONS, salt=s)["train"] for s in ("", "other"))
    shared = len(set(plain) & set(salted)) / len(plain)
    assert abs(shared - 0.7) < 0.05


def test_equal_texts_count_once_with_the_label_of_most() -> None:
    liked, disliked = LabelledText("x", True), LabelledText("x", False)
    assert split_by_hash([liked, liked], {"all": 1.0}) == {"all": [liked]}
    for order in ([liked, disliked, liked], [liked, liked, disliked]):
        assert split_by_hash(order, {"all": 1.0}) == {"all": [liked]}
    assert split_by_hash([liked, disliked], {"all": 1.0}) == {"all": []}


@pytest.mark.parametrize("fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}])
def test_fractions_must_be_shares(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_hash(TEXTS, fractions)
