"""A results folder as ``lmms-mtv compare`` wrote it: its plan and its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lmms_mtv.errors import DataError, ResultsError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import plan
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import Plan


@dataclass(frozen=True)
class Results:
    """A results folder. ``cells`` are those of the plan; ``others`` counts cells in the folder that are not."""

    folder: Path
    plan: Plan
    cells: Sequence[Cell]
    others: int = 0

    @property
    def title(self) -> str:
        return self.plan.title or self.plan.name

    @property
    def arms(self) -> list[str]:
        """The plan's arms, in its order."""
        return list(self.plan.arms)

    @property
    def tasks(self) -> list[str]:
        """The plan's single tasks, in its order."""
        return list(self.plan.leaves)

    @property
    def baseline(self) -> str | None:
        """The arm that the others are compared with."""
        return self.plan.compared_with

    def seedless(self, arm: str) -> bool:
        """Return whether no seed changes this arm, so that it runs for one seed only."""
        return not plan.seeded({**self.plan.model, **self.plan.arms[arm]})

    def expected(self, arm: str) -> list[int]:
        """Return the seeds that this arm should have cells of."""
        return self.plan.seeds_for(arm)

    def of(self, arm: str, task: str | None = None) -> list[Cell]:
        """Cells of an arm (and a task), by task and seed."""
        return [cell for cell in self._by_arm.get(arm, ()) if task in (None, cell.task)]

    @cached_property
    def _by_arm(self) -> dict[str, list[Cell]]:
        found: dict[str, list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda cell: (cell.task, cell.seed)):
            found.setdefault(cell.arm, []).append(cell)
        return found


def read(folder: Path) -> Results:
    """Return the results in ``folder``.

    Raises ArgumentError where there is no plan, DataError where none of its cells is there or one is damaged,
    ResultsError where cells are of several models, documents or prompts.
    """
    planned = plan.read(folder)
    cell_keys = set(planned.cell_keys())
    found = cells.read_all(folder)
    kept = [cell for cell in found if cell.key in cell_keys]
    if not kept:
        raise DataError(f"no cell of the plan in {folder / cells.FOLDER}: run `lmms-mtv compare` on its plan first")
    if wrong := cells.contradictions(kept):
        raise ResultsError(
            f"the cells in {folder} do not belong in one table: {'; '.join(wrong[:3])}: delete those that are not to "
            "count, and run lmms-mtv compare again"
        )
    return Results(folder, planned, kept, len(found) - len(kept))
