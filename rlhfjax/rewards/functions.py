"""Reward functions by name, from a file, a module or `verifiers`."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhfjax.rewards.arguments import Function
from rlhfjax.rewards.errors import RewardError

OURS = "rlhfjax.rewards.verifiers"
NAME = re.compile(
    r"(?:(?P<place>.+?)[:.])?(?P<function>[^\W\d]\w*)(?P<brackets>\(.*\))?", re.DOTALL
)
GIVEN = ("prompts", "completions", "completion_ids")


def load(name: str) -> Function:
    """The reward function of a name.

    | name | what it is |
    |---|---|
    | `path/to/file.py:function` | a function of a file |
    | `path/to/file.py` | its function `reward`, or the only one that it makes public |
    | `package.module:function`, or TRL's `package.module.function` | a function of a module |
    | `path/to/file.py:make(scale=2)` | what the function returns for these literals |
    | `number`, `length(target=100)` | one of `verifiers`, made with these literals |

    Files and modules may import their neighbours; they never hide a module that Python finds
    elsewhere. Loading runs the code of the file: a `Worker` does it in a process of its own.

    Args:
      name: as in the table.

    Returns:
      a function in TRL's signature.

    Raises:
      RewardError: no such file, module or function, the file cannot be imported (with the line), or
        what it holds is no reward function.
    """
    place, attribute, brackets = _parts(name)
    module = _of_file(Path(place).absolute()) if place.endswith(".py") else _of_module(place)
    attribute = _only(module, name) if attribute is None else attribute
    function = _attribute(module, attribute, name)
    if brackets is not None:
        function = _made(function, brackets, name)
    elif inspect.isfunction(function) and "<" in function.__qualname__:
        # A decorator made it, or a lambda: it is called as it was asked for.
        function.__name__ = attribute
    _check(function, name)
    return function


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """Place, function and arguments in brackets."""
    if name.endswith(".py"):
        return name, None, None
    found = NAME.fullmatch(name)
    if found is None:
        raise RewardError(
            f"{name!r} names no reward function: write path/to/file.py:function, "
            "package.module:function or a verifier such as number or length(target=100)"
        )
    place, function, brackets = found.group("place", "function", "brackets")
    return (place, function, brackets) if place else (OURS, function, brackets or "()")


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"no such file: {path}")
    # Compiled here, so that no bytecode is left beside the file, nor an old one taken for it.
    try:
        code = compile(path.read_bytes(), path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise RewardError(f"{path}:{line}: {getattr(error, 'msg', error)}") from error
    module = ModuleType(str(path))
    module.__file__ = str(path)
    _reachable(path.parent)
    sys.modules[module.__name__] = module
    try:
        exec(code, module.__dict__)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(path)][-1]
        raise RewardError(f"{path}:{line}: {type(error).__name__}: {error}") from error
    return module


def _of_module(place: str) -> ModuleType:
    _reachable(Path.cwd())
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        advice = ""
        if isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}."):
            advice = "; a file is named with its ending, path/to/file.py:function"
        raise RewardError(f"{place}: {type(error).__name__}: {error}{advice}") from error


def _reachable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _public(module: ModuleType) -> dict[str, Any]:
    """The functions that are defined there."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    }


def _only(module: ModuleType, name: str) -> str:
    public = _public(module)
    if "reward" in public:
        return "reward"
    if len(public) == 1:
        return next(iter(public))
    raise RewardError(
        f"{name} has {len(public)} public functions ({', '.join(public)}) and none is called "
        f"'reward': write {name}:function"
    )


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise RewardError(
            f"{name!r}: {module.__name__} has no {attribute!r}, but {', '.join(_public(module))}"
        ) from None


def _made(function: Any, brackets: str, name: str) -> Any:
    try:
        call = ast.parse(f"f{brackets}", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("more than one pair of brackets")
        positional = [ast.literal_eval(argument) for argument in call.args]
        named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise RewardError(f"{name!r}: {brackets} are no literals of Python") from error
    try:
        return function(*positional, **named)
    except Exception as error:
        raise RewardError(f"{name!r}: {type(error).__name__}: {error}") from error


def _check(function: Any, name: str) -> None:
    if not callable(function):
        raise RewardError(f"{name!r} is no function but of type {type(function).__name__!r}")
    parameters = inspect.signature(function).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD or p.name in GIVEN for p in parameters):
        raise RewardError(
            f"{name!r} takes ({', '.join(p.name for p in parameters)}) and none of "
            f"{', '.join(GIVEN)}: define it as def {getattr(function, '__name__', 'reward')}"
            f"(prompts, completions, **columns); if it makes a reward function, write {name}()"
        )
