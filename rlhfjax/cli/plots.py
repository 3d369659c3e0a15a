"""Figures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Three of the Okabe–Ito colours, told apart by readers of every colour vision and in grey.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, FAINT = "#222222", "#8A8A8A"
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
}


ROUND_STEPS = [1, 2, 2.5, 5, 10]


class Panel(NamedTuple):
    """One curve: the metric, what its axis says and must show, and a level to compare with."""

    metric: str
    title: str
    unit: str
    colour: str
    shown: tuple[float, ...]
    level: float | None = None
    level_name: str = ""


PANELS = (
    Panel("objective/scores", "Reward model (proxy)", "mean score", BLUE, (), 0.0, "SFT policy"),
    Panel("gold/positive_rate", "Gold judge", "positive rate", GREEN, (0.0, 1.0), 0.5, "chance"),
    Panel("objective/kl", "Distance from SFT policy", "KL (nats)", ORANGE, (0.0,)),
)


def curves(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Draws proxy score, gold score and KL by PPO iteration, one above the other.

    Args:
      rows: lines of the metrics log; those of stage "ppo" are drawn. A metric may be missing or
        None in some of them: the others are joined.
      path: the file, `.png`, `.pdf` or `.svg`.

    Raises:
      ValueError: no row of stage "ppo", or one of the three metrics in none of them.
    """
    series = [_series(rows, panel.metric) for panel in PANELS]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 5.6), layout="constrained")
        axes = figure.subplots(len(PANELS), 1, sharex=True)
        for axis, panel, (steps, values) in zip(axes, PANELS, series, strict=True):
            _draw(axis, panel, steps, values)
        axes[-1].set_xlabel("PPO iteration")
        axes[-1].xaxis.set_major_locator(MaxNLocator(steps=ROUND_STEPS, integer=True))
        figure.align_ylabels(axes)
        figure.savefig(path, dpi=220)


def _series(rows: Sequence[Mapping[str, object]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    points = [
        (row["step"], row[metric])
        for row in rows
        if row.get("stage") == "ppo" and row.get(metric) is not None
    ]
    if not points:
        raise ValueError(f"no row of stage 'ppo' has a number for {metric!r}")
    steps, values = np.asarray(points, dtype=np.float64).T
    return steps, values


def _draw(axis: Axes, panel: Panel, steps: np.ndarray, values: np.ndarray) -> None:
    axis.plot(steps, values, color=panel.colour, zorder=2)
    axis.plot(steps[-1], values[-1], "o", color=panel.colour, markersize=4, zorder=3)
    axis.annotate(
        f"{values[-1]:.2f}",
        (steps[-1], values[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        color=panel.colour,
        va="center",
        fontweight="bold",
        annotation_clip=False,
    )
    if panel.level is not None:
        axis.axhline(panel.level, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axis.annotate(
            panel.level_name,
            (1, panel.level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            color=FAINT,
            fontsize=8,
            ha="right",
        )
    axis.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold", color=panel.colour)
    axis.set_ylabel(panel.unit)
    axis.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS))
    axis.margins(x=0.02, y=0.06)
    axis.update_datalim([(steps[-1], y) for y in panel.shown])
    axis.autoscale_view()
