"""Learning from principles at toy size: all that it leaves behind, and the same when it goes on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from experiments.constitution import Args, Padded, draw, main
from rlhfjax.data import formats, records
from rlhfjax.feedback import principles

TINY = Args(
    seed=3, texts=160, vocab=300, layers=1, width=16, heads=2, batch=16, sft_epochs=1,
    judge_epochs=1, judge_alone=0, pairs=32, judged=16, reward_epochs=1, prompt_tokens=8,
    response_tokens=8, iterations=2, prompts=12,
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
        own = {f"{kind}_{name}" for kind in ("labels", "samples") for name in NAMES}
        assert {path.stem for path in run.out.iterdir()} == own | {
            "config", "env", "metrics", "summary", "curves", "principles", "checkpoints"
        }  # fmt: skip
        assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert [p.name for p in principles.read(run.out / "principles.yaml")] == list(NAMES)

    def test_the_summary_holds_what_was_promised(self, run: Done) -> None:
        summary = json.loads((run.out / "summary.json").read_text(encoding="utf-8"))
        assert summary == json.loads(json.dumps(run.summary))
        shares = [f"{name}/gold_positive_rate" for name in NAMES]
        shares += ["judge/agreement", "judge/agreement_question", "gold/test_accuracy"]
        assert all(0 <= summary[name] <= 1 for name in shares)
        assert all(np.isfinite(summary[f"{name}/kl"]) for name in NAMES)
        assert summary["judge/distance_before"] >= summary["judge/distance_after"]
        assert abs(summary["judge/bias_after"]) < 1e-6
        assert summary["compilations_after_first_iteration"] == 0

    def test_labels_are_records_with_their_principle_and_judge(self, run: Done) -> None:
        probs = {}
        for name in NAMES:
            found = records.read(run.out / f"labels_{name}.jsonl")
            for pair in formats.examples(found, formats.PREFERENCES):
                assert 0.5 <= pair.chosen_prob <= 1.0
                assert pair.columns == {"principle": name, "judge": "judge"}
            probs[name] = [record.fields["chosen_prob"] for record in found]
        assert 0 < len(probs["warm"]) <= TINY.pairs
        # The same pairs, asked another question.
        assert len(probs["warm"]) == len(probs["cold"]) and probs["warm"] != probs["cold"]

    def test_every_stage_is_in_the_log(self, run: Done) -> None:
        lines = (run.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        stages = [row["stage"] for row in map(json.loads, lines)]
        assert list(dict.fromkeys(stages)) == [
            "sft", "judge", "reward_warm", "ppo_warm", "reward_cold", "ppo_cold"
        ]  # fmt: skip
        assert stages.count("ppo_warm") == stages.count("ppo_cold") == 2

    def test_it_goes_on_to_the_same_end(self, run: Done) -> None:
        """Of what is broken off after the last stage has begun, the rest is done again."""
        log = (run.out / "metrics.jsonl").read_text(encoding="utf-8")
        last = run.out / "checkpoints" / "ppo_cold"
        newest = max(last.iterdir(), key=lambda path: int(path.name) if path.name.isdigit() else -1)
        for file in sorted(newest.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        newest.rmdir()
        again = main(replace(TINY, out=run.out, resume=True))
        for name, number in run.summary.items():
            if not name.startswith(("seconds/", "compilations")):
                assert again[name] == number, name
        assert (run.out / "metrics.jsonl").read_text(encoding="utf-8") == log


@pytest.mark.parametrize("wrong", [{"pairs": 40}, {"prompts": 16}])
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must divide"):
        main(replace(TINY, out=tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_prompts_come_once_before_any_comes_again() -> None:
    prompts = Padded(np.arange(5)[:, None], np.ones((5, 1), bool))
    found = np.concatenate([draw(prompts, 3, i, seed=1).tokens[:, 0] for i in range(5)])
    assert sorted(found) == sorted([*range(5)] * 3)
    for start in range(0, 15, 5):
        assert sorted(found[start : start + 5]) == list(range(5))
