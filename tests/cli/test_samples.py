from pathlib import Path

import numpy as np
import pytest

from rlhfjax.cli.samples import write_samples, write_transcripts


def table(
    path: Path, prompt: str = "the film", before: str = "is bad", after: str = "is good"
) -> str:
    write_samples(
        path,
        [prompt],
        [before],
        [after],
        scores_before=np.float32([-1.234]),
        scores_after=[0.5],
        gold_before=np.array([False]),
        gold_after=[True],
    )
    return path.read_text(encoding="utf-8")


def cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[-1].strip("|").split(" | ")]


def test_a_row_has_both_texts_scores_and_verdicts(tmp_path: Path) -> None:
    text = table(tmp_path / "samples.md")
    assert cells(text) == [
        "the film",
        "is bad",
        "is good",
        "-1.23 → +0.50",
        "negative → positive",
    ]
    header, rule, row = text.splitlines()[-3:]
    assert header.count("|") == rule.count("|") == row.count("|") == 6


@pytest.mark.parametrize(
    ("sample", "cell"),
    [
        ("a | b", r"a \| b"),
        ("<b>*x*</b> _y_ `z` [l](u) & $1", r"\<b\>\*x\*\</b\> \_y\_ \`z\` \[l\](u) \& \$1"),
        ("back\\slash", r"back\\slash"),
        ("two\nlines\r\t", r"two\\x0alines"),
        ("nul\x00 bell\x07 sep\u2028end", r"nul\\x00 bell\\x07 sep\\x2028end"),
        ("café 电影 �", "café 电影 �"),
    ],
)
def test_texts_appear_as_they_are(tmp_path: Path, sample: str, cell: str) -> None:
    text = table(tmp_path / "samples.md", after=sample)
    assert cells(text)[2] == cell
    assert len(text.splitlines()) == 5


def test_unequal_numbers_of_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_samples(
            tmp_path / "samples.md",
            ["a", "b"],
            ["c"],
            ["d"],
            scores_before=[0],
            scores_after=[0],
            gold_before=[True],
            gold_after=[True],
        )


def test_a_transcript_tells_what_the_policy_wrote_from_what_it_was_given(tmp_path: Path) -> None:
    path = tmp_path / "not_made_yet" / "samples.md"
    episodes = [
        [(False, "1+2="), (True, "[1+2]"), (False, "3"), (True, "3.")],
        [(False, "2+2="), (True, "*4*")],
    ]
    write_transcripts(path, episodes, [1.0, np.nan])
    *_, header, rule, first, second = path.read_text(encoding="utf-8").splitlines()
    assert header == "| prompt | turn 1 | given | turn 2 | return |"
    assert rule == "|---|---|---|---|---|"
    assert first == r"| 1+2= | **\[1+2\]** | 3 | **3.** | +1 |"
    assert second == r"| 2+2= | **\*4\*** |  |  | +nan |"
    with pytest.raises(ValueError, match="shorter"):
        write_transcripts(path, episodes, [1.0])


def test_a_transcript_has_nothing_for_a_blank_turn_and_a_space_for_a_line_break(
    tmp_path: Path,
) -> None:
    path = tmp_path / "samples.md"
    episodes = [[(False, "two\nlines\n"), (True, " \n"), (False, ""), (True, "a\r\nb\x07")]]
    write_transcripts(path, episodes, [0.5])
    last = path.read_text(encoding="utf-8").splitlines()[-1]
    assert last == r"| two lines |  |  | **a b\\x07** | +0.5 |"
