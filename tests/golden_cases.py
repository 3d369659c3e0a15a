"""Loads what peer implementations returned for fixed inputs; see golden/README.md."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RTOL, ATOL = 2e-5, 2e-6
NON_FINITE = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf}


@dataclass(frozen=True)
class Case:
    """One call of one peer: arrays are float32, int32 or, for masks, bool."""

    id: str
    function: str
    peer: str
    convention: str
    tags: tuple[str, ...]
    inputs: dict[str, Any]
    expected: dict[str, Any]
    atol: float

    def __str__(self) -> str:
        return self.id


def select(function: str, *, peer: str | None = None, convention: str | None = None) -> list[Case]:
    """The cases of a function, of one peer and one convention where these are given."""
    return [
        _case(raw)
        for raw in _raw_cases().values()
        if raw["function"] == function
        and peer in (None, raw["peer"])
        and convention in (None, raw["convention"])
    ]


def find(case_id: str) -> Case:
    """The case of that id."""
    return _case(_raw_cases()[case_id])


@functools.cache
def _raw_cases() -> dict[str, dict[str, Any]]:
    text = (Path(__file__).parent / "golden" / "golden.json").read_text(encoding="utf-8")
    return {raw["id"]: raw for raw in json.loads(text)["cases"]}


def _case(raw: dict[str, Any]) -> Case:
    drift = 5 * raw.get("float32_check", {}).get("max_abs", 0.0)
    own_tolerance = 1e-3 if "atol=1e-3" in raw["spec"] else 0.0
    return Case(
        id=raw["id"],
        function=raw["function"],
        peer=raw["peer"],
        convention=raw["convention"] or "",
        tags=tuple(raw["tags"]),
        inputs={name: _decode(name, value) for name, value in raw["inputs"].items()},
        expected={name: _decode(name, value) for name, value in raw["expected"].items()},
        atol=max(ATOL, drift, own_tolerance),
    )


def _decode(name: str, value: Any) -> Any:
    if not isinstance(value, list):
        return NON_FINITE.get(value, value) if isinstance(value, str) else value
    array = np.array(_numbers(value))
    if "mask" in name:
        return array.astype(bool)
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int32)


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return NON_FINITE[value] if isinstance(value, str) else value
