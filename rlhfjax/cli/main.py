"""The command line: `rlhfjax COMMAND --help` explains each."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rlhfjax.cli import arguments
from rlhfjax.cli.flags import advice, name_of, switched


class Command(NamedTuple):
    """A command: what may be asked of it, and the module whose `run(arguments)` does it."""

    arguments: type
    module: str


COMMANDS = {
    "sft": Command(arguments.SFT, "sft"),
    "reward": Command(arguments.Reward, "reward"),
    "ppo": Command(arguments.PPO, "online"),
    "grpo": Command(arguments.GRPO, "online"),
    "rloo": Command(arguments.RLOO, "online"),
    "dpo": Command(arguments.DPO, "preference"),
    "kto": Command(arguments.KTO, "preference"),
    "orpo": Command(arguments.ORPO, "preference"),
    "simpo": Command(arguments.SimPO, "preference"),
    "generate": Command(arguments.Generate, "generate"),
    "evaluate": Command(arguments.Evaluate, "evaluate"),
    "export": Command(arguments.Export, "export"),
    "env": Command(arguments.Env, "env"),
}


class UsageError(Exception):
    """What was asked cannot be done; says why and what to ask instead."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Args:
      argv: its name and its flags; those of the process if None.
    """
    name, *flags = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(summary())
        return
    if name == "--version":
        print(f"rlhfjax {import_module('rlhfjax').__version__}")
        return
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        sys.exit(f"rlhfjax: no command {name!r}; " + (f"{near[0]!r}?" if near else summary()))
    try:
        asked = parse(name, flags)
        with _ending_at_once(name):
            print(f"rlhfjax {name}: starting", file=sys.stderr, flush=True)
            import_module(f"rlhfjax.cli.commands.{COMMANDS[name].module}").run(asked)
    except KeyboardInterrupt:
        sys.exit(f"rlhfjax {name}: interrupted")
    except UsageError as error:
        sys.exit(f"rlhfjax {name}: {error}")
    except Exception as error:
        if not isinstance(error, _foreseen()):
            raise
        notes = [*_notes(error), *_notes(error.__cause__)]
        sys.exit("\n".join([f"rlhfjax {name}: {error}", *notes]))


@contextmanager
def _ending_at_once(name: str) -> Iterator[None]:
    """Ctrl-C ends the process, where no run that is open puts it off.

    An exception would be lost where it is raised in a callback of a library, or be taken for a
    failure of what is being imported.
    """

    def end(number: int, _: object) -> None:
        print(f"rlhfjax {name}: interrupted", file=sys.stderr, flush=True)
        os._exit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # such as in a shell's background, where it is ignored
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _foreseen() -> tuple[type[Exception], ...]:
    """Errors that say what to do, so that a traceback would only hide it."""
    from rlhfjax.checkpoint import CheckpointError
    from rlhfjax.cli.run import TrainingError

    return CheckpointError, TrainingError, ValueError, OSError, ImportError, MemoryError


def _notes(error: BaseException | None) -> list[str]:
    """Such as where in its own process a reward function failed."""
    return list(getattr(error, "__notes__", []))


def summary() -> str:
    """All commands, a line each."""
    lines = (
        f"  {name:<9} {(of.arguments.__doc__ or '').splitlines()[0]}"
        for name, of in COMMANDS.items()
    )
    return "\n".join(["usage: rlhfjax [--version] COMMAND [--help] [--flag value ...]", "", *lines])


def parse(name: str, flags: Sequence[str]) -> Any:
    """Flags, and those of a `--config` file before them, as the arguments of a command.

    Args:
      name: of the command.
      flags: as on the command line.

    Returns:
      an instance of its class in `arguments`.

    Raises:
      UsageError: a configuration file that cannot be read, or with a name that is none; numbers
        that mean nothing, or flags that mean nothing together.
      SystemExit: flags that are wrong, which is explained, or a call for help.
    """
    import tyro

    kind = COMMANDS[name].arguments
    given = [*flags_of(configuration(flags), kind), *switched(flags, _switches(kind))]
    for flag in map(name_of, flags):
        if hint := advice(flag, _names(kind)):
            raise UsageError(f"--{flag} is no flag of this command; {hint}")
    asked: Any = tyro.cli(kind, prog=f"rlhfjax {name}", args=given, use_underscores=True)
    for flags_so, holds, said in (
        (arguments.AT_LEAST_ONE, lambda x: x >= 1, "must be at least 1"),
        (arguments.AT_LEAST_TWO, lambda x: x >= 2, "must be at least 2: they are compared"),
        (arguments.POSITIVE, lambda x: 0 < x < math.inf, "must be a number above 0"),
        (arguments.NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "must not be below 0"),
        (arguments.AT_MOST_ONE, lambda x: x <= 1, "must not be above 1"),
    ):
        for flag in flags_so:
            number = getattr(asked, flag, None)
            if number is not None and not holds(number):
                raise UsageError(f"--{flag} {number}: {said}")
    if isinstance(asked, arguments.Online) and asked.temperature == 0:
        raise UsageError("--temperature 0: a policy that always says the same learns nothing")
    for weights, weighted in arguments.WEIGHTS.items():
        numbers, things = getattr(asked, weights, ()), getattr(asked, weighted, ())
        if numbers and len(numbers) != len(things):
            raise UsageError(
                f"--{weights} has {len(numbers)} numbers for {len(things)} of --{weighted}: give "
                "one for each"
            )
    if isinstance(asked, arguments.Training):
        _check_adapter(asked)
    return asked


def _check_adapter(asked: arguments.Training) -> None:
    for flag in () if asked.use_peft else arguments.OF_ADAPTERS:
        if getattr(asked, flag) != getattr(arguments.Training, flag):
            raise UsageError(f"--{flag} is of an adapter: give --use_peft with it, or leave it out")
    for module in asked.lora_target_modules:
        if "," in module:
            several = module.replace(",", " ")
            raise UsageError(f"--lora_target_modules {module}: write {several}, without commas")


def _names(kind: type) -> list[str]:
    return [field.name for field in fields(kind)]


def _switches(kind: type) -> list[str]:
    return [field.name for field in fields(kind) if field.type == "bool"]


def configuration(flags: Sequence[str]) -> Path | None:
    """The file that `--config` names."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    return parser.parse_known_args(flags)[0].config


def flags_of(file: Path | None, kind: type) -> list[str]:
    """A YAML file as the flags that say the same."""
    if file is None:
        return []
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{file}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: must be a mapping of names to values, is {content!r}")
    known = _names(kind)
    flags = []
    for name, value in content.items():
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            hint = advice(str(name), known) or (f"{near[0]!r}?" if near else "")
            raise UsageError(f"{file}: {name!r} is no flag of this command{hint and f'; {hint}'}")
        if value is None:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


if __name__ == "__main__":
    main()
