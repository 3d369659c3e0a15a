"""Every kind of file gives the same records, each with its place, and no bad one passes unseen."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from rlhfjax.data.records import BadRecords, Place, Record, read, renamed
from rlhfjax.data.text import DataError

ROWS = [{"text": "café", "n": 1}, {"text": "a\nb\u2028c", "n": None}, {"text": "", "n": [1, {}]}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def found(path: Path, **options) -> list[tuple[int, dict]]:
    return [(record.place.line, record.fields) for record in read(path, **options)]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", LINES, [1, 2, 3]),
        ("a.jsonl", LINES.removesuffix(b"\n"), [1, 2, 3]),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"), [1, 2, 3]),
        ("a.jsonl", b"\n" + LINES.replace(b"\n", b"\n \n"), [2, 4, 6]),
        ("a.jsonl.gz", gzip.compress(LINES), [1, 2, 3]),
        ("a.json", LINES, [1, 2, 3]),
        ("a.json", json.dumps(ROWS).encode(), [1, 1, 1]),
        ("a.json", b"\n" + json.dumps(ROWS, indent=1).encode(), [3, 7, 11]),
        ("a.json", b"\xef\xbb\xbf[" + b"\n,".join(LINES.splitlines()) + b"]", [1, 2, 3]),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode()), [1, 1, 1]),
    ],
    ids=[
        "lines", "no last line feed", "byte order mark, CRLF", "empty lines", "lines.gz",
        "lines in .json", "array", "indented array", "array with a mark", "array.gz",
    ],
)  # fmt: skip
def test_records_and_their_lines(
    tmp_path: Path, name: str, content: bytes, lines: list[int]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert found(tmp_path / name) == list(zip(lines, ROWS, strict=True))


def test_a_folder_gives_its_files_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("train-2.json", "train-1.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}))
    (tmp_path / "README.md").write_text("not a record")
    (tmp_path / "more.jsonl").mkdir()
    names = [record.fields["name"] for record in read(tmp_path)]
    assert names == ["test.jsonl", "train-1.jsonl", "train-2.json"]
    train = read(tmp_path, pattern="train*")
    assert [record.fields["name"] for record in train] == names[1:]
    assert str(train[0].place) == f"{tmp_path}/train-1.jsonl:1"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not JSON, character 9: Expecting value"),
        (b"plain text", "not JSON, character 1"),
        (b'["text"]', "list, not an object"),
        (b"3", "int, not an object"),
        (b'{"n": NaN}', "not JSON: NaN; write null"),
        (b'{"text": "abc\xff"}', "not UTF-8, byte 14"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_line_is_told_with_its_place_and_left_out(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"n": 1}\n' + line + b'\n{"n": 3}\n')
    bad = BadRecords(1)
    assert found(tmp_path / "a.jsonl", bad=bad) == [(1, {"n": 1}), (3, {"n": 3})]
    ((place, told),) = bad.found
    assert place == (str(tmp_path / "a.jsonl"), 2)
    assert reason in told
    with pytest.raises(DataError, match=r"(?s)1 bad records:.*a\.jsonl:2: .*correct them, or"):
        read(tmp_path / "a.jsonl")


def test_an_element_of_an_array_that_is_no_object_is_a_bad_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"n": 1},\n 2,\n {"n": 3}]')
    bad = BadRecords(1)
    assert found(tmp_path / "a.json", bad=bad) == [(1, {"n": 1}), (3, {"n": 3})]
    assert bad.found == [((str(tmp_path / "a.json"), 2), "int, not an object: {…}")]


def test_too_many_are_refused_with_the_first_ones() -> None:
    bad = BadRecords(11)
    for line in range(11):
        bad.add(Place("f", line), "wrong")
    bad.check()
    bad.add(Place("f", 11), "wrong")
    with pytest.raises(DataError) as error:
        bad.check()
    assert "12 bad records:\n  f:0: wrong\n" in str(error.value)
    assert "f:9: wrong\n  and 2 more" in str(error.value)
    assert "f:10" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES * 99)[:-9], r"a\.jsonl\.gz: damaged behind line 29\d"),
        ("a.jsonl.gz", LINES, "damaged behind line 0"),
        ("a.json", b'[{"n": 1},\n{"n" 2}]', r"a\.json: not JSON, line 2, character 6"),
        ("a.json", b'[{"n": 1},\n"\xff"]', r"not UTF-8, line 2, byte 2"),
        ("a.jsonl", b"\n \n", "no records; give"),
        ("a.json", b"[]", "no records; give"),
        ("a.csv", b"n\n1\n", r"not a file of records; give one of \.jsonl"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, bad=BadRecords(1000))


def test_a_folder_without_such_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file train\* of one of \.jsonl"):
        read(tmp_path, pattern="train*")
    with pytest.raises(DataError, match=r"nowhere: no such file or folder$"):
        read(tmp_path / "nowhere")


def test_of_a_name_of_the_hub_it_is_said_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fetch = "hf download trl-lib/tldr --repo-type dataset --local-dir tldr"
    with pytest.raises(DataError, match=fetch):
        read("trl-lib/tldr")
    (tmp_path / "trl-lib").mkdir()
    with pytest.raises(DataError, match=r"no such file or folder$"):
        read("trl-lib/tldr")


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "n": 1}, {"prompt": None, "n": 2}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    assert found(tmp_path / "a.parquet") == [(1, rows[0]), (2, rows[1])]
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: not a parquet file that can be read"):
        read(tmp_path / "a.parquet")


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'rlhfjax\[parquet\]'"):
        read(tmp_path / "a.parquet")


def test_columns_are_renamed() -> None:
    place = Place("f", 1)
    records = [Record({"question": "q", "prompt": "p", "n": 1}, place), Record({"n": 2}, place)]
    assert renamed(records, {"question": "prompt"}) == [
        Record({"n": 1, "prompt": "q"}, place),
        Record({"n": 2}, place),
    ]
    with pytest.raises(
        DataError, match="f: no column questions to rename; there are n, prompt, quest"
    ):
        renamed(records, {"questions": "prompt"})
