from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rlhfjax.cli import plots
from rlhfjax.cli.plots import curves

SFT_ROW = {"stage": "sft", "step": 100, "loss": 3.0, "objective/kl": 9.0}
ROWS = [
    SFT_ROW,
    *(
        {
            "stage": "ppo",
            "step": step,
            "objective/scores": step / 4,
            "gold/positive_rate": 0.5 + step / 40 if step % 5 == 0 else None,
            "objective/kl": step / 2,
        }
        for step in range(11)
    ),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    return figures


def test_three_panels_share_the_iterations_and_show_the_rows(drawn: list[Figure]) -> None:
    curves(ROWS, Path("curves.png"))
    axes = drawn[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == [
        "Reward model (proxy)",
        "Gold judge",
        "Distance from SFT policy",
    ]
    assert all(axis.get_shared_x_axes().joined(axis, axes[0]) for axis in axes)
    assert axes[-1].get_xlabel() == "PPO iteration"
    assert all(axis.get_ylabel() for axis in axes)
    steps = np.arange(11)
    for axis, (x, y) in zip(
        axes,
        [(steps, steps / 4), ([0, 5, 10], [0.5, 0.625, 0.75]), (steps, steps / 2)],
        strict=True,
    ):
        np.testing.assert_array_equal(axis.lines[0].get_xdata(), x)
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), y)


def test_the_last_value_is_written_beside_its_curve(drawn: list[Figure]) -> None:
    curves(ROWS, Path("curves.png"))
    assert [axis.texts[0].get_text() for axis in drawn[0].axes] == ["2.50", "0.75", "5.00"]


def test_a_rate_is_shown_from_0_to_1_and_kl_from_0(drawn: list[Figure]) -> None:
    curves(ROWS, Path("curves.png"))
    _, gold, kl = drawn[0].axes
    assert gold.get_ylim()[0] <= 0 < 1 <= gold.get_ylim()[1]
    assert kl.get_ylim()[0] <= 0


def test_a_png_of_print_resolution(tmp_path: Path) -> None:
    style = dict(matplotlib.rcParams)
    curves(ROWS, tmp_path / "curves.png")
    width, height = Image.open(tmp_path / "curves.png").size
    assert width >= 1000
    assert height >= 1000
    assert dict(matplotlib.rcParams) == style


def test_one_iteration_is_enough(drawn: list[Figure]) -> None:
    curves(ROWS[1:2], Path("curves.png"))
    assert drawn


@pytest.mark.parametrize("missing", [panel.metric for panel in plots.PANELS])
def test_a_metric_that_no_row_has_is_named(missing: str) -> None:
    rows = [{k: v for k, v in row.items() if k != missing} for row in ROWS]
    with pytest.raises(ValueError, match=missing):
        curves(rows, Path("curves.png"))
