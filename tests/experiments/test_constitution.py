"""Learning from principles at toy size: all that it leaves behind, and the same when it goes on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from experiments.constitution import Args, main
from rlhfjax.data import formats, records
from rlhfjax.feedback import principles

TINY = Args(
    seed=3, texts=160, vocab=300, layers=1, width=16, heads=2, batch=16, sft_epochs=1,
    judge_epochs=1, judge_alone=0, rounds=2, revision_epochs=1, pairs=32, judged=16,
    reward_epochs=1, prompt_tokens=8, response_tokens=8, iterations=2, prompts=12,
)  # fmt: skip
NAMES = ("warm", "cold")


class Done(NamedTuple):
    out: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp("runs") / "not" / "yet"
    return Done(out, main(replace(TINY, out=out)))


@pytest.mark.slow
class TestRun:
    def test_leaves_its_files(self, run: Done) -> None:
        own = {f"{kind}_{name}" for kind in ("revisions", "labels", "samples") for name in NAMES}
        assert {path.stem for path in run.out.iterdir()} == own | {
            "config", "env", "metrics", "summary", "curves", "principles", "checkpoints"
        }  # fmt: skip
        assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert [p.name for p in principles.read(run.out / "principles.yaml")] == list(NAMES)

    def test_the_summary_holds_what_was_promised(self, run: Done) -> None:
        summary = json.loads((run.out / "summary.json").read_text(encoding="utf-8"))
        assert summary == json.loads(json.dumps(run.summary))
        rates = ("gold_positive_rate", "gold_positive_rate_after_revision")
        shares = [f"{name}/{rate}" for name in NAMES for rate in rates]
        shares += ["judge/agreement", "judge/agreement_question", "gold/test_accuracy"]
        assert all(0 <= summary[name] <= 1 for name in shares)
        kls = [summary[f"{name}/{kl}"] for name in NAMES for kl in ("kl", "kl_after_revision")]
        assert np.isfinite(kls).all() and len(set(kls)) == len(kls)
        assert summary["judge/distance_before"] >= summary["judge/distance_after"]
        assert abs(summary["judge/bias_after"]) < 1e-6
        assert summary["compilations_after_first_iteration"] == 0

    def test_labels_are_records_with_their_principle_and_judge(self, run: Done) -> None:
        for name in NAMES:
            found = records.read(run.out / f"labels_{name}.jsonl")
            assert 0 < len(found) <= TINY.pairs
            for pair in formats.examples(found, formats.PREFERENCES):
                assert 0.5 <= pair.chosen_prob <= 1.0
                assert pair.columns == {"principle": name, "judge": "judge"}

    def test_revisions_are_records_of_what_was_criticised(self, run: Done) -> None:
        for name in NAMES:
            found = [record.fields for record in records.read(run.out / f"revisions_{name}.jsonl")]
            assert 0 < len(found) <= TINY.rounds * TINY.pairs
            for record in found:
                assert record["principle"] == name and record["judge"] == "judge"
                assert record["critique"] != " yes"
                assert record["completion"] and record["completion"] != record["response"]
            # The second round goes on from what the first one has made.
            completions = {record["completion"] for record in found[: TINY.pairs]}
            assert any(record["response"] in completions for record in found)

    def test_every_stage_is_in_the_log(self, run: Done) -> None:
        lines = (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        stages = [row["stage"] for row in map(json.loads, lines)]
        assert list(dict.fromkeys(stages)) == [
            "sft", "judge", "revision_warm", "reward_warm", "ppo_warm", "revision_cold",
            "reward_cold", "ppo_cold",
        ]  # fmt: skip
        assert stages.count("ppo_warm") == stages.count("ppo_cold") == 2

    def test_it_goes_on_to_the_same_end(self, run: Done) -> None:
        """The rest of a stage, and what lies between the stages with the same keys."""
        log = (run.out / "metrics.jsonl").read_text(encoding="utf-8")
        steps = (run.out / "checkpoints" / "ppo_cold").glob("[0-9]*")
        shutil.rmtree(max(steps, key=lambda path: int(path.name)))
        (run.out / "revisions_cold.jsonl").rename(run.out / "before.jsonl")
        again = main(replace(TINY, out=run.out, resume=True))
        for name, number in run.summary.items():
            if not name.startswith(("seconds/", "compilations")):
                assert again[name] == number, name
        assert (run.out / "metrics.jsonl").read_text(encoding="utf-8") == log
        told = [(run.out / f"{name}.jsonl").read_bytes() for name in ("before", "revisions_cold")]
        assert told[0] == told[1]


@pytest.mark.parametrize("wrong", [{"pairs": 40}, {"prompts": 16}])
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must divide"):
        main(replace(TINY, out=tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()
