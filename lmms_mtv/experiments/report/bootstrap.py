"""Differences between two arms, with intervals from a paired bootstrap over documents."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.results import Results

RESAMPLES: Final = 10_000

LEVEL: Final = 0.95
"""Coverage of the intervals."""

_BLOCK: Final = 2_000_000
"""Number of documents that are drawn at once, which bounds the memory."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """The mean difference of two arms, and the ends of the interval."""

    mean: float
    low: float
    high: float


def paired(cells: Sequence[Cell], baseline: Sequence[Cell]) -> Numbers | None:
    """Return the difference of each document to the baseline, mean over seeds.

    A cell is paired with the baseline's cell of the same seed, or with the baseline's only cell if no seed changes the
    baseline.

    Args:
        cells: the cells of an arm on one task.
        baseline: the cells of the baseline on the same task.

    Returns:
        The differences, float64 [documents], or None if the documents differ or no seed is common.
    """
    by_seed = {cell.seed: cell for cell in baseline}
    only_cell = baseline[0] if len(baseline) == 1 else None
    pairs = [(cell, match) for cell in cells if (match := by_seed.get(cell.seed, only_cell)) is not None]
    if not pairs:
        return None
    documents = sorted(pairs[0][0].samples["documents"])
    if any(sorted(cell.samples["documents"]) != documents for pair in pairs for cell in pair):
        return None
    rows = [_scores(cell, documents) - _scores(match, documents) for cell, match in pairs]
    return np.asarray(np.mean(rows, axis=0), dtype=np.float64)


def _scores(cell: Cell, documents: Sequence[int]) -> Numbers:
    """Return the scores of a cell in the order of ``documents``, float64 [documents]."""
    scores = dict(zip(cell.samples["documents"], cell.samples["scores"], strict=True))
    return np.array([scores[document] for document in documents], dtype=np.float64)


def differences(
    results: Results, resamples: int = RESAMPLES, seed: int = 0
) -> dict[tuple[str, str | None], PairedDifference]:
    """Return the difference of each arm to the baseline, by arm and task.

    Let ``d[t, i]`` be the difference of document ``i`` of task ``t``, mean over seeds (:func:`paired`), and ``n[t]``
    the number of documents of the task. The difference of a task is ``1/n[t] sum_i d[t, i]``; the difference over all
    ``T`` tasks is ``1/T sum_t 1/n[t] sum_i d[t, i]``. A resample draws ``n[t]`` documents of every task with
    replacement and computes the same means. The interval reaches from the 2.5th to the 97.5th percentile of the
    resamples, with linear interpolation.

    A resampled document counts with all its seeds. The seeds share documents, so drawing documents for each seed apart
    would count one document as several. The interval therefore describes other documents with the same seeds; the
    spread describes other seeds.

    The draws depend only on ``seed``, the name of the task and ``n[t]``, so all arms use the same resamples. The draws
    are raw outputs of PCG64 modulo ``n[t]``; numpy keeps the raw outputs equal in all versions.

    Args:
        results: the results with a baseline.
        resamples: number of resamples.
        seed: seed of the draws.

    Returns:
        The differences by arm and task; the key with task None has the mean over all tasks. Arms and tasks that cannot
        be paired are absent: the baseline, missing cells, and cells with other documents.
    """
    if results.baseline is None:
        return {}
    intervals: dict[tuple[str, str | None], PairedDifference] = {}
    compared_arms = [arm for arm in results.arms if arm != results.baseline]
    draws: dict[str, list[tuple[float, Numbers]]] = {arm: [] for arm in compared_arms}
    for task in results.tasks:
        values = {arm: paired(results.of(arm, task), results.of(results.baseline, task)) for arm in compared_arms}
        present = {arm: value for arm, value in values.items() if value is not None}
        for count in sorted({len(value) for value in present.values()}):
            arms = [arm for arm, value in present.items() if len(value) == count]
            resampled = _resampled_means(task, np.stack([present[arm] for arm in arms]), resamples, seed)
            for arm, means in zip(arms, resampled, strict=True):
                draws[arm].append((float(present[arm].mean()), means))
                intervals[arm, task] = _interval([draws[arm][-1]])
    for arm, parts in draws.items():
        if parts and len(parts) == len(results.tasks):
            intervals[arm, None] = _interval(parts)
    return intervals


def _interval(tasks: Sequence[tuple[float, Numbers]]) -> PairedDifference:
    """Return the mean over tasks and the interval, from the mean and the resampled means of each task."""
    resampled = np.mean([means for _, means in tasks], axis=0)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return PairedDifference(float(np.mean([mean for mean, _ in tasks])), float(low), float(high))


def _resampled_means(task: str, values: Numbers, resamples: int, seed: int) -> Numbers:
    """Return the means of resampled documents, float64 [arms, resamples], of ``values`` [arms, documents]."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(task.encode())]))
    arms, count = values.shape
    means = np.empty((arms, resamples))
    step = max(1, _BLOCK // count)
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        indices = (bits.random_raw(rows * count) % np.uint64(count)).astype(np.intp)
        for arm in range(arms):
            means[arm, begin : begin + rows] = values[arm][indices].reshape(rows, count).mean(axis=1)
    return means
