"""The recorded cases of the peers, see golden/README.md, and the adapter that answers them."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from golden.adapter import DIFFERENT, run
from golden.peer_case import Case, decode

__all__ = ["DIFFERENT", "Case", "agrees", "cases", "decoded", "run"]

RTOL, ATOL = 2e-5, 2e-6
# Formula-dependent at logits of 3e4: x - logsumexp(x) loses what log_softmax keeps.
FORMULA_ATOL = 1e-3


@functools.cache
def cases() -> dict[str, dict[str, Any]]:
    """Every case by its id."""
    text = (Path(__file__).parent / "golden" / "golden.json").read_text(encoding="utf-8")
    return {case["id"]: case for case in json.loads(text)["cases"]}


def decoded(case_id: str) -> Case:
    """The case of that id, its numbers as arrays."""
    return decode(cases()[case_id])


def atol(case: dict[str, Any]) -> float:
    """The tolerance of the case: what float32 costs the peer itself, or what its test states."""
    drift = 5 * case.get("float32_check", {}).get("max_abs", 0.0)
    by_formula = case["function"] in ("logprobs_from_logits", "entropy_from_logits")
    loose = "atol=1e-3" in case["spec"] or (by_formula and "large_logits" in case["tags"])
    return max(ATOL, drift, FORMULA_ATOL if loose else 0.0)


def agrees(case: dict[str, Any], given: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises AssertionError unless every wanted value is given, to the tolerance of the case."""
    assert given.keys() == wanted.keys()
    for name, value in given.items():
        assert value.dtype in (np.float32, np.int32, np.bool_)
        np.testing.assert_allclose(
            np.asarray(value, np.float64),
            np.asarray(wanted[name], np.float64),
            rtol=RTOL,
            atol=atol(case),
            err_msg=f"{case['id']}: {name}",
        )
