"""The plot of the loss over the steps of REINFORCE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.plots import layout, style
from lmms_mtv.experiments.report.plots.plot import Plot
from lmms_mtv.experiments.report.plots.vectors import cells_by_vectors
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import number
from lmms_mtv.experiments.report.table import Table


@dataclass(frozen=True)
class LossCurve:
    """The smoothed losses of one task over the steps.

    Attributes:
        steps: the number of each step, int [n].
        losses: the loss of each seed at each step, float64 [seeds, n], nats per token.
        window: the number of steps that each value is the mean of.
    """

    steps: NDArray[np.int64]
    losses: NDArray[np.float64]
    window: int

    @classmethod
    def of(cls, cells: Sequence[Cell], steps: int | None) -> LossCurve | None:
        """Return the curve of the cells of one task, or None if their vectors store no losses.

        Args:
            cells: the cells of one task. Fits that ended at different steps have a curve up to the first of these
                steps.
            steps: the number of steps of a fit whose vector does not store the number; None if the settings do not have
                the number.
        """
        vectors = [cell.vector for cell in cells if cell.vector]
        histories = [np.array(vector["policy"], dtype=float) for vector in vectors]
        if not min(map(len, histories), default=0):
            return None
        # A stored loss is the mean of this many consecutive steps.
        strides = [
            max(round((vector.get("steps") or steps or len(history)) / len(history)), 1)
            for vector, history in zip(vectors, histories, strict=True)
        ]
        stride = max(strides)
        count = max(min(len(each) * own for each, own in zip(histories, strides, strict=True)) // stride, 1)
        at = np.arange(1, count + 1) * stride
        window = max(1, count // 30) | 1
        losses = [
            _smoothed(np.interp(at, np.arange(1, len(each) + 1) * own, each), window)
            for each, own in zip(histories, strides, strict=True)
        ]
        return cls(at, np.array(losses), window * stride)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean loss over seeds at each step, float64 [n]."""
        return np.asarray(self.losses.mean(axis=0))

    def draw(self, axes: Axes, index: int, label: str) -> None:
        """Draw the curve as line number ``index``, with a band of one standard deviation over seeds."""
        line_style = style.line(index) | {"marker": ""}
        axes.plot(self.steps, self.mean, label=label, **line_style)
        if len(self.losses) > 1:
            spread = self.losses.std(axis=0, ddof=1)
            below, above = self.mean - spread, self.mean + spread
            axes.fill_between(self.steps, below, above, color=line_style["color"], alpha=0.2, linewidth=0)

    def rows(self) -> list[list[str]]:
        """Return the step and the mean loss as text, for about every tenth of the curve."""
        count = len(self.steps)
        shown = sorted({0, *range(count // 10 - 1, count, max(1, count // 10)), count - 1})
        return [[str(self.steps[step]), number(float(self.mean[step]))] for step in shown if step >= 0]

    def in_words(self) -> str:
        """Return the mean loss at the first and at the last step."""
        return f"{self.mean[0]:.2f} at step {self.steps[0]}, {self.mean[-1]:.2f} at step {self.steps[-1]}"


def loss(results: Results) -> Plot | None:
    """Return the plot of the loss, with a panel for each task and a line for each arm with a policy.

    Arms with the same vectors share one line. The result is None if no arm has a policy.
    """
    groups = cells_by_vectors(results, "policy")
    if not groups:
        return None
    tasks = sorted({cell.task for cells in groups.values() for cell in cells})
    figure, panels = layout.panels("Loss over steps of REINFORCE", len(tasks), height=1.35)
    rows, words, windows = [], [], set()
    for axes, task in zip(panels, tasks, strict=True):
        axes.set_title(task, fontsize=8)
        for index, (arms, cells) in enumerate(groups.items()):
            curve = LossCurve.of([cell for cell in cells if cell.task == task], cells[0].settings.get("steps"))
            if curve is None:
                continue
            curve.draw(axes, index, arms)
            rows += [[task, arms, *row] for row in curve.rows()]
            words.append(f"{task}, {arms}: {curve.in_words()}")
            windows.add(curve.window)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    layout.outer_labels(panels, "step", "loss, nats per token")
    if len(groups) > 1:
        layout.legend(figure, panels[0])
    smoothed = f"smoothed by a moving mean of {' or '.join(map(str, sorted(windows)))} steps"
    title = "Loss over steps of REINFORCE"
    return Plot(
        "loss",
        title,
        f"Mean cross-entropy of the target over the masks of a step, mean over seeds, {smoothed}; the band is one "
        "standard deviation over seeds.",
        f"Line plots. {'; '.join(words)}.",
        Table(f"{title}, {smoothed}, every tenth of them", ["task", "arm", "step", "loss"], rows),
        figure,
    )


def _smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the centred moving mean over ``window`` values; at the ends, over the values that exist."""
    kernel = np.ones(window)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    return np.asarray(np.convolve(values, kernel, mode="same") / counts)
