"""Figures, grids of panels, and legends below them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from lmms_mtv.experiments.report.plots.style import LEGEND_FONT_SIZE

WIDTH: Final = 4.4
"""Width of every figure in inches: a phone shows about 4.4 inches without scaling, at 96 pixels an inch."""

_LEGEND_ROW: Final = 1.55 * LEGEND_FONT_SIZE / 72
"""Height of one row of a legend in inches: a line of text, and half a font size to the next row."""

_LEGEND_ROWS: Final = 2
"""Rows of a legend that the heights of :func:`single` and :func:`panels` leave room for."""


def single(title: str, height: float = 3.0) -> tuple[Figure, Axes]:
    """Return a figure ``height`` inches high, and its only axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def panels(title: str, count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``count`` panels, two side by side, each row of them ``height`` inches high."""
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 1.1), layout="constrained")
    figure.suptitle(title, fontsize=9)
    return figure, [figure.add_subplot(rows, columns, index + 1) for index in range(count)]


def outer_labels(axes: Sequence[Axes], x: str, y: str) -> None:
    """Label the left and the lowest axes in a grid of panels, two side by side."""
    for left in axes[::2]:
        left.set_ylabel(y, fontsize=8)
    for lowest in axes[-2:]:
        lowest.set_xlabel(x, fontsize=8)


def legend(figure: Figure, axes: Axes) -> None:
    """Draw the legend of ``axes`` below the figure, and make the figure higher for a legend of many rows."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    longest = max(map(len, labels))
    columns = 3 if longest < 16 else 2 if longest < 26 else 1
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, rows - _LEGEND_ROWS))
    if isinstance(engine := figure.get_layout_engine(), ConstrainedLayoutEngine):
        # The room for a long legend is measured a little short.
        engine.set(h_pad=0.055)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
