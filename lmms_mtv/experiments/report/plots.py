"""Pictures of results, drawn by matplotlib without pyplot.

Every plot has its figure, a caption, its figures in words and a table of the same data. Series differ by marker and
line style too, never by colour alone. Colours are Okabe and Ito's, maps are cividis.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter
from numpy.typing import NDArray

from lmms_mtv.experiments.cells import Cell
from lmms_mtv.experiments.report import summary
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import MISSING, NONE, Mean, number
from lmms_mtv.experiments.report.tables import Table

COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#767676")
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LINES: Final = ("-", "--", "-.", ":")
INK: Final = "#1a1a1a"
GRID: Final = "#d9d9d9"
WIDTH: Final = 4.4
"""Inches: about what a phone shows without scaling at a browser's 96 a inch."""

_STYLE: Final[dict[str, Any]] = {
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
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Plot:
    """A figure, with what a reader needs who cannot see it."""

    name: str
    title: str
    caption: str
    alternative: str
    table: Table
    figure: Figure

    def svg(self) -> str:
        """Return the figure as an SVG document without a background, the same at every call."""
        written = io.StringIO()
        with _style(self.name):
            FigureCanvasSVG(self.figure)
            self.figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
        return written.getvalue()

    def save(self, folder: Path) -> list[Path]:
        """Write ``<name>.png`` and ``<name>.svg``, on white, into ``folder``; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.png", folder / f"{self.name}.svg"]
        with _style(self.name):
            FigureCanvasAgg(self.figure)
            self.figure.savefig(paths[0], dpi=200, facecolor="white")
            FigureCanvasSVG(self.figure)
            self.figure.savefig(paths[1], facecolor="white", metadata={"Date": None})
        return paths


@contextmanager
def _style(salt: str = "lmms-mtv") -> Iterator[None]:
    """matplotlib's settings of these plots; ``salt`` makes the ids in an SVG the same at every run."""
    settings: Any = {**_STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(settings):
        yield


def plots(results: Results) -> list[Plot]:
    """Return the plots that these results have data for."""
    with _style():
        found = [curve(results), runtime(results), memory(results), tokens(results), *heads(results), loss(results)]
        kept = [plot for plot in found if plot is not None]
        for plot in kept:
            # Laid out once and for all: every drawing would move a colour bar a little.
            plot.figure.draw_without_rendering()
            plot.figure.set_layout_engine("none")
    return kept


# Points of a line: x, the mean there, the arm it is of.
Points = list[tuple[float, Mean, str]]


def curve(results: Results) -> Plot | None:
    """Mean score against what the plan's ``x`` says, or else against the number of demonstrations used."""
    if not summary.poolable(results):
        return None
    declared = results.plan.x
    if declared is not None:
        axis = declared.axis
        cell_keys = {arm: float(key) for arm, key in declared.values.items()}
        names = {arm: declared.series.get(arm, "") for arm in cell_keys}
    else:
        axis = "demonstrations used, in the prompt and in the vector"
        cell_keys = {arm: used for arm in results.arms if (used := _examples(results.of(arm)))}
        names = {arm: _method(results.of(arm)) for arm in cell_keys}
    lines = _lines(results, cell_keys, names, lambda arm: summary.mean_score(results, arm))
    if len({x for points in lines.values() for x, _, _ in points}) < 2:
        return None
    figure, axes = _figure(f"Score against {axis.split(',')[0]}")
    _draw(axes, lines)
    baseline = results.baseline if results.baseline not in cell_keys else None
    if baseline is not None and (level := summary.mean_score(results, baseline).value) is not None:
        axes.axhline(level, color=INK, linestyle=(0, (1, 2)), linewidth=1.2, label=baseline)
    _x_scale(axes, sorted({x for points in lines.values() for x, _, _ in points}))
    axes.set_xlabel(axis)
    axes.set_ylabel(_score_label(results))
    _legend(figure, axes)
    seen = [found.value for points in lines.values() for _, found, _ in points if found.value is not None]
    if seen and min(seen) >= 0 and max(seen) <= 1:
        axes.set_ylim(-0.03, 1.03)
    caption = f"{_score_label(results, short=False)}, mean over seeds; the band is one standard deviation over seeds."
    rows = [[name or NONE, arm, _short(x), str(found)] for name, points in lines.items() for x, found, arm in points]
    if baseline is not None:
        rows.append([NONE, baseline, NONE, str(summary.mean_score(results, baseline))])
    title = f"Score against {axis}"
    table = Table(title, ["series", "arm", axis, "score"], rows)
    words = f"Line plot. {_in_words(lines, axis, 'score')}"
    if baseline is not None:
        words += f" {baseline}, a horizontal line: {summary.mean_score(results, baseline)}."
    return Plot("score", title, caption, words, table, figure)


def runtime(results: Results) -> Plot | None:
    """Seconds of evaluation against demonstrations in the prompt."""
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
    """Peak memory of evaluation against demonstrations in the prompt."""
    return _against_shots(
        results,
        "memory",
        "Peak memory against shots",
        "peak memory of evaluation, GB",
        lambda cells: summary.peak_memory(cells, "evaluation"),
        "Highest peak of memory over tasks, mean over seeds; the band is one standard deviation over seeds. On a CPU "
        "it is resident memory of the process, weights and libraries included.",
    )


def tokens(results: Results) -> Plot | None:
    """Shares of image and text tokens of each arm."""
    shares = {arm: share for arm in results.arms if (share := summary.image_share(results.of(arm))) is not None}
    if not shares or not any(shares.values()):
        return None
    totals = {arm: summary.prompt_tokens(results.of(arm)) for arm in shares}
    figure, axes = _figure("Share of image tokens", height=1.0 + 0.32 * len(shares))
    cell_keys = range(len(shares))
    image = [100 * share for share in shares.values()]
    axes.barh(cell_keys, image, color=COLOURS[0], label="image", height=0.7)
    rest = [100 - share for share in image]
    axes.barh(cell_keys, rest, left=image, color="none", edgecolor=COLOURS[4], hatch="///", label="text", height=0.7)
    labels = [f"{arm}\n({_rounded(totals[arm], 0)} tokens)" for arm in shares]
    axes.set_yticks(list(cell_keys), labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the tokens of a prompt, %")
    axes.set_ylabel("arm")
    axes.grid(False, axis="y")
    _legend(figure, axes)
    rows = [[arm, _rounded(totals[arm], 1), _rounded(100 * share, 1)] for arm, share in shares.items()]
    words = "; ".join(f"{arm} {share} % of {total}" for arm, total, share in rows)
    return Plot(
        "tokens",
        "Share of image tokens",
        "Share of image tokens among the tokens of a prompt, over all tasks and seeds; in brackets the mean length.",
        f"Stacked bars. Image tokens: {words} tokens.",
        Table("Share of image tokens", ["arm", "tokens per prompt", "image tokens, %"], rows),
        figure,
    )


def heads(results: Results) -> list[Plot]:
    """For each arm with a policy, a map of layers x heads for each task; arms with the same vectors share one."""
    found = []
    for number_, (arms, cells) in enumerate(_vectors(results, "probabilities").items()):
        tasks = sorted({cell.task for cell in cells})
        figure, panels = _panels(f"Chosen heads, {arms}", tasks, height=1.45)
        rows, words = [], []
        for axes, task in zip(panels, tasks, strict=True):
            probability, chosen, seeds = _selection([cell for cell in cells if cell.task == task])
            layers, count = probability.shape
            image = axes.imshow(probability, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="none")
            cell_keys = np.argwhere(chosen > 0)
            size = min(1.0, 12 / count) ** 2 * 34
            axes.scatter(
                cell_keys[:, 1],
                cell_keys[:, 0],
                s=size * chosen[chosen > 0],
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
            for layer in range(layers):
                cells_ = [
                    f"{probability[layer, head]:.2f} ({round(chosen[layer, head] * seeds)}/{seeds})"
                    for head in range(count)
                ]
                rows.append([task, str(layer), *cells_])
            always = ", ".join(f"{layer}.{head}" for layer, head in np.argwhere(chosen == 1)[:12]) or "none"
            mean_count = chosen.sum()
            words.append(
                f"{task}: {mean_count:.1f} of {layers * count} heads chosen on average, in every seed {always}"
            )
        _outer_labels(panels, "head", "layer")
        bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.8, aspect=35, pad=0.02)
        bar.set_label("selection probability, mean over seeds")
        width = max(len(row) for row in rows) - 2
        rows = [row + [NONE] * (width + 2 - len(row)) for row in rows]
        title = f"Selection probability and chosen heads, {arms}"
        found.append(
            Plot(
                f"heads-{number_ + 1}" if number_ else "heads",
                title,
                "Colour: the probability of a head after REINFORCE, mean over seeds. Circles: heads that were chosen; "
                "the area is the share of seeds that chose them. Layers and heads count from 0; layers are those with "
                "softmax attention.",
                f"A map of layers and heads for each task. {'; '.join(words)} (layer.head).",
                Table(
                    f"{title}: probability (seeds that chose it / seeds)",
                    ["task", "layer", *(f"head {head}" for head in range(width))],
                    rows,
                ),
                figure,
            )
        )
    return found


def _steps_in_one(cell: Cell, points: int) -> int:
    """Steps of REINFORCE in each of the ``points`` that a cell keeps of them."""
    return max(round(int(cell.settings.get("steps", points)) / points), 1)


def loss(results: Results) -> Plot | None:
    """Loss over the steps of REINFORCE, a panel for each task and a line for each arm with a policy."""
    groups = _vectors(results, "policy")
    if not groups:
        return None
    tasks = sorted({cell.task for cells in groups.values() for cell in cells})
    figure, panels = _panels("Loss over steps of REINFORCE", tasks, height=1.35)
    rows, words, windows = [], [], set()
    for axes, task in zip(panels, tasks, strict=True):
        axes.set_title(task, fontsize=8)
        for index, (arms, cells) in enumerate(groups.items()):
            histories = [cell.vector["policy"] for cell in cells if cell.task == task and cell.vector]
            steps = min(map(len, histories), default=0)
            if not steps:
                continue
            window = max(1, steps // 30) | 1
            # A cell keeps means of as many neighbouring steps each.
            every = _steps_in_one(cells[0], steps)
            windows.add(window * every)
            at = np.arange(1, steps + 1) * every
            smooth = np.array([_smoothed(np.array(history[:steps], dtype=float), window) for history in histories])
            middle = smooth.mean(axis=0)
            style = _line(index) | {"marker": ""}
            axes.plot(at, middle, label=arms, **style)
            if len(histories) > 1:
                spread = smooth.std(axis=0, ddof=1)
                below, above = middle - spread, middle + spread
                axes.fill_between(at, below, above, color=style["color"], alpha=0.2, linewidth=0)
            shown = sorted({0, *range(steps // 10 - 1, steps, max(1, steps // 10)), steps - 1})
            rows += [[task, arms, str(at[step]), number(float(middle[step]))] for step in shown if step >= 0]
            words.append(f"{task}, {arms}: {middle[0]:.2f} at step {at[0]}, {middle[-1]:.2f} at step {at[-1]}")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    _outer_labels(panels, "step", "loss, nats per token")
    if len(groups) > 1:
        _legend(figure, panels[0])
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


def _against_shots(
    results: Results,
    name: str,
    title: str,
    label: str,
    of: Callable[[Sequence[Cell]], float | None],
    caption: str,
) -> Plot | None:
    def at(arm: str) -> Mean:
        seeds: dict[int, list[Cell]] = {}
        for cell in results.of(arm):
            seeds.setdefault(cell.seed, []).append(cell)
        known = [value for cells in seeds.values() if (value := of(cells)) is not None]
        return summary.mean(known, len(results.expected(arm)))

    cell_keys = {arm: float(cells[0].shots) for arm in results.arms if (cells := results.of(arm))}
    lines = _lines(results, cell_keys, {arm: results.of(arm)[0].method for arm in cell_keys}, at)
    if len({x for points in lines.values() for x, _, _ in points}) < 2:
        return None
    figure, axes = _figure(title)
    _draw(axes, lines)
    axes.set_xlabel("shots (demonstrations in the prompt)")
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, axes)
    rows = [[line, arm, _short(x), str(found)] for line, points in lines.items() for x, found, arm in points]
    words = f"Line plot. {_in_words(lines, 'shots', label)}"
    return Plot(name, title, caption, words, Table(title, ["method", "arm", "shots", label], rows), figure)


def _lines(
    results: Results, cell_keys: Mapping[str, float], names: Mapping[str, str], at: Callable[[str], Mean]
) -> dict[str, Points]:
    """Points by line. Arms of one name at one place cannot share a line: then each arm is a line of its own."""
    arms = [arm for arm in results.arms if arm in cell_keys]
    taken = [(names[arm], cell_keys[arm]) for arm in arms]
    crowded = {name for name, key in taken if taken.count((name, key)) > 1}
    lines: dict[str, Points] = {}
    for arm in arms:
        found = at(arm)
        if found.value is not None:
            lines.setdefault(arm if names[arm] in crowded else names[arm], []).append((cell_keys[arm], found, arm))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _draw(axes: Axes, lines: Mapping[str, Points]) -> None:
    for index, (name, points) in enumerate(lines.items()):
        x = [key for key, _, _ in points]
        y = np.array([found.value for _, found, _ in points], dtype=float)
        spread = np.array([found.spread or 0.0 for _, found, _ in points])
        style = _line(index)
        axes.plot(x, y, label=name or None, **style)
        if len(points) > 1:
            axes.fill_between(x, y - spread, y + spread, color=style["color"], alpha=0.2, linewidth=0)
        else:
            axes.errorbar(x, y, yerr=spread, color=style["color"], capsize=3, linewidth=1.2)


def _line(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
        # Open, so that one on another leaves both to be seen.
        "markerfacecolor": "none",
        "markeredgewidth": 1.5,
    }


def _figure(title: str, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _panels(title: str, names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """Return a panel for each name, two side by side."""
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, height * rows + 1.1), layout="constrained")
    figure.suptitle(title, fontsize=9)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(len(names))]
    return figure, axes


def _outer_labels(panels: Sequence[Axes], x: str, y: str) -> None:
    """Name the axes at the left and at the foot of a grid of panels, two side by side."""
    for axes in panels[::2]:
        axes.set_ylabel(y, fontsize=8)
    for axes in panels[-2:]:
        axes.set_xlabel(x, fontsize=8)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = max(map(len, labels))
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3 if longest < 16 else 2 if longest < 26 else 1
        )


def _x_scale(axes: Axes, cell_keys: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each place, where places are positive and far apart."""
    if cell_keys[0] > 0 and cell_keys[-1] / cell_keys[0] >= 8:
        axes.set_xscale("log")
        kept: list[float] = []
        for key in cell_keys:
            if not kept or key / kept[-1] >= (cell_keys[-1] / cell_keys[0]) ** 0.06:
                kept.append(key)
        axes.xaxis.set_major_locator(FixedLocator(kept))
        axes.xaxis.set_minor_locator(NullLocator())
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        axes.xaxis.set_major_formatter(formatter)


def _examples(cells: Sequence[Cell]) -> float:
    """Demonstrations that an arm uses: in the prompt, and put into its vector."""
    if not cells:
        return 0
    return cells[0].shots + (summary.average(cell.vector["examples"] for cell in cells if cell.vector) or 0)


def _method(cells: Sequence[Cell]) -> str:
    first = cells[0]
    if first.vector is None:
        return "in the prompt"
    return f"{first.method} + {first.shots}-shot" if first.shots else first.method


def _score_label(results: Results, short: bool = True) -> str:
    metrics = sorted({cell.metric for cell in results.cells})
    count = len(results.tasks)
    name = (
        metrics[0] if len(metrics) == 1 else "score" if short else f"Scores of different metrics ({', '.join(metrics)})"
    )
    if count == 1:
        return f"{name}, {results.tasks[0]}"
    note = "" if short or len({cell.n for cell in results.cells}) == 1 else ", each counted once"
    return f"{name}, mean of {count} tasks{note}"


def _vectors(results: Results, key: str) -> dict[str, list[Cell]]:
    """Cells whose vector has ``key``, by the names of the arms that have the very same vectors."""
    found: dict[tuple[tuple[str, int, str], ...], tuple[list[str], list[Cell]]] = {}
    for arm in results.arms:
        cells = [cell for cell in results.of(arm) if cell.vector and cell.vector.get(key)]
        if cells:
            ids = tuple((cell.task, cell.seed, cell.vector["id"]) for cell in cells if cell.vector)
            found.setdefault(ids, ([], cells))[0].append(arm)
    return {", ".join(arms): cells for arms, cells in found.values()}


def _selection(cells: Sequence[Cell]) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Mean probability and share of seeds that chose a head, both [layers, heads], and the number of seeds."""
    vectors = [cell.vector for cell in cells if cell.vector]
    layers, count = vectors[0]["shape"][:2]
    probabilities = np.array([vector["probabilities"] for vector in vectors], dtype=np.float64)
    probability = probabilities.mean(axis=0).reshape(layers, count)
    chosen = np.zeros((layers, count))
    for vector in vectors:
        for layer, head in vector["heads"]:
            chosen[layer, head] += 1 / len(vectors)
    return np.asarray(probability, dtype=np.float64), np.asarray(chosen.round(9), dtype=np.float64), len(vectors)


def _smoothed(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred moving mean; at the ends, of the values that are there."""
    kernel = np.ones(window)
    counts = np.convolve(np.ones(len(values)), kernel, mode="same")
    return np.asarray(np.convolve(values, kernel, mode="same") / counts)


def _in_words(lines: Mapping[str, Points], axis: str, label: str) -> str:
    parts = []
    for name, points in lines.items():
        values = ", ".join(f"{found} at {_short(x)}" for x, found, _ in points)
        parts.append(f"{name or 'All arms'}: {values}")
    return f"{label} against {axis}. {'; '.join(parts)}."


def _short(x: float) -> str:
    return f"{x:g}"


def _rounded(value: float | None, digits: int) -> str:
    return MISSING if value is None else number(value, digits)
