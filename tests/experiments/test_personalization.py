"""People and their policies at toy size: everything a run leaves behind, and the same end twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.personalization import (
    ASPECTS,
    Args,
    Vocabulary,
    draw_tastes,
    generated,
    main,
    share_of_comparisons,
)
from rlhfjax.data.text import DataError

SIZES = Args(
    people=4, rounds=3, comparisons=8, candidates=8, members=3, directions=6, texts=600, width=8,
    heads=1, epochs=1, rank=1, iterations=2, group=4, judged=8, timed=0, seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("runs") / "people"
    return out, main(replace(SIZES, out=out))


@pytest.mark.slow
class TestRun:
    def test_leaves_its_files(self, run: tuple[Path, dict[str, Any]]) -> None:
        out, summary = run
        names = {"summary.json", "metrics.jsonl", "samples.md", "people.png", "checkpoints"}
        assert names <= {path.name for path in out.iterdir()}
        assert (out / "people.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in lines if row["stage"] == "people"]
        assert steps == [1, 2]
        rows = [x for x in (out / "samples.md").read_text().splitlines() if x.startswith("| ")]
        assert len(rows) == 1 + SIZES.people

    def test_the_summary_tells_of_everybody(self, run: tuple[Path, dict[str, Any]]) -> None:
        _, summary = run
        assert len(summary["people"]) == 4
        for person in summary["people"]:
            assert person["gain"] == pytest.approx(person["own"] - person["shared"], abs=1e-5)
            assert person["gain_error"] > 0 and np.isfinite(person["kl"])
        assert summary["choice/comparisons"] == [8, 16, 24]
        for name in ("active", "random"):
            accuracies = summary[f"choice/accuracy_{name}"]
            assert len(accuracies) == 3 and all(0 <= x <= 1 for x in accuracies)
        assert summary["compilations_after_first_round"] == 0

    def test_a_run_that_was_broken_off_ends_the_same(
        self, run: tuple[Path, dict[str, Any]], tmp_path: Path
    ) -> None:
        out, summary = run
        copy = shutil.copytree(out, tmp_path / "copy")
        shutil.rmtree(copy / "checkpoints" / "people" / "2")
        (copy / "summary.json").unlink()
        again = main(replace(SIZES, out=copy, resume=True))
        for name, number in summary.items():
            if not name.startswith("seconds/"):
                assert again[name] == number, name
        assert (copy / "metrics.jsonl").read_bytes() == (out / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        ({"candidates": 4}, ("8", "4")),
        ({"rounds": 1}, ("rounds", "2")),
        ({"step": 5}, ("5", "24")),
        ({"judged": 2}, ("2", "4")),
        ({"directions": 9}, ("9", "8")),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, settings: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        main(replace(SIZES, out=tmp_path / "out", **settings))
    assert all(number in str(error.value) for number in numbers)
    assert not (tmp_path / "out").exists()


class TestTastes:
    def test_contradict_one_another_in_every_aspect_but_the_words(self) -> None:
        args = Args(seed=1)
        vocabulary = Vocabulary(generated(1000, 1), args)
        tastes = draw_tastes(vocabulary, args)
        mains = [told.split(",")[0].split(" ")[0] for told in tastes.told]
        for aspect in ASPECTS:
            assert mains.count(f"+{aspect}") == 3 and mains.count(f"−{aspect}") == 1
        # Nothing but words and marks is worth anything.
        assert not tastes.tables[:, :3].any()
        word, mark = vocabulary.ids["lovely"], vocabulary.ids["!"]
        assert tastes.tables[0, word] > 0 > tastes.tables[12, word]
        assert tastes.tables[3, mark] > 0 > tastes.tables[15, mark]

    def test_texts_that_are_too_few_are_refused(self) -> None:
        with pytest.raises(DataError, match="100 of 100 texts"):
            Vocabulary(generated(100, 0), Args())


def test_share_of_comparisons_by_hand() -> None:
    asked = np.array([10, 20, 30, 40])
    random = np.array([0.5, 0.6, 0.7, 0.8])
    # 0.8 lies half-way between the second point and the third.
    assert share_of_comparisons(asked, np.array([0.5, 0.7, 0.9, 0.9]), random) == 25 / 40
    assert share_of_comparisons(asked, np.array([0.5, 0.6, 0.7, 0.79]), random) is None
    assert share_of_comparisons(asked, np.array([0.9, 0.9, 0.9, 0.9]), random) == 10 / 40
