"""A plot: a figure with its caption, its description in words and the table of its data."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lmms_mtv.experiments.report.plots import style
from lmms_mtv.experiments.report.table import Table


@dataclass(frozen=True)
class Plot:
    """A figure, with the text and the table for readers who cannot see the figure.

    Attributes:
        name: the file name without its ending.
        title: the title of the plot.
        caption: the text below the figure.
        alternative: the figure in words, for screen readers.
        table: the data of the figure.
        figure: the matplotlib figure.
    """

    name: str
    title: str
    caption: str
    alternative: str
    table: Table
    figure: Figure

    def svg(self) -> str:
        """Return the figure as an SVG document without a background, the same document at every call."""
        document = io.StringIO()
        with style.applied(self.name):
            FigureCanvasSVG(self.figure)
            self.figure.savefig(document, format="svg", transparent=True, metadata={"Date": None})
        return document.getvalue()

    def save(self, folder: Path) -> list[Path]:
        """Write ``<name>.png`` and ``<name>.svg``, on white, into ``folder``, and return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        with style.applied(self.name):
            FigureCanvasAgg(self.figure)
            self.figure.savefig(paths[0], dpi=200, facecolor="white")
            FigureCanvasSVG(self.figure)
            self.figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
        return paths
