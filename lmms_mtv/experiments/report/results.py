"""A results folder that ``lmms-mtv compare`` wrote: the plan and the cells."""

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
    """The plan and the cells of a results folder.

    Attributes:
        folder: path of the folder.
        plan: the plan.
        cells: the cells of the plan.
        others: number of cells in the folder that do not belong to the plan.
    """

    folder: Path
    plan: Plan
    cells: Sequence[Cell]
    others: int = 0

    @property
    def title(self) -> str:
        """The title of the plan, or its name."""
        return self.plan.title or self.plan.name

    @property
    def arms(self) -> list[str]:
        """The arms, in the order of the plan."""
        return list(self.plan.arms)

    @property
    def tasks(self) -> list[str]:
        """The single tasks, in the order of the plan."""
        return list(self.plan.leaves)

    @property
    def baseline(self) -> str | None:
        """The arm that the other arms are compared with."""
        return self.plan.compared_with

    def seedless(self, arm: str) -> bool:
        """Return True if no seed changes the results of this arm, so that the arm runs with only one seed."""
        return not plan.seeded({**self.plan.model, **self.plan.arms[arm]})

    def expected(self, arm: str) -> list[int]:
        """Return the seeds of the cells that this arm should have."""
        return self.plan.seeds_for(arm)

    def of(self, arm: str, task: str | None = None) -> list[Cell]:
        """Return the cells of an arm, or of an arm and a task, in the order of task and seed."""
        return [cell for cell in self._by_arm.get(arm, ()) if task in (None, cell.task)]

    def devices(self, arm: str | None = None) -> list[str]:
        """Return the devices that ran the cells of an arm, or all cells."""
        cells = self.cells if arm is None else self.of(arm)
        return sorted({str(cell.hardware["device"]) for cell in cells})

    @cached_property
    def _by_arm(self) -> dict[str, list[Cell]]:
        by_arm: dict[str, list[Cell]] = {}
        for cell in sorted(self.cells, key=lambda cell: (cell.task, cell.seed)):
            by_arm.setdefault(cell.arm, []).append(cell)
        return by_arm


def read(folder: Path) -> Results:
    """Return the results in ``folder``.

    Raises:
        ArgumentError: the folder has no plan.
        DataError: the folder has no cell of the plan, or a cell is damaged.
        ResultsError: the cells have different models, documents or prompts.
    """
    stored_plan = plan.read(folder)
    cell_keys = set(stored_plan.cell_keys())
    stored_cells = cells.read_all(folder)
    planned_cells = [cell for cell in stored_cells if cell.key in cell_keys]
    if not planned_cells:
        raise DataError(f"no cell of the plan in {folder / cells.FOLDER}: run `lmms-mtv compare` on its plan first")
    if reasons := cells.contradictions(planned_cells):
        raise ResultsError(
            f"the cells in {folder} do not belong in one table: {'; '.join(reasons[:3])}: delete the cells that do "
            "not belong, and run lmms-mtv compare again"
        )
    return Results(folder, stored_plan, planned_cells, len(stored_cells) - len(planned_cells))
