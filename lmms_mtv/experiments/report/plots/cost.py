"""The plots of runtime and of peak memory against the number of demonstrations in the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from matplotlib.ticker import MaxNLocator

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report import summary
from lmms_mtv.experiments.report.plots import layout, line
from lmms_mtv.experiments.report.plots.plot import Plot
from lmms_mtv.experiments.report.plots.vectors import methods_by_arm
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import Mean
from lmms_mtv.experiments.report.table import Table

_FAR: Final = 50
"""The ratio of the largest to the smallest cost above which the axis is logarithmic."""


def runtime(results: Results) -> Plot | None:
    """Return the plot of the seconds of evaluation against the demonstrations in the prompt."""
    return _against_shots(
        results,
        "runtime",
        "Runtime against shots",
        "evaluation, s per 100 prompts",
        summary.evaluation_seconds,
        "Seconds of evaluation for 100 prompts, mean over tasks, then over seeds; the band is one standard deviation "
        "over seeds.",
    )


def memory(results: Results) -> Plot | None:
    """Return the plot of the peak memory of evaluation against the demonstrations in the prompt."""
    return _against_shots(
        results,
        "memory",
        "Peak memory against shots",
        "peak memory of evaluation, GB",
        lambda cells: summary.peak_memory(cells, "evaluation"),
        "Highest peak of memory over tasks, mean over seeds; the band is one standard deviation over seeds. On a CPU "
        "it is resident memory of the process, weights and libraries included.",
    )


def _against_shots(
    results: Results,
    name: str,
    title: str,
    label: str,
    cost: Callable[[Sequence[Cell]], float | None],
    caption: str,
) -> Plot | None:
    """Return the plot of the ``cost`` of cells, or None if fewer than two numbers of demonstrations have a cost."""

    def mean_of(arm: str) -> Mean:
        by_seed: dict[int, list[Cell]] = {}
        for cell in results.of(arm):
            by_seed.setdefault(cell.seed, []).append(cell)
        costs = [value for cells in by_seed.values() if (value := cost(cells)) is not None]
        return summary.mean(costs, len(results.expected(arm)))

    shots = {arm: float(cells[0].shots) for arm in results.arms if (cells := results.of(arm))}
    names = _with_devices(results, methods_by_arm(results))
    lines = line.lines(results, shots, names, mean_of, _with_devices(results, {arm: arm for arm in shots}))
    if len(line.positions_in(lines)) < 2:
        return None
    figure, axes = layout.single(title)
    line.draw(axes, lines)
    axes.set_xlabel("shots (demonstrations in the prompt)")
    axes.set_ylabel(label)
    values = [point.mean.value for points in lines.values() for point in points if point.mean.value]
    if values and max(values) > _FAR * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    layout.legend(figure, axes)
    rows = [
        [method, point.arm, line.short(point.x), str(point.mean)]
        for method, points in lines.items()
        for point in points
    ]
    words = f"Line plot. {line.in_words(lines, 'shots', label)}"
    return Plot(name, title, caption, words, Table(title, ["method", "arm", "shots", label], rows), figure)


def _with_devices(results: Results, names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of arms, with the device of the arm if several devices ran the cells."""
    if len(results.devices()) == 1:
        return dict(names)
    return {arm: f"{name} ({', '.join(results.devices(arm))})" for arm, name in names.items()}
