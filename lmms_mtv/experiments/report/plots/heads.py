"""The maps of selection probabilities and chosen heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.plots import layout
from lmms_mtv.experiments.report.plots.plot import Plot
from lmms_mtv.experiments.report.plots.vectors import cells_by_vectors
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import NONE
from lmms_mtv.experiments.report.table import Table

_RANDOM: Final = "random"
"""The method that draws heads at random, as many as MTV chose."""

_DRAWN: Final = "share of seeds that drew the head at random"


@dataclass(frozen=True)
class HeadSelection:
    """The heads that the fits of one task selected.

    Attributes:
        probability: mean probability of each head over seeds, float64 [layers, heads].
        chosen: share of seeds that chose each head, float64 [layers, heads].
        seeds: number of seeds.
        drawn: True if the heads were drawn at random, whatever their probability.
    """

    probability: NDArray[np.float64]
    chosen: NDArray[np.float64]
    seeds: int
    drawn: bool = False

    @property
    def colour(self) -> NDArray[np.float64]:
        """The numbers behind the colours: the probabilities, or the shares of seeds for heads drawn at random."""
        return self.chosen if self.drawn else self.probability

    @classmethod
    def of(cls, cells: Sequence[Cell]) -> HeadSelection:
        """Return the selection that the vectors of the cells of one task store."""
        vectors = [cell.vector for cell in cells if cell.vector]
        layers, heads = vectors[0]["shape"][:2]
        probabilities = np.array([vector["probabilities"] for vector in vectors], dtype=np.float64)
        chosen = np.zeros((layers, heads))
        for vector in vectors:
            for layer, head in vector["heads"]:
                chosen[layer, head] += 1 / len(vectors)
        probability = probabilities.mean(axis=0).reshape(layers, heads)
        return cls(probability, chosen.round(9), len(vectors), cells[0].method == _RANDOM)

    def rows(self, task: str) -> list[list[str]]:
        """Return a row of text for each layer: the number behind each head's colour, and the seeds with the head."""
        layers, heads = self.probability.shape
        return [
            [
                task,
                str(layer),
                *(
                    f"{self.colour[layer, head]:.2f} ({round(self.chosen[layer, head] * self.seeds)}/{self.seeds})"
                    for head in range(heads)
                ),
            ]
            for layer in range(layers)
        ]

    def in_words(self, task: str) -> str:
        """Return how many heads were chosen, and the first heads that every seed chose."""
        always = ", ".join(f"{layer}.{head}" for layer, head in np.argwhere(self.chosen == 1)[:12]) or "none"
        return f"{task}: {self.chosen.sum():.1f} of {self.chosen.size} heads chosen on average, in every seed {always}"


def heads(results: Results) -> list[Plot]:
    """Return a plot for each arm with a policy, with a map of layers x heads for each task.

    Arms with the same vectors share one plot.
    """
    groups = cells_by_vectors(results, "probabilities").items()
    return [
        _plot(f"heads-{number}" if number > 1 else "heads", arms, cells)
        for number, (arms, cells) in enumerate(groups, start=1)
    ]


def _plot(name: str, arms: str, cells: Sequence[Cell]) -> Plot:
    tasks = sorted({cell.task for cell in cells})
    selections = {task: HeadSelection.of([cell for cell in cells if cell.task == task]) for task in tasks}
    layers = max(len(selection.probability) for selection in selections.values())
    drawn = cells[0].method == _RANDOM
    figure, panels = layout.panels(f"Chosen heads, {arms}", len(tasks), height=min(2.6, 1.1 + 0.09 * max(layers, 4)))
    for axes, (task, selection) in zip(panels, selections.items(), strict=True):
        image = _draw(axes, task, selection)
    layout.outer_labels(panels, "head", "layer")
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.8, aspect=35, pad=0.02)
    bar.set_label(_DRAWN if drawn else "selection probability, mean over seeds")
    title = f"{'Heads drawn at random' if drawn else 'Selection probability and chosen heads'}, {arms}"
    what = f"{_DRAWN} (seeds that drew it / seeds)" if drawn else "probability (seeds that chose it / seeds)"
    most = max(selection.probability.shape[1] for selection in selections.values())
    rows = [row for task, selection in selections.items() for row in selection.rows(task)]
    words = "; ".join(selection.in_words(task) for task, selection in selections.items())
    return Plot(
        name,
        title,
        f"Colour: {_DRAWN if drawn else 'the probability of a head after REINFORCE, mean over seeds'}. Circles: heads "
        "that were chosen; the area is the share of seeds that chose them. Layers and heads count from 0; layers are "
        "those with softmax attention.",
        f"A map of layers and heads for each task. {words} (layer.head).",
        Table(
            f"{title}: {what}",
            ["task", "layer", *(f"head {head}" for head in range(most))],
            [row + [NONE] * (most + 2 - len(row)) for row in rows],
        ),
        figure,
    )


def _draw(axes: Axes, task: str, selection: HeadSelection) -> Any:
    """Draw the map of one task, and return the image that the colour bar describes."""
    layers, count = selection.probability.shape
    image = axes.imshow(selection.colour, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="none")
    chosen = np.argwhere(selection.chosen > 0)
    # A circle fits into the cell of its head.
    size = min(1.0, 12 / count, 14 / layers) ** 2 * 34
    axes.scatter(
        chosen[:, 1],
        chosen[:, 0],
        s=size * selection.chosen[selection.chosen > 0],
        marker="o",
        facecolor="white",
        edgecolor="black",
        linewidth=0.6,
    )
    axes.set_title(task, fontsize=8)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(layers - 0.5, -0.5)
    return image
