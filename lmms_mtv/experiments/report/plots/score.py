"""The plot of the mean score against the number of demonstrations, or against the axis that the plan declares."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report import summary
from lmms_mtv.experiments.report.plots import layout, line
from lmms_mtv.experiments.report.plots.plot import Plot
from lmms_mtv.experiments.report.plots.style import INK
from lmms_mtv.experiments.report.plots.vectors import IN_THE_PROMPT
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import NONE
from lmms_mtv.experiments.report.table import Table


def score(results: Results) -> Plot | None:
    """Return the plot of the mean score, or None if there are fewer than two positions on the x axis.

    The x axis is the axis that the plan declares (``x``), else the number of training examples that each arm uses.
    """
    if not summary.poolable(results):
        return None
    declared = results.plan.x
    if declared is not None:
        axis = declared.axis
        positions = {arm: float(value) for arm, value in declared.values.items()}
        names = {arm: declared.series.get(arm, "") for arm in positions}
    else:
        axis = "examples used, in the prompt and in the fit"
        positions = {arm: count for arm in results.arms if (count := _examples(results.of(arm)))}
        names = {arm: _series(results.of(arm)) for arm in positions}
    lines = line.lines(results, positions, names, lambda arm: summary.mean_score(results, arm))
    if len(line.positions_in(lines)) < 2:
        return None
    figure, axes = layout.single(f"Score against {axis.split(',')[0]}")
    values = [point.mean.value for points in lines.values() for point in points if point.mean.value is not None]
    is_share = bool(values) and min(values) >= 0 and max(values) <= 1
    line.draw(axes, lines, (0.0, 1.0) if is_share else line.UNLIMITED)
    baseline = results.baseline if results.baseline not in positions else None
    if baseline is not None and (level := summary.mean_score(results, baseline).value) is not None:
        axes.axhline(level, color=INK, linestyle=(0, (1, 2)), linewidth=1.2, label=baseline)
    _scale_x(axes, line.positions_in(lines))
    axes.set_xlabel(axis)
    axes.set_ylabel(_metric(results))
    layout.legend(figure, axes)
    if is_share:
        axes.set_ylim(-0.03, 1.03)
    caption = f"{_metric(results, short=False)}, mean over seeds; the band is one standard deviation over seeds."
    if declared is None:
        caption += (
            " Of a fit count the different examples that it drew; in older cells, the demonstrations of its prompts, "
            "repeated ones each time."
        )
    rows = [
        [name or NONE, point.arm, line.short(point.x), str(point.mean)]
        for name, points in lines.items()
        for point in points
    ]
    words = f"Line plot. {line.in_words(lines, axis, 'score')}"
    if baseline is not None:
        mean = str(summary.mean_score(results, baseline))
        rows.append([NONE, baseline, NONE, mean])
        words += f" {baseline}, a horizontal line: {mean}."
    title = f"Score against {axis}"
    table = Table(title, ["series", "arm", axis, "score"], rows)
    return Plot("score", title, caption, words, table, figure)


def _scale_x(axes: Axes, positions: Sequence[float]) -> None:
    """Make the x axis logarithmic if the positions are positive and far apart, with ticks at the positions."""
    if positions[0] <= 0 or positions[-1] / positions[0] < 8:
        return
    axes.set_xscale("log")
    ticks: list[float] = []
    for position in positions:
        if not ticks or position / ticks[-1] >= (positions[-1] / positions[0]) ** 0.06:
            ticks.append(position)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    axes.xaxis.set_major_formatter(formatter)


def _examples(cells: Sequence[Cell]) -> int:
    """Return the number of training examples that an arm uses: in a prompt, and different ones in the fit.

    Fits may use different numbers of examples. The mean over fits is rounded.
    """
    if not cells:
        return 0
    vectors = [cell.vector for cell in cells if cell.vector]
    used = (vector["examples"] if vector.get("used") is None else vector["used"] for vector in vectors)
    return cells[0].shots + round(summary.average(used) or 0)


def _series(cells: Sequence[Cell]) -> str:
    """Return the name of the line that the cells of an arm belong to."""
    first = cells[0]
    if first.vector is None:
        return IN_THE_PROMPT
    return f"{first.method} + {first.shots}-shot" if first.shots else first.method


def _metric(results: Results, short: bool = True) -> str:
    """Return the name of the metric and the number of tasks in its mean, for the y axis or for the caption."""
    metrics = sorted({cell.metric for cell in results.cells})
    if len(metrics) == 1:
        name = metrics[0]
    else:
        name = "score" if short else f"Scores of different metrics ({', '.join(metrics)})"
    if len(results.tasks) == 1:
        return f"{name}, {results.tasks[0]}"
    note = "" if short or len({cell.n for cell in results.cells}) == 1 else ", each counted once"
    return f"{name}, mean of {len(results.tasks)} tasks{note}"
