"""The house rules that a machine can read off the source: floors, public API, quiet import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhfjax"
EVERYWHERE = {"chex", "jax", "numpy"}


class Room(NamedTuple):
    floor: int
    may_import: set[int]
    outside: set[str]


ROOMS = {
    "types": Room(0, set(), set()),
    "masked": Room(0, set(), set()),
    "sharding": Room(0, set(), set()),
    "lm_head": Room(1, {0}, set()),
    "log_probs": Room(1, {0}, set()),
    "kl": Room(1, {0}, set()),
    "advantages": Room(1, {0}, set()),
    "losses": Room(1, {0}, set()),
    "sampling": Room(1, {0}, set()),
    "sequences": Room(1, {0}, set()),
    "stopping": Room(1, {0}, set()),
    "tools": Room(1, {0}, set()),
    "rollout": Room(2, {0, 1}, set()),
    "tasks": Room(2, {0, 1}, set()),
    "models": Room(2, {0}, {"flax"}),
    "checkpoint": Room(2, {0}, {"orbax"}),
    "data": Room(2, {0}, {"jinja2", "pyarrow"}),
    "algorithms": Room(3, {0, 1, 2}, {"optax"}),
    "pretrained": Room(3, {0, 1, 2}, {"tokenizers"}),
    "feedback": Room(3, {0, 1, 2}, {"yaml"}),
    "rewards": Room(3, set(), set()),
    "cli": Room(
        4,
        {0, 1, 2, 3},
        {"matplotlib", "optax", "tensorboardX", "tqdm", "tyro", "wandb", "yaml"},
    ),
    "__main__": Room(5, {4}, set()),
}


def imported(source: str) -> Iterator[str]:
    """Every dotted name that the source imports, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def floor_violations(source: str, room: str) -> list[str]:
    found = []
    for name in imported(source):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "rlhfjax":
            allowed = target == room or (
                target in ROOMS and ROOMS[target].floor in ROOMS[room].may_import
            )
        else:
            allowed = top in sys.stdlib_module_names | EVERYWHERE | ROOMS[room].outside
        if not allowed:
            found.append(name)
    return found


def private_names(source: str) -> list[str]:
    """What a script takes from rlhfjax that is not public, or from its neighbours."""
    found = []
    for name in imported(source):
        top, *rest = name.split(".")
        if top in {"", "experiments", "benchmarks", "tests"} or (
            top == "rlhfjax" and any(part.startswith("_") for part in rest)
        ):
            found.append(name)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            owner = ast.unparse(node.value)
            if owner.split(".")[0] == "rlhfjax" and not node.attr.startswith("__"):
                found.append(f"{owner}.{node.attr}")
    return found


def files(*folders: str) -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py")
    )


@pytest.mark.parametrize("file", [f for f in files("rlhfjax") if f != "rlhfjax/__init__.py"])
def test_imports_run_downward_only(file: str) -> None:
    room = Path(file).relative_to("rlhfjax").parts[0].removesuffix(".py")
    assert room in ROOMS, f"give {room!r} a floor in ROOMS"
    assert floor_violations((ROOT / file).read_text(), room) == []


@pytest.mark.parametrize(
    ("room", "statement", "wrong"),
    [
        ("kl", "from rlhfjax import masked", []),
        ("kl", "import rlhfjax.masked", []),
        ("losses", "from rlhfjax.losses import policy", []),
        ("losses", "from rlhfjax import kl", ["rlhfjax.kl"]),
        ("masked", "from rlhfjax.types import Rollout", ["rlhfjax.types.Rollout"]),
        ("data", "from rlhfjax.sampling import greedy", ["rlhfjax.sampling.greedy"]),
        ("rollout", "def f():\n  from rlhfjax import algorithms", ["rlhfjax.algorithms"]),
        ("rollout", "import flax.linen", ["flax.linen"]),
        ("models", "import flax.linen", []),
        ("kl", "import rlhfjax", ["rlhfjax"]),
        ("kl", "from . import masked", ["..masked"]),
    ],
)
def test_the_floor_check_sees_what_it_must(room: str, statement: str, wrong: list[str]) -> None:
    assert floor_violations(statement, room) == wrong


@pytest.mark.parametrize("file", files("experiments", "benchmarks"))
def test_scripts_use_the_public_api_only(file: str) -> None:
    assert private_names((ROOT / file).read_text()) == []


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from rlhfjax.losses import policy", []),
        ("import rlhfjax\nrlhfjax.__version__", []),
        ("from rlhfjax.data.text import _position", ["rlhfjax.data.text._position"]),
        ("import rlhfjax\nrlhfjax.kl._helper", ["rlhfjax.kl._helper"]),
        ("from experiments import sentiment", ["experiments.sentiment"]),
    ],
)
def test_the_public_api_check_sees_what_it_must(source: str, wrong: list[str]) -> None:
    assert private_names(source) == wrong


def test_no_module_is_named_utils() -> None:
    assert [f for f in files("rlhfjax") if "utils" in Path(f).stem] == []


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


MODULES = [
    f.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".") for f in files("rlhfjax")
]


def test_import_changes_nothing_global() -> None:
    ran = run_python(f"""
import importlib, logging, os, sys, warnings
import chex, flax.linen, jax, matplotlib, optax, orbax.checkpoint, tqdm
from jax._src import xla_bridge

def world():
    return (dict(jax.config.values), dict(os.environ), list(warnings.filters),
            logging.root.level, list(logging.root.handlers), sys.excepthook,
            dict(matplotlib.rcParams), xla_bridge.backends_are_initialized())

before = world()
assert not before[-1]
for name in {MODULES!r}:
    importlib.import_module(name)
for old, new in zip(before, world()):
    assert old == new, (old, new)
""")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_the_core_imports_without_the_extras() -> None:
    core = [name for name in MODULES if not name.startswith("rlhfjax.cli")]
    ran = run_python(f"""
import importlib, sys
for extra in ("jinja2", "matplotlib", "pyarrow", "sklearn", "tokenizers", "tqdm", "tyro"):
    sys.modules[extra] = None
for name in {core!r}:
    importlib.import_module(name)
""")
    assert ran.returncode == 0, ran.stderr


def test_the_lock_names_versions_and_no_place() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.lstrip().startswith("#")]
    assert all("==" in pin for pin in pins)
    assert [line for line in lines if "://" in line or "/home" in line or "--" in line] == []
