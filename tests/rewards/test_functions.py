"""Reward functions by name: what is found, and what is said where nothing is."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhfjax.rewards import RewardError, load

GOOD = """
from neighbour import LETTERS

def _helper(text):
    return len(text) / LETTERS

def reward(prompts, completions):
    return [_helper(c) for c in completions]

def shout(completions, **columns):
    return [float(c.isupper()) for c in completions]

def make(scale=1.0, *, offset=0.0):
    def scaled(completions):
        return [scale * len(c) + offset for c in completions]
    return scaled

THRESHOLD = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a file of rewards, its neighbour and a package."""
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rewards").mkdir()
    (tmp_path / "my rewards" / "good.py").write_text(GOOD)
    (tmp_path / "my rewards" / "neighbour.py").write_text("LETTERS = 4")
    (tmp_path / "single.py").write_text("from math import sqrt\ndef f(completions): return [1.0]")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "judges.py").write_text("def kind(completions): return [2.0]")
    yield tmp_path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "score"),
    {
        "my rewards/good.py": 0.75,
        "my rewards/good.py:reward": 0.75,
        "./my rewards/good.py:shout": 1.0,
        "my rewards/good.py:make()": 3.0,
        "my rewards/good.py:make(2, offset=-1.5)": 4.5,
        "single.py": 1.0,
        "lib.judges:kind": 2.0,
        "lib.judges.kind": 2.0,
        "length(target=6)": -0.5,
        "regex(pattern='A.C|[(:]')": 1.0,
        "rlhfjax.rewards.verifiers:length(target=6)": -0.5,
    }.items(),
)
def test_a_name_is_a_function(folder: Path, name: str, score: float) -> None:
    given = {"prompts": [""], "completions": ["ABC"]}
    function = load(name)
    taken = {"prompts", "completions"} if name.endswith(("good.py", ":reward")) else {"completions"}
    assert function(**{key: given[key] for key in taken}) == [score]


def test_an_absolute_path_is_one_too(folder: Path) -> None:
    assert load(f"{folder}/single.py:f")(completions=[""]) == [1.0]


def test_what_a_decorator_or_a_lambda_made_is_called_as_it_was_asked_for(folder: Path) -> None:
    (folder / "made.py").write_text(
        "def same(f):\n"
        "    def g(completions): return f(completions)\n"
        "    return g\n"
        "@same\n"
        "def polite(completions): return [0.0]\n"
        "short = lambda completions: [1.0]\n"
    )
    assert load("made.py:polite").__name__ == "polite"
    assert load("made.py:short").__name__ == "short"


def test_what_is_read_is_the_file_as_it_is_now_and_nothing_is_left_beside_it(folder: Path) -> None:
    file = folder / "single.py"
    for score in (1.0, 2.0):
        file.write_text(f"def f(completions): return [{score}]")
        assert load("single.py")(completions=[""]) == [score]
    assert not (folder / "__pycache__").exists()


def test_a_file_means_what_it_means_to_python(folder: Path) -> None:
    (folder / "typed.py").write_text("def f(completions: list): return [0.0]")
    assert load("typed.py").__annotations__ == {"completions": list}


def test_a_file_hides_no_module_of_python(folder: Path) -> None:
    (folder / "colorsys.py").write_text("def f(completions): return [0.0]")
    load("colorsys.py")
    import colorsys

    assert hasattr(colorsys, "rgb_to_hsv")


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "none.py:f": ["no such file", "none.py"],
        "my rewards": ["names no reward function", "path/to/file.py:function"],
        "single.py:g": ["single.py has no 'g', but f"],
        "my rewards/good.py:THRESHOLD": ["is no function but of type 'int'"],
        "my rewards/good.py:make": ["takes (scale, offset) and none of prompts", "make()"],
        "my rewards/good.py:make(open('x'))": ["no literals"],
        "my rewards/good.py:make()()": ["no literals"],
        "my rewards/good.py:make(height=3)": ["TypeError", "'height'"],
        "lib.nothing:f": ["No module named 'lib.nothing'", "path/to/file.py:function"],
        "lib.judges:f": ["has no 'f', but kind"],
        "single:g": ["single has no 'g', but f"],
        "numbers": ["has no 'numbers', but number, last_number"],
        "length": ["length", "target"],
        "regex(pattern='(')": ["regex(pattern='(')", "unterminated"],
    }.items(),
)
def test_a_name_of_nothing_says_why(folder: Path, name: str, parts: list[str]) -> None:
    with pytest.raises(RewardError) as error:
        load(name)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("source", "parts"),
    {
        "def f(completions):\n  return [1.0\n": ["bad.py:2: ", "'[' was never closed"],
        "x = 1\n\nimport not_there": ["bad.py:3: ModuleNotFoundError: No module named 'not_there'"],
        "def g():\n  raise KeyError('k')\ng()": ["bad.py:2: KeyError: 'k'"],
        "import sys\nsys.exit(3)": ["bad.py:2: SystemExit: 3"],
        "def f(completions): ...\ndef g(completions): ...": ["2 public functions (f, g)"],
        "": ["0 public functions"],
        "def f(text): return 1.0": ["takes (text) and none of prompts, completions"],
        "\0": ["bad.py:1: ", "null bytes"],
    }.items(),
)
def test_a_file_that_is_no_good_says_where(folder: Path, source: str, parts: list[str]) -> None:
    (folder / "bad.py").write_text(source)
    with pytest.raises(RewardError) as error:
        load("bad.py")
    for part in parts:
        assert part in str(error.value)


def test_a_module_that_cannot_be_imported_says_what_it_lacks(folder: Path) -> None:
    (folder / "lacking.py").write_text("import not_there")
    with pytest.raises(RewardError) as error:
        load("lacking:f")
    assert str(error.value) == "lacking: ModuleNotFoundError: No module named 'not_there'"
