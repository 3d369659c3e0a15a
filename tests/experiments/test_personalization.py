"""People and their policies at toy size: everything a run leaves behind, and the same end twice."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import personalization
from experiments.personalization import (
    ASPECTS,
    Args,
    Machine,
    Vocabulary,
    draw_tastes,
    figures,
    generated,
    main,
    share_of_comparisons,
)
from rlhfjax.data.text import DataError, LabelledText

SIZES = Args(
    people=4, rounds=3, comparisons=8, candidates=8, members=3, directions=6, texts=600, width=8,
    heads=1, epochs=1, rank=1, iterations=2, group=4, judged=24, timed=0, seed=3,
    learning_rate=0.1,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_once() -> Iterator[None]:
    """A run that goes on has everything from its folder but the programs of the run before."""
    of_size = cache(partial(Machine, args=SIZES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(personalization, "Machine", lambda vocab_size, _: of_size(vocab_size))
        yield


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
        counts = Counter(row["stage"] for row in lines)
        # The rival has as many updates as people's own policies, those of their start included.
        assert counts == {"sft": 9, "shared": 3, "people": 2, "pooled": 5}
        rows = [x for x in (out / "samples.md").read_text().splitlines() if x.startswith("| ")]
        assert len(rows) == 1 + SIZES.people

    def test_the_rival_is_made_louder_until_it_has_moved_as_far(
        self, run: tuple[Path, dict[str, Any]]
    ) -> None:
        lines = [json.loads(x) for x in (run[0] / "metrics.jsonl").read_text().splitlines()]
        shared, middle, pooled = (
            [row[name] for row in lines if row["stage"] == stage]
            for stage, name in (
                ("shared", "louder"), ("people", "objective/kl_of_middle"), ("pooled", "louder"),
            )
        )  # fmt: skip
        assert shared == [1.0] * 3 and pooled[0] == 1.0
        nats = [row["objective/kl"] for row in lines if row["stage"] == "pooled"]
        assert middle[-1] > 0
        for before, kl, after in zip(pooled, nats, pooled[1:], strict=False):
            change = math.sqrt(middle[-1] / max(kl, 1e-6))
            assert after == pytest.approx(before * min(max(change, 0.5), 2.0), rel=1e-5)

    def test_the_summary_tells_of_everybody(self, run: tuple[Path, dict[str, Any]]) -> None:
        _, summary = run
        assert len(summary["people"]) == 4
        for person in summary["people"]:
            for rival in ("shared", "pooled"):
                gain = person["own"] - person[rival]
                assert person[f"gain_over_{rival}"] == pytest.approx(gain, abs=1e-9)
                assert person[f"error_of_gain_over_{rival}"] > 0
            assert np.isfinite(person["kl"])
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
        shutil.rmtree(copy / "checkpoints" / "pooled")
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
        ({"judged": 20}, ("20", "4", "24")),
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
        tables, told = draw_tastes(vocabulary, args)
        mains = [taste.split(",")[0].split(" ")[0] for taste in told]
        for aspect in ASPECTS:
            assert mains.count(f"+{aspect}") == 3 and mains.count(f"−{aspect}") == 1
        # Nothing but words and marks is worth anything.
        assert not tables[:, :3].any()
        word, mark = vocabulary.ids["lovely"], vocabulary.ids["!"]
        assert tables[0, word] > 0 > tables[12, word]
        assert tables[3, mark] > 0 > tables[15, mark]

    def test_texts_that_are_too_few_are_refused(self) -> None:
        with pytest.raises(DataError, match=r"100 of 100 texts .* 50 of them liked"):
            Vocabulary(generated(100, 0), Args())

    def test_long_texts_are_left_out_and_rare_words_are_all_the_same(self) -> None:
        words = [LabelledText(f"a{i} the film", i % 2 == 0) for i in range(600)]
        long = [LabelledText("the film " * 9, True)] * 10
        vocabulary = Vocabulary([*words, *long], Args(vocab=2))
        assert vocabulary.words[4:] == ["the", "film"] and len(vocabulary.texts.tokens) == 600
        assert vocabulary.decode(vocabulary.texts.tokens[:1]) == ["… the film"]

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("short and plain film number", "differ in polarity"),
            ("a b c", "0 words of the texts can be favourites"),
        ],
    )
    def test_texts_without_anything_to_prefer_are_refused(self, text: str, told: str) -> None:
        args = Args()
        vocabulary = Vocabulary([LabelledText(text, i % 2 == 0) for i in range(600)], args)
        with pytest.raises(DataError, match=told):
            draw_tastes(vocabulary, args)


def test_figures_by_hand() -> None:
    """Of two people: the language model is worth 0, and rows are policies, columns people."""
    means = np.array([[0, 0], [1, 0], [2, -1], [3, 5], [1, 4]])
    worths = means[:, :, None] + np.array([-1.0, 1.0, -1.0, 1.0])
    found = figures(worths, np.array([0.0, 0.1, 0.7, 0.5, 0.7]), ["a", "b"])
    first, second = found["people"]
    assert first["own"] == 3 and first["gain_over_shared"] == 2 and first["gain_over_pooled"] == 1
    assert first["error_of_gain_over_shared"] == pytest.approx(math.sqrt(1 / 4 + 1 / 4))
    # The second one likes the texts of the first one's policy better than those of her own.
    assert (first["rank_of_own"], second["rank_of_own"]) == (1, 2)
    assert second["own"] == 4 and second["gain_over_pooled"] == 5
    assert found["people/own_is_best"] == 1 and found["people/mean_rank_of_own"] == 1.5
    assert found["people/better_off_than_pooled"] == 2
    assert found["people/better_off_than_pooled_by_two_errors"] == 1
    assert found["people/mean_gain_over_pooled"] == 3
    assert (found["shared/kl"], found["pooled/kl"]) == (0.1, 0.7)
    assert found["people/mean_kl"] == pytest.approx(0.6)
    assert found["policies_by_tastes"] == [[3, 5], [1, 4]]


def test_share_of_comparisons_by_hand() -> None:
    asked = np.array([10, 20, 30, 40])
    random = np.array([0.5, 0.6, 0.7, 0.8])
    # 0.8 lies half-way between the second point and the third.
    assert share_of_comparisons(asked, np.array([0.5, 0.7, 0.9, 0.9]), random) == 25 / 40
    assert share_of_comparisons(asked, np.array([0.5, 0.6, 0.7, 0.79]), random) is None
    assert share_of_comparisons(asked, np.array([0.9, 0.9, 0.9, 0.9]), random) == 10 / 40
