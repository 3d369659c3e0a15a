"""The command line: what it answers before anything heavy is imported."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rlhfjax.cli import arguments
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


def test_what_the_quickstart_asks_can_be_asked() -> None:
    text = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    asked = re.findall(r"^ +rlhfjax ((?:.*\\\n)*.*)$", text, re.MULTILINE)
    commands = [shlex.split(command.replace("\\\n", " ")) for command in asked]
    commands = [command for command in commands if command[0] in COMMANDS]
    assert {command[0] for command in commands} >= {"sft", "reward", "ppo", "dpo", "evaluate"}
    for name, *flags in commands:
        parse(name, flags)


def test_help_does_not_wait_for_jax() -> None:
    program = (
        "import sys\n"
        "from rlhfjax.cli.main import main\n"
        "try: main(['ppo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'flax', 'numpy', 'orbax'} & sys.modules.keys()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "--num_ppo_epochs" in ran.stdout


def test_a_command_that_is_none_gets_its_neighbour_named() -> None:
    with pytest.raises(SystemExit, match=r"no command 'gpro'; 'grpo'\?"):
        main(["gpro"])


def test_hyphens_will_do() -> None:
    flags = [flag.replace("_", "-") for flag in needed("sft")]
    assert parse("sft", [*flags, "--learning-rate", "0.5"]).learning_rate == 0.5


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
"""

    def test_a_file_says_what_flags_say(self, tmp_path: Path) -> None:
        asked = self.given(tmp_path, self.TEXT)
        assert asked.dataset_name == (Path("a.jsonl"), Path("b.jsonl"))
        assert asked.learning_rate == 2e-5
        assert (asked.packing, asked.completion_only_loss, asked.data) == (True, False, None)

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
