"""Every command from a model directory and a file of records to what it leaves behind."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from experiments import new_model
from rlhfjax import pretrained, sharding
from rlhfjax.cli import arguments
from rlhfjax.cli.commands import judges, training
from rlhfjax.cli.commands.evaluate import best_of, win_rate
from rlhfjax.cli.main import main

pytestmark = pytest.mark.slow
GOOD, BAD = "a fine day", "a grim night"
PROMPTS = ["they saw", "we had", "it was", "there came"]
MORE = [f"{prompt} again" for prompt in PROMPTS] + PROMPTS
SMALL = ["--per_device_train_batch_size", "4", "--learning_rate", "0.03", "--save_steps", "100"]
ONLINE = [
    "--per_device_train_batch_size", "8", "--learning_rate", "0.03", "--max_completion_length", "6",
    "--max_steps", "3", "--log_completions_steps", "2",
]  # fmt: skip


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    pairs = [{"prompt": p, "chosen": f" {GOOD}", "rejected": f" {BAD}"} for p in PROMPTS * 2]
    write(folder / "pairs.jsonl", *pairs)
    write(folder / "prompts.jsonl", *({"prompt": p, "word": "fine"} for p in PROMPTS))
    write(folder / "texts.jsonl", *({"text": f"{p} {GOOD}"} for p in PROMPTS))
    (folder / "rewards.py").write_text(
        "def length(completions): return [len(c) / 10 for c in completions]\n"
        "def says(completions, word):\n"
        "    return [None if w is None else float(w in c) for c, w in zip(completions, word)]\n"
    )
    new_model.main(
        new_model.Args(
            text=folder / "pairs.jsonl", out=folder / "model", vocab=270, context=32, width=16,
            layers=1, heads=2,
        )
    )  # fmt: skip
    return folder


def run(folder: Path, name: str, data: str, *flags: str, out: str | None = None) -> Path:
    where = folder / (out or name)
    model = () if "--model_name_or_path" in flags else ("--model_name_or_path", folder / "model")
    given = (*model, "--dataset_name", folder / data, "--output_dir", where, *flags)
    main([name, *map(str, given)])
    return where


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    return run(folder, "sft", "texts.jsonl", *SMALL, "--num_train_epochs", "80")


@pytest.fixture(scope="module")
def rewarded(folder: Path) -> Path:
    flags = [*SMALL, "--num_train_epochs", "10", "--eval_fraction", "0.4"]
    return run(folder, "reward", "pairs.jsonl", *flags)


@pytest.fixture(scope="module")
def adapted(folder: Path) -> Path:
    flags = ["--reward_funcs", f"{folder}/rewards.py:length", *ONLINE, "--use_peft"]
    return run(folder, "rloo", "prompts.jsonl", *flags, "--lora_r", "2", out="adapted")


class TestTraining:
    def test_fine_tuning_learns_the_texts(self, tuned: Path) -> None:
        losses = [row["loss"] for row in rows(tuned)]
        assert len(losses) == 80
        assert losses[-1] < 0.1 * losses[0]
        assert pretrained.load(tuned / "export").tokenizer is not None

    def test_the_directory_tells_all_of_it(self, tuned: Path) -> None:
        assert {path.name for path in tuned.iterdir()} == {
            "config.yaml", "env.json", "metrics.jsonl", "summary.json", "tensorboard",
            "checkpoints", "export",
        }  # fmt: skip
        config = yaml.safe_load((tuned / "config.yaml").read_text())
        assert config["num_train_epochs"] == 80
        assert json.loads((tuned / "env.json").read_text())["backend"] == "cpu"
        assert list((tuned / "tensorboard").iterdir())

    def test_its_configuration_begins_the_same_run(self, folder: Path, tuned: Path) -> None:
        again = folder / "again"
        config = yaml.safe_load((tuned / "config.yaml").read_text())
        main(["sft", "--config", str(tuned / "config.yaml"), "--output_dir", str(again)])
        assert config["learning_rate"] == 0.03
        assert rows(again) == rows(tuned)

    def test_packed_texts_are_learned_as_well(self, folder: Path) -> None:
        flags = [*SMALL, "--packing", "--num_train_epochs", "20"]
        losses = [row["loss"] for row in rows(run(folder, "sft", "texts.jsonl", *flags, out="p"))]
        assert losses[-1] < 0.6 * losses[0]

    def test_a_reward_model_is_right_on_pairs_held_out(self, rewarded: Path) -> None:
        summary = json.loads((rewarded / "summary.json").read_text())
        assert summary["eval/accuracy"] == 1.0
        assert 0 < summary["eval/num_compared"] < 8
        assert pretrained.load_scalar(rewarded / "export").model.vocab_size == 270

    @pytest.mark.parametrize(
        "records",
        [
            [{"prompt": p, "completions": [f" {GOOD}", " a day", f" {BAD}"]} for p in MORE],
            [{"text": f"{p} {x}", "rating": r} for p in PROMPTS for x, r in ((GOOD, 5), (BAD, 1))],
            [{"text": f"{p} {x}", "label": c} for p in PROMPTS for x, c in ((GOOD, 1), (BAD, 0))],
        ],
        ids=["rankings", "ratings", "classes"],
    )
    def test_other_judgements_make_reward_models_too(
        self, folder: Path, tmp_path: Path, records: list[dict[str, Any]]
    ) -> None:
        write(tmp_path / "records.jsonl", *records)
        flags = [*SMALL, "--num_train_epochs", "16", "--learning_rate", "0.005"]
        flags += ["--eval_fraction", "0.6"]
        out = run(
            folder, "reward", str(tmp_path / "records.jsonl"), *flags, out=str(tmp_path / "o")
        )
        losses = [row["loss"] for row in rows(out)]
        assert losses[-1] < 0.8 * losses[0]
        summary = json.loads((out / "summary.json").read_text())
        assert summary["eval/accuracy"] >= 0.5, summary

    @pytest.mark.parametrize("name", ["dpo", "reward"])
    def test_a_soft_label_says_which_response_is_better(self, folder: Path, name: str) -> None:
        turned = [
            {"prompt": p, "chosen": f" {BAD}", "rejected": f" {GOOD}", "chosen_prob": 0.0}
            for p in PROMPTS * 2
        ]
        write(folder / "turned.jsonl", *turned)
        flags = [*SMALL, "--max_steps", "8", "--learning_rate", "0.005", "--eval_fraction", "0.4"]
        flags = flags if name == "reward" else flags[:-2]
        plain, soft = (
            run(folder, name, f"{data}.jsonl", *flags, out=f"{name} {data}")
            for data in ("pairs", "turned")
        )
        losses = [[row["loss"] for row in rows(out)] for out in (plain, soft)]
        # The same pairs, said the other way round; which of them an update gets may differ.
        assert losses[1][0] == pytest.approx(losses[0][0], rel=0.2)
        assert losses[1][-1] < losses[1][0]
        if name == "reward":
            summary = json.loads((soft / "summary.json").read_text())
            assert summary["eval/accuracy"] > 0.5
        else:
            assert rows(soft)[-1]["rewards/margins"] < 0 < rows(plain)[-1]["rewards/margins"]

    @pytest.mark.parametrize("name", ["dpo", "orpo", "simpo"])
    def test_preferences_move_the_policy(self, folder: Path, name: str) -> None:
        flags = [*SMALL, "--num_train_epochs", "6", "--learning_rate", "0.01"]
        margins = [row["rewards/margins"] for row in rows(run(folder, name, "pairs.jsonl", *flags))]
        assert margins[-1] > margins[0]

    def test_so_do_completions_that_are_good_or_bad(self, folder: Path, tmp_path: Path) -> None:
        data = write(
            tmp_path / "unpaired.jsonl",
            *(
                {"prompt": p, "completion": f" {x}", "label": x == GOOD}
                for p in PROMPTS
                for x in (GOOD, BAD)
            ),
        )
        out = run(folder, "kto", data, *SMALL, "--num_train_epochs", "4", out=str(tmp_path / "o"))
        margins = [row["rewards/margins"] for row in rows(out)]
        assert margins[-1] > margins[0]
        alone = ["--per_device_train_batch_size", "1"]
        with pytest.raises(SystemExit, match="has 1 row, and this method compares 2"):
            run(folder, "kto", data, *alone, out=str(tmp_path / "alone"))


class TestOnline:
    def test_ppo_from_a_function(self, folder: Path) -> None:
        flags = ["--reward_funcs", f"{folder}/rewards.py:length", *ONLINE, "--max_steps", "24"]
        out = run(folder, "ppo", "prompts.jsonl", *flags)
        scores = [row["objective/scores"] for row in rows(out)]
        assert np.mean(scores[-6:]) > 1.2 * np.mean(scores[:6])
        assert {path.name for path in (out / "samples").iterdir()} == {
            f"{n:06d}.md" for n in range(1, 24, 2)
        }

    def test_several_rewards_with_weights_and_columns(self, folder: Path, rewarded: Path) -> None:
        flags = [
            "--reward_funcs", f"{folder}/rewards.py:length", f"{folder}/rewards.py:says",
            str(rewarded / "export"), "--reward_weights", "1", "2", "0.5", "--num_generations", "4",
        ]  # fmt: skip
        out = run(folder, "grpo", "prompts.jsonl", *flags, *ONLINE)
        row = rows(out)[-1]
        parts = row["rewards/length/mean"], row["rewards/says/mean"], row["rewards/export/mean"]
        np.testing.assert_allclose(np.dot(parts, [1, 2, 0.5]), row["objective/scores"], atol=1e-5)

    def test_an_adapter_alone_is_trained_and_merged(self, folder: Path, adapted: Path) -> None:
        assert (adapted / "export" / "adapter_model.safetensors").is_file()
        merged = folder / "merged"
        main(
            ["export", "--model_name_or_path", str(folder / "model"), "--adapter",
             str(adapted / "export"), "--output_dir", str(merged)]
        )  # fmt: skip
        before, after = pretrained.load(folder / "model"), pretrained.load(merged)
        qkv = [np.asarray(x.params["layers_0"]["qkv"]["kernel"]) for x in (before, after)]
        assert 0 < np.abs(qkv[1] - qkv[0]).max() < 0.5
        said = []
        for model in (adapted / "export", merged):
            file = folder / "said.jsonl"
            main(
                ["generate", "--model_name_or_path", str(model), "--prompts", *PROMPTS,
                 "--max_new_tokens", "4", "--temperature", "0", "--output", str(file)]
            )  # fmt: skip
            said.append(file.read_text())
        assert said[0] == said[1]

    @pytest.mark.parametrize("name", ["dpo", "reward"])
    def test_an_adapter_goes_on_from_an_adapter(
        self, folder: Path, adapted: Path, tmp_path: Path, name: str
    ) -> None:
        flags = [*SMALL, "--model_name_or_path", str(adapted / "export"), "--use_peft"]
        flags += ["--lora_r", "1", "--num_train_epochs", "6", "--eval_fraction", "0.4"]
        out = run(folder, name, "pairs.jsonl", *flags, out=str(tmp_path / "second"))
        losses = [row["loss"] for row in rows(out)]
        assert losses[-1] < 0.95 * losses[0]
        (record,) = (out / "checkpoints" / name).glob("6/record.json")
        state = json.loads(record.read_text())["digests"]
        trained = {x for x in state if x.startswith("params")}
        assert {x.rpartition(".")[2] for x in trained} - {"kernel"} == {"a", "b"}
        assert {x for x in trained if x.endswith("kernel")} <= {"params.head.kernel"}
        config = json.loads((out / "export" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder / "model")
        assert config["r"] == 3
        if name == "dpo":
            return
        merged = tmp_path / "merged"
        main(
            ["export", "--model_name_or_path", str(out / "export"), "--output_dir", str(merged)]
        )  # fmt: skip
        mesh, policy = sharding.mesh(), pretrained.load(adapted / "export")
        scores = []
        for directory in (out / "export", merged):
            with judges.named([str(directory)], policy, mesh) as judge:
                scores.append(judge(PROMPTS[:2], [f" {GOOD}", f" {BAD}"])[0])
        np.testing.assert_allclose(*scores, atol=1e-5)
        assert scores[0][0] > scores[0][1]

    def test_a_judge_reads_what_fills_its_context_and_what_is_empty(
        self, folder: Path, rewarded: Path
    ) -> None:
        flags = ["--reward_funcs", str(rewarded / "export"), *ONLINE, "--max_completion_length"]
        for length in ("1", "64"):
            out = run(folder, "ppo", "prompts.jsonl", *flags, length, out=f"filled {length}")
            assert all(row["val/num_unscored"] == 0 for row in rows(out))

    def test_dialogues_go_through_a_template(self, folder: Path) -> None:
        chats = [{"prompt": [{"role": "user", "content": p}]} for p in PROMPTS]
        data = write(folder / "chats.jsonl", *chats)
        (folder / "template.jinja").write_text(
            "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}a:{% endif %}"
        )
        (folder / "replies.py").write_text(
            "def reward(prompts, completions, trainer_state):\n"
            "    assert trainer_state.max_steps == 3\n"
            "    assert trainer_state.epoch == trainer_state.global_step\n"
            "    assert prompts[0][0]['role'] == 'user'\n"
            "    return [float(len(c[0]['content'])) for c in completions]\n"
        )
        template = ["--chat_template_path", str(folder / "template.jinja")]
        flags = ["--reward_funcs", str(folder / "replies.py"), *ONLINE]
        out = run(folder, "rloo", data, *flags, *template, out="chats")
        assert len(rows(out)) == 3
        exported = pretrained.load(out / "export")
        assert exported.chat_template == (folder / "template.jinja").read_text()
        with pytest.raises(SystemExit) as end:
            run(folder, "rloo", data, *flags, out="no template")
        assert "--chat_template_path" in str(end.value)

    def test_asked_to_stop_it_goes_on_to_the_same_end(self, folder: Path) -> None:
        flags = ["--reward_funcs", f"{folder}/stopping.py", *ONLINE]
        stop = "import os, signal\nos.path.exists({0!r}) or (open({0!r}, 'w').close(), {1})\n"
        asks = f"os.kill({os.getpid()}, signal.SIGTERM)"
        reward = "def reward(completions): return [float(len(c)) for c in completions]\n"
        (folder / "stopping.py").write_text(reward)
        whole = run(folder, "rloo", "prompts.jsonl", *flags, out="whole")
        # The process of the reward asks its parent to stop when it is first imported.
        (folder / "stopping.py").write_text(stop.format(str(folder / "asked"), asks) + reward)
        listening = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                run(folder, "rloo", "prompts.jsonl", *flags, out="parts")
        finally:
            signal.signal(signal.SIGTERM, listening)
        assert end.value.code == 75
        parts = run(folder, "rloo", "prompts.jsonl", *flags, "--resume", out="parts")
        assert rows(parts) == rows(whole)

    def test_a_run_ends_where_a_rule_says_so_and_goes_on_without_it(self, folder: Path) -> None:
        flags = ["--reward_funcs", f"{folder}/rewards.py:length", *ONLINE]
        rule = ["--stop_at_reward", "-1", "--stop_window", "2"]
        for resumed in ([], ["--resume"]):
            out = run(folder, "grpo", "prompts.jsonl", *flags, *rule, *resumed, out="stopped")
            assert len(rows(out)) == 2
            summary = json.loads((out / "summary.json").read_text())
            assert "--stop_at_reward -1" in summary["stopped"]
            assert summary["recompilations"] == 0
            assert (out / "export" / "model.safetensors").is_file()
        run(folder, "grpo", "prompts.jsonl", *flags, "--resume", out="stopped")
        assert len(rows(out)) == 3
        assert "stopped" not in json.loads((out / "summary.json").read_text())
        with pytest.raises(SystemExit, match=r"--stop_when_falls lenght .*: length"):
            run(folder, "grpo", "prompts.jsonl", *flags, "--stop_when_falls", "lenght", out="no")


class TestAsking:
    def test_completions_are_written_as_lines(
        self, folder: Path, tuned: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = ["--model_name_or_path", str(tuned / "export"), "--temperature", "0"]
        prompts = [*PROMPTS[:2], "they " * 40]
        main(["generate", *model, "--prompts", *prompts, "--max_new_tokens", "8"])
        told = capsys.readouterr()
        lines = [json.loads(line) for line in told.out.splitlines()]
        assert [line["prompt"] for line in lines] == prompts
        assert [line["completion"] for line in lines[:2]] == [f" {GOOD}"] * 2
        assert "1 shortened: --prompts:3" in told.err

    def test_a_policy_is_compared_with_its_beginning(self, folder: Path, tuned: Path) -> None:
        out = folder / "evaluation"
        asked = [PROMPTS[0], "", *PROMPTS[1:]]  # nothing can be said to the second one
        write(folder / "asked.jsonl", *({"prompt": p, "word": "fine"} for p in asked))
        main(
            ["evaluate", "--model_name_or_path", str(tuned / "export"),
             "--baseline_name_or_path", str(folder / "model"),
             "--dataset_name", str(folder / "asked.jsonl"),
             "--judge", f"{folder}/rewards.py:says", "--best_of", "3", "--max_new_tokens", "8",
             "--output_dir", str(out)]
        )  # fmt: skip
        found = json.loads((out / "evaluation.json").read_text())
        assert found["policy"]["reward"]["mean"] > 0.5 > found["baseline"]["reward"]["mean"]
        assert found["win_rate"]["mean"] > 0.7
        assert found["policy"]["kl"]["mean"] > abs(found["baseline"]["kl"]["mean"])
        assert (out / "best_of_n.png").read_bytes().startswith(b"\x89PNG")
        lines = (out / "completions.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == PROMPTS

    def test_best_of_n_is_the_mean_over_all_choices(self) -> None:
        assert best_of(np.array([[1.0, 3.0, 2.0]])) == pytest.approx([2.0, 8 / 3, 3.0])

    def test_win_rate_counts_ties_half_and_what_has_no_score_not_at_all(self) -> None:
        found = win_rate(np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[1.0, 0.0], [1.0, np.nan]]))
        assert found["mean"] == pytest.approx((7 / 8 + 0) / 2)
        assert found["count"] == 2


def test_a_run_is_not_written_over_and_keeps_what_it_has(folder: Path, tuned: Path) -> None:
    before = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    for flags, said in (
        ([], "holds a run"),
        (["--resume", "--learning_rate", "1"], "belongs to another run: learning_rate"),
        (["--resume", "--per_device_train_batch_size", "2"], "2 rows an update"),
    ):
        with pytest.raises(SystemExit) as end:
            run(folder, "sft", "texts.jsonl", *SMALL, "--num_train_epochs", "80", *flags)
        assert said in str(end.value)
    after = {path: path.read_bytes() for path in tuned.rglob("*") if path.is_file()}
    assert after == before


def test_a_language_model_is_no_judge(folder: Path) -> None:
    with (
        pytest.raises(ValueError, match="as `rlhfjax reward` exports it"),
        judges.named([str(folder / "model")], pretrained.load(folder / "model"), sharding.mesh()),
    ):
        pass


def test_a_judge_is_not_fetched_from_the_hub() -> None:
    with pytest.raises(ValueError, match="hf download trl-lib/rm --repo-type model"):
        judges.must_exist(["trl-lib/rm"])


def test_nothing_is_exported_over_what_is_there(folder: Path) -> None:
    model = str(folder / "model")
    with pytest.raises(SystemExit, match="give another name, or remove it"):
        main(["export", "--model_name_or_path", model, "--output_dir", model])


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (["text"], r"a\.jsonl:1: str, not an object: {…}\n.*--max_bad_records"),
        ([{"input": "", "instruction": "a", "output": "b"}], "rename instruction=prompt output=c"),
    ],
)
def test_records_that_cannot_be_used_come_with_advice(
    tmp_path: Path, records: list[Any], said: str
) -> None:
    data = write(tmp_path / "a.jsonl", *records)
    with pytest.raises(SystemExit, match=said):
        run(tmp_path, "sft", data)


@pytest.mark.parametrize(("max_steps", "epochs", "steps"), [(-1, 0.5, 2), (-1, 2, 6), (5, 1, 5)])
def test_a_part_of_an_epoch_has_its_part_of_the_steps(
    max_steps: int, epochs: float, steps: int
) -> None:
    args = SimpleNamespace(max_steps=max_steps, num_train_epochs=epochs)
    session: Any = training.Session(args, *[None] * 5)  # type: ignore[arg-type]
    assert session.num_steps(3) == steps


def test_the_learning_rate_rises_in_as_many_updates_as_asked(tmp_path: Path) -> None:
    args = arguments.SFT(
        model_name_or_path=tmp_path, dataset_name=(tmp_path,), output_dir=tmp_path,
        learning_rate=1.0, lr_scheduler_type="constant", warmup_steps=4, max_grad_norm=0.0,
    )  # fmt: skip
    optimizer = training.optimizer(args, 8)
    params = np.zeros(1, np.float32)
    state, moved = optimizer.init(params), []
    for _ in range(6):
        updates, state = optimizer.update(np.ones(1, np.float32), state, params)
        moved.append(float(-updates[0]))
    np.testing.assert_allclose(moved, [0, 0.25, 0.5, 0.75, 1, 1], atol=1e-5)


def test_one_kind_of_judgement_makes_a_reward_model(folder: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "ratings.jsonl", *({"text": p, "rating": 1} for p in PROMPTS))
    both = ["--dataset_name", data, str(folder / "pairs.jsonl")]
    with pytest.raises(SystemExit, match="one kind of judgement, not from Pair, Rating"):
        run(folder, "reward", data, *SMALL, *both, out=str(tmp_path / "o"))


def test_a_reward_function_that_fails_shows_its_line(folder: Path, tmp_path: Path) -> None:
    (folder / "fails.py").write_text("def reward(completions):\n    return {}['missing']\n")
    flags = ["--reward_funcs", str(folder / "fails.py"), *ONLINE]
    with pytest.raises(SystemExit) as end:
        run(folder, "rloo", "prompts.jsonl", *flags, out=str(tmp_path / "o"))
    assert "KeyError" in str(end.value) and "fails.py" in str(end.value)
    assert "line 2" in str(end.value)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("sft", ["--dataset_weights", "1", "2"], "--dataset_weights has 2 numbers for 1"),
        ("sft", ["--rename", "text"], "--rename text: write each as old=new"),
        ("dpo", [], "none of the formats"),
        ("sft", ["--eval_fraction", "1"], "leaves no record"),
        ("sft", ["--save_steps", "0"], "--save_steps 0: must be at least 1"),
        ("sft", ["--learning_rate", "nan"], "--learning_rate nan: must be a number above 0"),
        ("sft", ["--warmup_ratio", "3"], "--warmup_ratio 3.0: must not be above 1"),
        ("sft", ["--seed", "-1"], "--seed -1: must not be below 0"),
        ("sft", ["--use_peft", "--lora_target_modules", "w"], "no module w: choose of down_proj"),
    ],
)
def test_what_cannot_be_done_is_said(
    folder: Path, tmp_path: Path, name: str, flags: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as end:
        run(folder, name, "texts.jsonl", *flags, out=str(tmp_path / "out"))
    assert said in str(end.value)
