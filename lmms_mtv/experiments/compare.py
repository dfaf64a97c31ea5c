"""Running a plan: every arm on every task with every seed, on one loaded model, each cell once."""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from tqdm import tqdm

from lmms_mtv.errors import ArgumentError
from lmms_mtv.experiments import cell as cells
from lmms_mtv.experiments import plan
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan

logger = logging.getLogger(__name__)

VECTORS: Final = "vectors"
"""Folder of the vector library in a folder of results."""


class CellRunner(Protocol):
    """A loaded model and its tasks: :class:`lmms_mtv.harness.lmms.evaluation.CellRunner`."""

    @property
    def groups(self) -> Mapping[str, Sequence[str]]: ...

    @property
    def leads(self) -> bool: ...

    @property
    def model(self) -> Mapping[str, Any]:
        """Name, revision and dtype, as in a cell."""
        ...

    def run(self, key: CellKey) -> tuple[Cell, dict[str, Any]] | None: ...


def run(asked: Plan, output: Path, load: Callable[[Plan, Path], CellRunner]) -> list[CellKey]:
    """Run what is missing of a plan in ``output``; the cells that ran.

    ``load(plan, library)`` gives the bench; it is not called if nothing is missing. ``output`` may have other arms,
    tasks and seeds of the same model. Raises :class:`ArgumentError` if it was made by a plan that contradicts, before
    anything runs, and :class:`DataError` if a finished cell is damaged.
    """
    known = plan.read(output) if (output / plan.FILE).is_file() else None
    if known is not None:
        _agree(known, asked, output)
        asked = dataclasses.replace(asked, groups=known.groups)
        if set(asked.tasks) <= set(known.tasks) and not _missing(asked, output):
            return []
    runner = load(asked, output / VECTORS)
    asked = dataclasses.replace(asked, groups={**asked.groups, **runner.groups})
    _same_model(runner.model, output)
    if runner.leads:
        (asked if known is None else _joined(known, asked)).write(output)
    todo = _missing(asked, output)
    took: dict[str, list[float]] = {}
    bar = tqdm(total=len(todo), desc=asked.name, unit="cell", dynamic_ncols=True, disable=not runner.leads)
    with bar:
        for number, key in enumerate(todo):
            bar.set_postfix_str(f"{key}{_left(todo[number:], took)}")
            began = time.perf_counter()
            found = runner.run(key)
            if found is not None:
                cells.write(output, *found)
            took.setdefault(key.arm, []).append(time.perf_counter() - began)
            bar.update()
    return todo


def _same_model(model: Mapping[str, Any], output: Path) -> None:
    """Raise :class:`ArgumentError` if there are cells of another model: one table is of one model."""
    for cell in cells.read_all(output):
        if cells.described(cell.model) != cells.described(model):
            raise ArgumentError(
                f"{output} has results of {cells.described(cell.model)} ({cell.key}), this model is "
                f"{cells.described(model)}: choose another --output, or delete {output}"
            )


def _missing(asked: Plan, output: Path) -> list[CellKey]:
    return [key for key in asked.cell_keys() if cells.read(output, key) is None]


def _agree(known: Plan, asked: Plan, output: Path) -> None:
    """Raise :class:`ArgumentError` if cells of ``known`` would not be those of ``asked``."""
    again = f"choose another --output, or delete {output}"
    for name in ("name", "model", "limit"):
        before, now = getattr(known, name), getattr(asked, name)
        if before != now:
            raise ArgumentError(f"{output} has results with {name} {before!r}, this plan has {now!r}: {again}")
    for arm in asked.arms.keys() & known.arms.keys():
        if dict(asked.arms[arm]) != dict(known.arms[arm]):
            raise ArgumentError(
                f"{output} has results of arm {arm!r} with {dict(known.arms[arm])}, this plan has "
                f"{dict(asked.arms[arm])}: {again}, or rename the arm"
            )


def _joined(known: Plan, asked: Plan) -> Plan:
    """Return what is in the results and what is added to them."""
    seeds = tuple(dict.fromkeys([*known.seeds, *asked.seeds]))

    def of_both(arm: str) -> list[int]:
        plans = [plan for plan in (known, asked) if arm in plan.arms]
        return [seed for seed in seeds if any(seed in plan.seeds_of.get(arm, plan.seeds) for plan in plans)]

    return dataclasses.replace(
        asked,
        tasks=tuple(dict.fromkeys([*known.tasks, *asked.tasks])),
        seeds=seeds,
        arms={**known.arms, **asked.arms},
        seeds_of={arm: of_both(arm) for arm in {**known.seeds_of, **asked.seeds_of}},
        groups={**known.groups, **asked.groups},
    )


def _left(todo: Sequence[CellKey], took: Mapping[str, Sequence[float]]) -> str:
    """Return an estimate of the time that ``todo`` takes, from the time that cells of each arm took."""
    if not took:
        return ""
    overall = statistics.mean(seconds for of_arm in took.values() for seconds in of_arm)
    seconds = sum(statistics.mean(took[key.arm]) if key.arm in took else overall for key in todo)
    return f", about {seconds / 60:.0f} min left" if seconds >= 60 else f", about {seconds:.0f} s left"
