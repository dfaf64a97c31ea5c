"""Intervals of differences between two arms, by a paired bootstrap over documents."""

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
_AT_ONCE: Final = 2_000_000

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """Mean difference of two arms, and the ends of its interval."""

    mean: float
    low: float
    high: float


def paired(cells: Sequence[Cell], baseline: Sequence[Cell]) -> Numbers | None:
    """Return the difference to the baseline of each document of one task, float64 [documents]: its mean over seeds.

    A cell is paired with the baseline's cell of the same seed, document by document, or with the baseline's only cell
    if no seed changes the baseline. None where the two were not scored on the same documents, or no seed is common.
    """
    others = {cell.seed: cell for cell in baseline}
    alone = baseline[0] if len(baseline) == 1 else None
    pairs = [(cell, other) for cell in cells if (other := others.get(cell.seed, alone)) is not None]
    if not pairs:
        return None
    documents = sorted(pairs[0][0].samples["documents"])
    if any(sorted(cell.samples["documents"]) != documents for pair in pairs for cell in pair):
        return None
    rows = [_scores(cell, documents) - _scores(other, documents) for cell, other in pairs]
    return np.asarray(np.mean(rows, axis=0), dtype=np.float64)


def _scores(cell: Cell, documents: Sequence[int]) -> Numbers:
    found = dict(zip(cell.samples["documents"], cell.samples["scores"], strict=True))
    return np.array([found[document] for document in documents], dtype=np.float64)


def differences(
    results: Results, resamples: int = RESAMPLES, seed: int = 0
) -> dict[tuple[str, str | None], PairedDifference]:
    """Return the difference of each arm to the baseline, by arm and task, and for task None the mean over all tasks.

    With ``d[t, i]`` the difference of document ``i`` of task ``t``, mean over seeds (``paired``), and ``n[t]``
    documents in the task, a task's difference is ``1/n[t] sum_i d[t, i]``, and that of all ``T`` tasks
    ``1/T sum_t 1/n[t] sum_i d[t, i]``. One resample draws ``n[t]`` documents of every task with replacement and
    computes the same; the interval is from the 2.5th to the 97.5th percentile (linear between order statistics) of
    ``resamples`` of them.

    A document that is drawn counts with all its seeds: the seeds share documents, and drawing them for each seed apart
    would take one document for several. So the interval is about other documents under the same seeds; what other
    seeds do is what the spread says.

    The draws depend on ``seed``, the task's name and ``n[t]`` alone, so all arms are resampled alike. They are raw
    outputs of PCG64, which numpy keeps the same in all versions, modulo ``n[t]``.

    What cannot be paired is left out: the baseline itself, missing cells, other documents.
    """
    if results.baseline is None:
        return {}
    found: dict[tuple[str, str | None], PairedDifference] = {}
    others = [arm for arm in results.arms if arm != results.baseline]
    draws: dict[str, list[tuple[float, Numbers]]] = {arm: [] for arm in others}
    for task in results.tasks:
        values = {arm: paired(results.of(arm, task), results.of(results.baseline, task)) for arm in others}
        present = {arm: value for arm, value in values.items() if value is not None}
        for count in sorted({len(value) for value in present.values()}):
            arms = [arm for arm, value in present.items() if len(value) == count]
            drawn = _resampled(task, np.stack([present[arm] for arm in arms]), resamples, seed)
            for arm, means in zip(arms, drawn, strict=True):
                draws[arm].append((float(present[arm].mean()), means))
                found[arm, task] = _difference([draws[arm][-1]])
    for arm, parts in draws.items():
        if parts and len(parts) == len(results.tasks):
            found[arm, None] = _difference(parts)
    return found


def _difference(tasks: Sequence[tuple[float, Numbers]]) -> PairedDifference:
    drawn = np.mean([means for _, means in tasks], axis=0)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return PairedDifference(float(np.mean([mean for mean, _ in tasks])), float(low), float(high))


def _resampled(task: str, values: Numbers, resamples: int, seed: int) -> Numbers:
    """Means of resampled documents, float64 [arms, resamples], of ``values`` [arms, documents]."""
    bits = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(task.encode())]))
    arms, count = values.shape
    found = np.empty((arms, resamples))
    step = max(1, _AT_ONCE // count)
    for begin in range(0, resamples, step):
        rows = min(step, resamples - begin)
        drawn = (bits.random_raw(rows * count) % np.uint64(count)).astype(np.intp)
        for arm in range(arms):
            found[arm, begin : begin + rows] = values[arm][drawn].reshape(rows, count).mean(axis=1)
    return found
