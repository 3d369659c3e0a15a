"""The command line: what it answers before anything heavy is imported."""

import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import rlhfjax
from rlhfjax.cli import arguments
from rlhfjax.cli.flags import INSTEAD, advice
from rlhfjax.cli.main import COMMANDS, UsageError, main, parse

NEEDED = {
    "model_name_or_path": "model",
    "dataset_name": "a.jsonl",
    "output_dir": "out",
    "reward_funcs": "rewards.py",
    "baseline_name_or_path": "other",
    "judge": "rewards.py",
    "adapter": "adapter",
}


def needed(name: str) -> list[str]:
    known = {field.name for field in fields(COMMANDS[name].arguments)}
    return [part for flag, x in NEEDED.items() if flag in known for part in (f"--{flag}", x)]


def test_all_commands_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        main(argv)
        told = capsys.readouterr().out
        assert [line.split()[0] for line in told.splitlines()[2:]] == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_a_command_needs_is_enough(name: str) -> None:
    asked = parse(name, needed(name))
    assert isinstance(asked, COMMANDS[name].arguments)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(name, ["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    for field in fields(COMMANDS[name].arguments):
        assert f"--{field.name}" in told


def test_a_module_is_a_command_too() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "rlhfjax", "--version"], capture_output=True, text=True
    )
    assert ran.stdout == f"rlhfjax {rlhfjax.__version__}\n", ran.stderr


def test_what_the_quickstart_asks_can_be_asked() -> None:
    text = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    asked = re.findall(r"^ +rlhfjax ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    commands = [shlex.split(command.replace("\\\n", " ")) for command in asked]
    commands = [command for command in commands if command[0] in COMMANDS]
    assert {command[0] for command in commands} >= {"sft", "reward", "ppo", "dpo", "evaluate"}
    for name, *flags in commands:
        parse(name, flags)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ppo", "--help"], "--num_ppo_epochs"),
        (["sft", *needed("sft"), "--seed", "-1"], "--seed -1: must not be below 0"),
    ],
)
def test_help_and_advice_do_not_wait_for_jax(argv: list[str], said: str) -> None:
    program = (
        "import sys\n"
        "from rlhfjax.cli.main import main\n"
        f"try: main({argv})\n"
        "except SystemExit as end: print(end.code)\n"
        "assert not {'jax', 'flax', 'numpy', 'orbax'} & sys.modules.keys()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert said in ran.stdout


def test_a_command_that_is_none_gets_its_neighbour_named() -> None:
    with pytest.raises(SystemExit, match=r"no command 'gpro'; 'grpo'\?"):
        main(["gpro"])


def test_hyphens_will_do() -> None:
    flags = [flag.replace("_", "-") for flag in needed("sft")]
    assert parse("sft", [*flags, "--learning-rate", "0.5"]).learning_rate == 0.5


def test_part_of_an_epoch_may_be_asked_for() -> None:
    assert parse("sft", [*needed("sft"), "--num_train_epochs", "0.5"]).num_train_epochs == 0.5


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--gradient_checkpointing", "true", "--packing", "False"], (True, False, False)),
        (["--gradient-checkpointing=True", "--packing", "--use_peft=false"], (True, True, False)),
        (["--no_packing", "--use_peft", "true", "--rename", "true"], (False, False, True)),
    ],
)
def test_switches_may_say_true_or_false(flags: list[str], expected: tuple[bool, ...]) -> None:
    asked = parse("sft", [*needed("sft"), *flags])
    assert (asked.gradient_checkpointing, asked.packing, asked.use_peft) == expected
    assert asked.rename == (("true",) if "--rename" in flags else ())


@pytest.mark.parametrize(
    ("name", "flag", "said"),
    [
        ("sft", "bf16", "--dtype bfloat16"),
        ("dpo", "resume_from_checkpoint", "--resume"),
        ("grpo", "kl_coef", "it is --beta"),
        ("ppo", "beta", "it is --kl_coef"),
        ("grpo", "logging_steps", "every step is logged"),
    ],
)
def test_what_trl_calls_otherwise_is_told(tmp_path: Path, name: str, flag: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(f"{flag}: 1")
    for given in ([f"--{flag.replace('_', '-')}=1"], ["--config", str(tmp_path / "run.yaml")]):
        with pytest.raises(UsageError, match=f"{flag}.* is no flag of this command; .*{said}"):
            parse(name, [*needed(name), *given])


def test_every_advice_is_of_use_somewhere_and_names_only_flags_there_are() -> None:
    known = [[field.name for field in fields(of.arguments)] for of in COMMANDS.values()]
    assert [name for name in INSTEAD if not any(advice(name, names) for names in known)] == []
    assert advice("beta", ["seed"]) is None
    assert advice("beta", ["beta", "kl_coef"]) is None


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("grpo", ["--reward_weights", "1", "2"], "has 2 numbers for 1 of --reward_funcs"),
        ("rloo", ["--num_generations", "1"], "--num_generations 1: must be at least 2"),
        ("sft", ["--lora_r", "8"], "--lora_r is of an adapter: give --use_peft"),
        (
            "sft",
            ["--use_peft", "--lora_target_modules", "q_proj,v_proj"],
            "write q_proj v_proj, without commas",
        ),
    ],
)
def test_flags_that_mean_nothing_together_are_refused(
    name: str, flags: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        parse(name, [*needed(name), *flags])


class TestConfig:
    def given(self, folder: Path, text: str, *flags: str) -> arguments.SFT:
        (folder / "run.yaml").write_text(text)
        return parse("sft", ["--config", str(folder / "run.yaml"), *flags])

    TEXT = """
model_name_or_path: model
dataset_name: [a.jsonl, b.jsonl]
output_dir: out
learning_rate: 2e-5
packing: true
completion_only_loss: false
data: null
dataset_weights: null
num_train_epochs: null
"""

    def test_a_file_says_what_flags_say(self, tmp_path: Path) -> None:
        asked = self.given(tmp_path, self.TEXT)
        assert asked.dataset_name == (Path("a.jsonl"), Path("b.jsonl"))
        assert asked.learning_rate == 2e-5
        assert (asked.packing, asked.completion_only_loss, asked.data) == (True, False, None)
        assert (asked.dataset_weights, asked.num_train_epochs) == ((), 1.0)

    def test_flags_go_before_it(self, tmp_path: Path) -> None:
        asked = self.given(
            tmp_path, self.TEXT, "--learning_rate", "1", "--no_packing", "--dataset_name", "c"
        )
        assert (asked.learning_rate, asked.packing) == (1.0, False)
        assert asked.dataset_name == (Path("c"),)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("learning_rat: 1", "'learning_rat' is no flag of this command; 'learning_rate'?"),
            ("- 1", "must be a mapping"),
            ("a: [", "run.yaml: while parsing"),
        ],
    )
    def test_what_it_must_not_say_is_named(self, tmp_path: Path, text: str, said: str) -> None:
        with pytest.raises(UsageError) as error:
            self.given(tmp_path, text)
        assert said in str(error.value) and "run.yaml" in str(error.value)

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"none\.yaml"):
            parse("sft", [f"--config={tmp_path}/none.yaml"])


LISTENING = """
import signal, sys
from rlhfjax.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main(sys.argv[1:])
"""


def test_ctrl_c_ends_what_has_not_begun_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTENING, "sft", *needed("sft")], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "rlhfjax sft: starting\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 128 + signal.SIGINT
        assert process.stderr.read() == "rlhfjax sft: interrupted\n"
