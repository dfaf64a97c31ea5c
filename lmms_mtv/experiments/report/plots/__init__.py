"""Plots of results, drawn by matplotlib without pyplot.

Every plot has a figure, a caption, a description of the figure in words, and a table of the same data. ``plot`` has the
class of a plot. ``style`` and ``layout`` have the parts that all plots share. Each other module has the plots of one
quantity.
"""

from __future__ import annotations

from lmms_mtv.experiments.report.plots import style
from lmms_mtv.experiments.report.plots.cost import memory, runtime
from lmms_mtv.experiments.report.plots.heads import heads
from lmms_mtv.experiments.report.plots.loss import loss
from lmms_mtv.experiments.report.plots.plot import Plot
from lmms_mtv.experiments.report.plots.score import score
from lmms_mtv.experiments.report.plots.tokens import tokens
from lmms_mtv.experiments.report.results import Results

__all__ = ["Plot", "plots"]


def plots(results: Results) -> list[Plot]:
    """Return the plots that these results have data for."""
    with style.applied():
        single = (score(results), runtime(results), memory(results), tokens(results))
        drawn = [plot for plot in (*single, *heads(results), loss(results)) if plot is not None]
        for plot in drawn:
            # Lay the figure out only once: every drawing would move a colour bar a little.
            plot.figure.draw_without_rendering()
            plot.figure.set_layout_engine("none")
    return drawn
