"""Where the lines of a log go as well: TensorBoard's events, Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

Report = Callable[[dict[str, Any]], object]


@contextmanager
def reports(names: Sequence[str], out: Path) -> Iterator[list[Report]]:
    """The reports of a run, open.

    Args:
      names: of `REPORTS`.
      out: the run's directory.

    Yields:
      functions of a line, see `Run`.

    Raises:
      ModuleNotFoundError: the package is missing; it names the extra that has it.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(REPORTS[name](out)) for name in names]


@contextmanager
def _tensorboard(out: Path) -> Iterator[Report]:
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:
        raise ModuleNotFoundError(_MISSING.format("tensorboardX", "cli", "tensorboard")) from None
    with ExitStack() as stack:
        writer: Any = None

        def write(row: dict[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                # What a run that was broken off has written beyond its last checkpoint is hidden.
                events = SummaryWriter(str(out / "tensorboard"), purge_step=row["step"])
                writer = stack.enter_context(events)
            for name, x in _numbers(row).items():
                writer.add_scalar(name, x, row["step"])

        yield write


@contextmanager
def _wandb(out: Path) -> Iterator[Report]:
    try:
        import wandb
    except ModuleNotFoundError:
        raise ModuleNotFoundError(_MISSING.format("wandb", "wandb", "wandb")) from None
    place = str(out.absolute())
    same = hashlib.sha256(place.encode()).hexdigest()[:16]
    with wandb.init(
        project="rlhfjax", dir=place, name=out.name, id=same, resume="allow"
    ) as session:
        yield lambda row: session.log(_numbers(row), step=row["step"])


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """`stage/metric` → number; what is not finite is left out."""
    return {f"{row['stage']}/{name}": x for name, x in row.items() if isinstance(x, float)}


_MISSING = "{0} is not installed: pip install 'rlhfjax[{1}]', or leave {2} out of --report_to"
REPORTS: dict[str, Callable[[Path], AbstractContextManager[Report]]] = {
    "none": lambda out: nullcontext(lambda row: None),
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
