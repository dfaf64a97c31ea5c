"""Line plots of arms: a line for each series, a band for the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from lmms_mtv.experiments.report.plots import style
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import Mean


class Point(NamedTuple):
    """The mean of an arm at a position on the x axis."""

    x: float
    mean: Mean
    arm: str


Lines = Mapping[str, list[Point]]
"""The points of each line, by the name of the line, in the order of their positions."""

UNLIMITED: Final = (-math.inf, math.inf)
"""The range of a quantity without a lowest and a highest value."""


def lines(
    results: Results,
    positions: Mapping[str, float],
    names: Mapping[str, str],
    mean_of: Callable[[str], Mean],
    arm_names: Mapping[str, str] | None = None,
) -> Lines:
    """Return the lines through the arms that have a position.

    Args:
        results: the results that have the arms.
        positions: the position of each arm on the x axis.
        names: the name of the line that each arm belongs to. Where two arms of a line share a position, each arm of
            this line becomes a line under the arm's name. A line through one arm has the arm's name too, and a name
            that is empty stays empty.
        mean_of: the function that returns the mean of an arm. Arms whose mean has no value are left out.
        arm_names: the names of the arms in the plot; None for the names of the plan.
    """
    arms = [arm for arm in results.arms if arm in positions]
    occupied = [(names[arm], positions[arm]) for arm in arms]
    lines_of = [names[arm] for arm in arms]
    crowded = {name for name, position in occupied if occupied.count((name, position)) > 1}
    crowded |= {name for name in lines_of if name and lines_of.count(name) == 1}
    points: dict[str, list[Point]] = {}
    for arm in arms:
        mean = mean_of(arm)
        if mean.value is not None:
            name = (arm_names or {}).get(arm, arm) if names[arm] in crowded else names[arm]
            points.setdefault(name, []).append(Point(positions[arm], mean, arm))
    return {name: sorted(line, key=lambda point: point.x) for name, line in points.items()}


def positions_in(lines: Lines) -> list[float]:
    """Return the different positions of the points, in ascending order."""
    return sorted({point.x for points in lines.values() for point in points})


def draw(axes: Axes, lines: Lines, within: tuple[float, float] = UNLIMITED) -> None:
    """Draw the lines with their bands, and a line of a single point as a marker with an error bar.

    Args:
        axes: the axes to draw on.
        lines: the lines.
        within: the lowest and the highest value of the quantity. Bands and error bars end there.
    """
    for index, (name, points) in enumerate(lines.items()):
        x = [point.x for point in points]
        y = np.array([point.mean.value for point in points], dtype=float)
        spread = np.array([point.mean.spread or 0.0 for point in points])
        low, high = np.clip(y - spread, *within), np.clip(y + spread, *within)
        line_style = style.line(index)
        axes.plot(x, y, label=name or None, **line_style)
        if len(points) > 1:
            axes.fill_between(x, low, high, color=line_style["color"], alpha=0.2, linewidth=0)
        else:
            axes.errorbar(x, y, yerr=[y - low, high - y], color=line_style["color"], capsize=3, linewidth=1.2)


def in_words(lines: Lines, axis: str, label: str) -> str:
    """Return the lines as a sentence: each mean with its position."""
    parts = []
    for name, points in lines.items():
        values = ", ".join(f"{point.mean} at {short(point.x)}" for point in points)
        parts.append(f"{name or 'All arms'}: {values}")
    return f"{label} against {axis}. {'; '.join(parts)}."


def short(x: float) -> str:
    """Return a position without trailing zeros."""
    return f"{x:g}"
