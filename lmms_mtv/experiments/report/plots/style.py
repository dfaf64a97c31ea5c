"""Colours, markers and matplotlib settings that all plots share.

Series differ by marker and line style too, never by colour alone. The colours are those of Okabe and Ito; maps use
cividis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import matplotlib

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#767676")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES: Final = ("-", "--", "-.", ":")
INK: Final = "#1a1a1a"
GRID: Final = "#d9d9d9"

LEGEND_FONT_SIZE: Final = 8

_SETTINGS: Final[dict[str, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": LEGEND_FONT_SIZE,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    # Hinted text has other proportions at other resolutions, and would leave the room that the layout gave it.
    "text.hinting": "none",
    "svg.fonttype": "path",
}


@contextmanager
def applied(salt: str = "lmms-mtv") -> Iterator[None]:
    """Use the matplotlib settings of the plots within the block.

    Args:
        salt: text from which matplotlib derives the ids in an SVG, so that every run writes the same ids.
    """
    settings: Any = {**_SETTINGS, "svg.hashsalt": salt}
    with matplotlib.rc_context(settings):
        yield


def line(index: int) -> dict[str, Any]:
    """Return the keyword arguments of ``Axes.plot`` for the line number ``index``."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        # Open markers: where two of them overlap, both stay visible.
        "markerfacecolor": "none",
        "markeredgewidth": 1.5,
    }
