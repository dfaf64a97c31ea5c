"""Cells grouped by their vectors."""

from __future__ import annotations

from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.results import Results


def cells_by_vectors(results: Results, field: str) -> dict[str, list[Cell]]:
    """Return the cells whose vector has ``field``, by the names of the arms that share exactly these vectors."""
    groups: dict[tuple[tuple[str, int, str], ...], tuple[list[str], list[Cell]]] = {}
    for arm in results.arms:
        cells = [cell for cell in results.of(arm) if cell.vector and cell.vector.get(field)]
        if cells:
            ids = tuple((cell.task, cell.seed, cell.vector["id"]) for cell in cells if cell.vector)
            groups.setdefault(ids, ([], cells))[0].append(arm)
    return {", ".join(arms): cells for arms, cells in groups.values()}
