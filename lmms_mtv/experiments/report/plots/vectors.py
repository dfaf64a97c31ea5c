"""Cells grouped by their vectors."""

from __future__ import annotations

from typing import Final

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.results import Results

IN_THE_PROMPT: Final = "in the prompt"
"""The name of the line through the arms without a vector: all demonstrations are in the prompt."""


def methods_by_arm(results: Results) -> dict[str, str]:
    """Return the name of the method of each arm, as a table has it: the name of the method's arm of fewest shots."""
    cells = {arm: own[0] for arm in results.arms if (own := results.of(arm))}
    first: dict[str, str] = {"none": IN_THE_PROMPT}
    for arm in sorted(cells, key=lambda arm: cells[arm].shots):
        first.setdefault(cells[arm].method, arm)
    return {arm: first[cell.method] for arm, cell in cells.items()}


def cells_by_vectors(results: Results, field: str) -> dict[str, list[Cell]]:
    """Return the cells whose vector has ``field``, by the names of the arms that share exactly these vectors."""
    groups: dict[tuple[tuple[str, int, str], ...], tuple[list[str], list[Cell]]] = {}
    for arm in results.arms:
        cells = [cell for cell in results.of(arm) if cell.vector and cell.vector.get(field)]
        if cells:
            ids = tuple((cell.task, cell.seed, cell.vector["id"]) for cell in cells if cell.vector)
            groups.setdefault(ids, ([], cells))[0].append(arm)
    return {", ".join(arms): cells for arms, cells in groups.values()}
