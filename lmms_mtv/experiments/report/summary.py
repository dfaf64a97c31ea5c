"""Numbers computed from cells: means and spreads over seeds, means over tasks, costs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.results import Results

MISSING = "missing"
"""Text for the number of a cell that the plan has and the folder lacks."""

NONE = "-"
"""Text for a number that does not exist or is unknown."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: the mean; None if all cells are missing.
        spread: the sample standard deviation over seeds; None for one seed.
        seeds: number of seeds in the mean.
        expected: number of seeds that the plan has.
    """

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
    """Return ``value`` with ``digits`` decimals. Values that differ only in the last bits give the same text.

    Args:
        value: the number.
        digits: the number of decimals.
        sign: True writes a plus sign before a positive number.
    """
    rounded = round(round(value, 9), digits) + 0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def mean(values: Sequence[float], expected: int) -> Mean:
    """Return the mean of ``values``, one for each present seed of the ``expected`` seeds."""
    if not values:
        return Mean(None, None, 0, expected)
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.fmean(values), spread, len(values), expected)


def score(results: Results, arm: str, task: str) -> Mean:
    """Return the mean score of an arm on a task over seeds."""
    return mean([cell.score for cell in results.of(arm, task)], len(results.expected(arm)))


def seed_scores(results: Results, arm: str, tasks: Sequence[str]) -> dict[int, float]:
    """Return the mean score over tasks by seed, for the seeds that have a cell of every task."""
    by_seed: dict[int, list[float]] = {}
    for cell in results.of(arm):
        if cell.task in tasks:
            by_seed.setdefault(cell.seed, []).append(cell.score)
    return {seed: statistics.fmean(scores) for seed, scores in sorted(by_seed.items()) if len(scores) == len(tasks)}


def mean_score(results: Results, arm: str) -> Mean:
    """Return the mean score over all tasks, then over the seeds that have all tasks."""
    return mean(list(seed_scores(results, arm, results.tasks).values()), len(results.expected(arm)))


def poolable(results: Results) -> bool:
    """Return True if a higher score is better for all tasks or for none, so that a mean over tasks has a meaning."""
    return len({cell.higher_is_better for cell in results.cells}) == 1


def worst(results: Results, arm: str) -> str:
    """Return the mean score on the worst task as text."""
    task_means = [score(results, arm, task).value for task in results.tasks]
    values = [value for value in task_means if value is not None]
    if not values or len(values) < len(task_means):
        return MISSING
    better = all(cell.higher_is_better for cell in results.cells)
    return number(min(values) if better else max(values))


def average(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def prompt_tokens(cells: Sequence[Cell]) -> float | None:
    """Return the tokens of a prompt, mean over cells."""
    return average(cell.tokens["prompt"] for cell in cells)


def image_share(cells: Sequence[Cell]) -> float | None:
    """Return the share of image tokens among all tokens, in [0, 1]; None if no cell has the numbers."""
    counts = [
        (image, image + text)
        for cell in cells
        if (image := cell.tokens["image"]) is not None and (text := cell.tokens["text"]) is not None
    ]
    total = sum(both for _, both in counts)
    return sum(image for image, _ in counts) / total if total else None


def fit_seconds(cells: Sequence[Cell]) -> float | None:
    """Return the seconds of a fit, mean over cells; None without a fit."""
    return average(cell.seconds["fit"] for cell in cells)


def evaluation_seconds(cells: Sequence[Cell]) -> float | None:
    """Return the seconds of evaluation for 100 prompts, mean over cells."""
    return average(
        100 * seconds / cell.n for cell in cells if (seconds := cell.seconds["evaluation"]) is not None and cell.n
    )


def token_seconds(cells: Sequence[Cell]) -> float | None:
    """Return the seconds of evaluation for each token of the prompts, mean over cells."""
    return average(
        seconds / (tokens * cell.n)
        for cell in cells
        if (seconds := cell.seconds["evaluation"]) is not None and (tokens := cell.tokens["prompt"]) and cell.n
    )


def vector_bytes(cells: Sequence[Cell]) -> float | None:
    """Return the size of the file of a vector in bytes, mean over cells; None without a vector or a known size."""
    return average(cell.vector.get("bytes") for cell in cells if cell.vector is not None)


def peak_memory(cells: Sequence[Cell], part: str) -> float | None:
    """Return the highest peak of memory over cells, in GB (1e9 bytes); ``part`` is ``fit`` or ``evaluation``."""
    peaks = [size / 1e9 for cell in cells if (size := cell.memory[part]) is not None]
    return max(peaks) if peaks else None
