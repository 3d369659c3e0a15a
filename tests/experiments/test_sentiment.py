"""The main job at toy size: everything it leaves behind, and the same twice."""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer

from experiments.sentiment import (
    Args,
    ModelArgs,
    PPOArgs,
    RewardArgs,
    SFTArgs,
    build_models,
    main,
    pairwise_accuracy,
)
from rlhfjax import checkpoint
from rlhfjax.data.generated import generated_corpus, write_corpus
from rlhfjax.data.text import DataError, LabelledText

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "sentiment.py"
SIZES = Args(
    seed=3,
    model=ModelArgs(vocab=300, layers=1, width=16, heads=2, context=64),
    sft=SFTArgs(epochs=1, batch=32, buckets=2),
    reward=RewardArgs(epochs=1, batch=32, buckets=1),
    ppo=PPOArgs(iterations=3, prompts=16, minibatches=2, response_tokens=8),
)


class Run(NamedTuple):
    out: Path
    summary: dict[str, Any]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        lines = (self.out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if row["stage"] == stage]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 texts, some of them longer than the context."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = generated_corpus(400, seed=0)
    long = [LabelledText(f"{text} {text} {text} {text}", label) for text, label in texts[:20]]
    write_corpus(folder, texts + long)
    return folder


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "not" / "made" / "yet"
    return Run(out, main(replace(SIZES, data=corpus, out=out)))


@pytest.mark.slow
class TestRun:
    def test_leaves_its_files(self, run: Run) -> None:
        assert {path.name for path in run.out.iterdir()} == {
            "config.yaml", "env.json", "metrics.jsonl", "summary.json", "samples.md", "curves.png",
            "tokenizer.json", "checkpoint", "checkpoints",
        }  # fmt: skip
        assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")

    def test_the_summary_holds_what_was_promised(self, run: Run) -> None:
        summary = json.loads((run.out / "summary.json").read_text(encoding="utf-8"))
        assert summary == json.loads(json.dumps(run.summary))
        for name in (
            "reward/pairwise_accuracy", "reward/baseline_pairwise_accuracy",
            "gold/test_accuracy", "gold/positive_rate_before", "gold/positive_rate_after",
            "samples/distinct_fraction",
        ):  # fmt: skip
            assert 0 <= summary[name] <= 1, name
        for name in ("sft", "reward", "ppo", "compile", "total"):
            assert 0 < summary[f"seconds/{name}"] <= summary["seconds/total"], name
        assert np.isfinite(summary["objective/kl"])
        assert 0 <= summary["ppo/first_ratio_error"] <= 1e-4
        assert summary["compilations_after_first_iteration"] == 0
        assert summary["device"] == jax.devices()[0].device_kind
        assert summary["versions"]["jax"] == jax.__version__
        assert sum(summary["data/texts"].values()) == 420
        assert summary["data/truncated"] > 0

    def test_the_metrics_have_a_line_for_each_step_and_stage(self, run: Run) -> None:
        for stage in ("sft", "reward"):
            steps = [row["step"] for row in run.rows(stage)]
            assert steps == list(range(1, len(steps) + 1)) and steps
            assert all(np.isfinite(row["loss"]) for row in run.rows(stage))
        assert 0 <= run.rows("reward")[-1]["validation/accuracy"] <= 1
        assert [row["step"] for row in run.rows("ppo")] == [0, 1, 2]
        for name in (
            "objective/kl", "objective/scores", "objective/rlhf_reward", "objective/entropy",
            "objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg",
            "policy/entropy_avg", "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg",
            "val/ratio", "gold/positive_rate",
        ):  # fmt: skip
            assert all(np.isfinite(row[name]) for row in run.rows("ppo")), name

    def test_ppo_starts_at_the_reference_with_a_normalised_reward(self, run: Run) -> None:
        first = run.rows("ppo")[0]
        assert abs(first["objective/kl"]) < 1e-3
        # The mean of 16 scores of variance 1.
        assert abs(first["objective/scores"]) < 1.5

    def test_the_configuration_is_kept(self, run: Run, corpus: Path) -> None:
        config = yaml.safe_load((run.out / "config.yaml").read_bytes())
        assert config["data"] == str(corpus)
        assert config["seed"] == 3
        assert config["ppo"]["iterations"] == 3
        assert config["model"]["width"] == 16
        environment = json.loads((run.out / "env.json").read_text(encoding="utf-8"))
        assert environment["versions"] == run.summary["versions"]

    def test_samples_stand_beside_one_another(self, run: Run) -> None:
        lines = (run.out / "samples.md").read_text(encoding="utf-8").splitlines()
        rows = [line for line in lines if line.startswith("|")][2:]
        assert len(rows) == min(32, run.summary["data/texts"]["test"])
        assert "<begin>" not in "".join(rows) and "pad" not in "".join(rows)

    def test_the_checkpoint_restores_into_the_models(self, run: Run) -> None:
        tokenizer = Tokenizer.from_file(str(run.out / "tokenizer.json"))
        model, scorer = build_models(SIZES.model, tokenizer.get_vocab_size())
        key = jax.random.key(0)
        like = {
            "policy": jax.eval_shape(model.init, key),
            "reward": jax.eval_shape(scorer.init, key),
        }
        params = checkpoint.restore(run.out / "checkpoint", like)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
        # PPO moved the policy away from where the reward model began.
        policy, reward = params["policy"], params["reward"]["backbone"]
        assert (policy["norm"]["scale"] != reward["norm"]["scale"]).all()

    def test_the_same_seed_gives_the_same_numbers(
        self, run: Run, corpus: Path, tmp_path: Path
    ) -> None:
        again = main(replace(SIZES, data=corpus, out=tmp_path))
        for name, number in run.summary.items():
            if not name.startswith("seconds/"):
                assert again[name] == number, name
        assert Run(tmp_path, again).rows("ppo") == run.rows("ppo")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "not a folder"),
        ({}, r"no \*\.pos file"),
        ({"a.pos": b"good\n"}, r"no \*\.neg file"),
        ({"a.pos": b"", "a.neg": b"bad\n"}, "a.pos: empty file"),
        ({"a.pos": b"good\n\nfine\n", "a.neg": b"bad\n"}, "a.pos:2: empty line"),
        ({"a.pos": b"good\n", "a.neg": b"bad\n\xff\n"}, "a.neg:2: .*not UTF-8"),
        ({"a.pos": b"good\nfine\n", "a.neg": b"bad\n"}, "3 texts are too few"),
    ],
    ids=["missing", "nothing", "one kind", "empty file", "empty line", "not UTF-8", "too few"],
)
def test_a_bad_folder_is_refused(
    tmp_path: Path, files: dict[str, bytes] | None, message: str
) -> None:
    data = tmp_path / "data"
    if files is not None:
        data.mkdir()
        for name, content in files.items():
            (data / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        main(replace(SIZES, data=data, out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("settings", "numbers"),
    [
        (PPOArgs(prompts=10, minibatches=4), ("10", "4")),
        (PPOArgs(prompt_tokens=40, response_tokens=30), ("70", "64")),
    ],
    ids=["minibatches that do not divide", "no room for a response"],
)
def test_sizes_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, settings: PPOArgs, numbers: tuple[str, str]
) -> None:
    with pytest.raises(ValueError) as error:
        main(replace(SIZES, ppo=settings, out=tmp_path / "out"))
    assert all(number in str(error.value) for number in numbers)
    assert not (tmp_path / "out").exists()


def test_pairwise_accuracy_by_hand() -> None:
    # Positive 3 and 1 against negative 2 and 0: three pairs of four are in order.
    scores, labels = np.array([3.0, 2.0, 1.0, 0.0]), [True, False, True, False]
    assert pairwise_accuracy(scores, labels) == 0.75


@cache
def help_text() -> str:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"],
        env=os.environ | {"COLUMNS": "400", "NO_COLOR": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def explained_flags() -> list[tuple[str, str]]:
    """Every field of the script's dataclasses and the string that explains it."""
    flags = []
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
            prefix = node.name.removesuffix("Args").lower()
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith(
                    "Args"
                ):
                    explained = isinstance(after, ast.Expr) and isinstance(
                        after.value, ast.Constant
                    )
                    assert isinstance(field.target, ast.Name)
                    name = ".".join(filter(None, [prefix, field.target.id])).replace("_", "-")
                    flags.append((f"--{name}", str(after.value.value) if explained else ""))  # type: ignore[union-attr]
    return flags


@pytest.mark.parametrize(("flag", "explanation"), explained_flags())
def test_help_explains_every_flag(flag: str, explanation: str) -> None:
    def words(text: str) -> str:
        return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())

    assert explanation, f"{flag} has no explanation"
    shown = words(help_text())
    assert flag in shown
    assert words(explanation) in shown
