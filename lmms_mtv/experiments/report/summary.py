"""Figures of cells: means and spreads over seeds, means over tasks, costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.results import Results

MISSING = "missing"
NONE = "-"


@dataclass(frozen=True)
class Mean:
    """A mean over seeds. ``spread`` is the sample standard deviation, None for one seed; ``value`` None if missing."""

    value: float | None
    spread: float | None
    seeds: int
    expected: int

    def __str__(self) -> str:
        if self.value is None:
            return MISSING
        part = f" ({self.seeds} of {self.expected} seeds)" if self.seeds < self.expected else ""
        return f"{number(self.value)} ± {NONE if self.spread is None else number(self.spread)}{part}"


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """``value`` with ``digits`` decimals; sums that differ in their last bits print the same."""
    rounded = round(round(value, 9), digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def mean(values: Sequence[float], expected: int) -> Mean:
    """Return the mean of one value for each seed that is there."""
    if not values:
        return Mean(None, None, 0, expected)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.fmean(values), spread, len(values), expected)


def score(results: Results, arm: str, task: str) -> Mean:
    """Return the score of an arm on a task over seeds."""
    return mean([cell.score for cell in results.of(arm, task)], len(results.expected(arm)))


def seed_scores(results: Results, arm: str, tasks: Sequence[str]) -> dict[int, float]:
    """For each seed that has a cell of every task: the mean over tasks, each task counted once."""
    by_seed: dict[int, list[float]] = {}
    for cell in results.of(arm):
        if cell.task in tasks:
            by_seed.setdefault(cell.seed, []).append(cell.score)
    return {seed: statistics.fmean(found) for seed, found in sorted(by_seed.items()) if len(found) == len(tasks)}


def mean_score(results: Results, arm: str) -> Mean:
    """Return the mean over all tasks, then over the seeds that have all tasks."""
    return mean(list(seed_scores(results, arm, results.tasks).values()), len(results.expected(arm)))


def poolable(results: Results) -> bool:
    """Return whether the scores of all tasks point the same way, so that a mean over tasks says something."""
    return len({cell.higher_is_better for cell in results.cells}) == 1


def worst(results: Results, arm: str) -> str:
    """Return the worst task's mean score."""
    found = [score(results, arm, task).value for task in results.tasks]
    values = [value for value in found if value is not None]
    if not values or len(values) < len(found):
        return MISSING
    better = all(cell.higher_is_better for cell in results.cells)
    return number(min(values) if better else max(values))


def average(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def prompt_tokens(cells: Sequence[Cell]) -> float | None:
    """Tokens of a prompt, mean over cells."""
    return average(cell.tokens["prompt"] for cell in cells)


def image_share(cells: Sequence[Cell]) -> float | None:
    """Return share of image tokens among all tokens, of the cells that can tell; None if none can."""
    told = [
        (image, image + text)
        for cell in cells
        if (image := cell.tokens["image"]) is not None and (text := cell.tokens["text"]) is not None
    ]
    total = sum(both for _, both in told)
    return sum(image for image, _ in told) / total if total else None


def fit_seconds(cells: Sequence[Cell]) -> float | None:
    """Seconds of one fit, mean over cells; None where nothing is fitted."""
    return average(cell.seconds["fit"] for cell in cells)


def evaluation_seconds(cells: Sequence[Cell]) -> float | None:
    """Seconds of evaluation for 100 prompts, mean over cells."""
    return average(
        100 * seconds / cell.n for cell in cells if (seconds := cell.seconds["evaluation"]) is not None and cell.n
    )


def token_seconds(cells: Sequence[Cell]) -> float | None:
    """Seconds of evaluation for each token of the prompts, mean over cells."""
    return average(
        seconds / (tokens * cell.n)
        for cell in cells
        if (seconds := cell.seconds["evaluation"]) is not None and (tokens := cell.tokens["prompt"]) and cell.n
    )


def vector_bytes(cells: Sequence[Cell]) -> float | None:
    """Size of a vector's file, mean over cells; None where there is none, or cells do not tell it."""
    return average(cell.vector.get("bytes") for cell in cells if cell.vector is not None)


def peak_memory(cells: Sequence[Cell], part: str) -> float | None:
    """Return the highest peak of memory over cells, in GB (1e9 bytes); ``part`` is ``fit`` or ``evaluation``."""
    known = [found / 1e9 for cell in cells if (found := cell.memory[part]) is not None]
    return max(known) if known else None
