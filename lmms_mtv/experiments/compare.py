"""The run of a plan: every arm on every task with every seed, on one loaded model, each cell once."""

from __future__ import annotations

import dataclasses
import logging
import os
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
from lmms_mtv.runtime import files

logger = logging.getLogger(__name__)

VECTORS: Final = "vectors"
"""Name of the folder of the vector library in a results folder."""


class CellRunner(Protocol):
    """A loaded model with its tasks, such as :class:`lmms_mtv.harness.lmms.plan_runner.PlanRunner`."""

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """The tasks of each task group of the plan."""
        ...

    @property
    def leads(self) -> bool:
        """True in the process that writes files and shows progress."""
        ...

    @property
    def model(self) -> Mapping[str, Any]:
        """Name, revision and dtype of the model, as in a cell."""
        ...

    def run(self, key: CellKey) -> tuple[Cell, dict[str, Any]] | None:
        """Return a measured cell and the results of the harness; None in processes that do not lead."""
        ...


def run(requested: Plan, output: Path, load: Callable[[Plan, Path], CellRunner]) -> list[CellKey]:
    """Run the missing cells of a plan and write them into a results folder.

    Args:
        requested: the plan.
        output: the results folder. The folder may have other arms, tasks and seeds of the same model.
        load: function of the plan and of the folder of its vectors that loads the model. :func:`run` calls the
            function only if cells are missing.

    Returns:
        The keys of the cells that ran.

    Raises:
        ArgumentError: the folder cannot be written, or has results of a plan that contradicts, or a folder of task
            files does not exist; nothing has run.
        DataError: a stored cell is damaged.
    """
    stored = plan.read(output) if (output / plan.FILE).is_file() else None
    if stored is not None:
        _check_agreement(stored, requested, output)
        folders = requested.include_path or stored.include_path
        requested = dataclasses.replace(requested, groups=stored.groups, include_path=folders)
        if set(requested.tasks) <= set(stored.tasks) and not _missing(requested, output):
            return []
    plan.check_include_path(requested.include_path)
    if (reason := files.obstacle(output)) is not None:
        raise ArgumentError(f"results cannot be written to {output} ({reason}): choose another --output")
    # A setting for all arms may be one of the methods of stored arms alone.
    known_arms = requested.arms if stored is None else {**stored.arms, **requested.arms}
    runner = load(dataclasses.replace(requested, arms=known_arms), output / VECTORS)
    requested = dataclasses.replace(requested, groups={**requested.groups, **runner.groups})
    _check_model(runner.model, output)
    if runner.leads:
        (requested if stored is None else _merged(stored, requested)).write(output)
    missing = _missing(requested, output)
    seconds: dict[str, list[float]] = {}
    bar = tqdm(total=len(missing), desc=requested.name, unit="cell", dynamic_ncols=True, disable=not runner.leads)
    with bar:
        for number, key in enumerate(missing):
            bar.set_postfix_str(f"{key}{_remaining_time(missing[number:], seconds)}")
            began = time.perf_counter()
            result = runner.run(key)
            if result is not None:
                cells.write(output, *result)
            seconds.setdefault(key.arm, []).append(time.perf_counter() - began)
            bar.update()
    return missing


def _check_model(model: Mapping[str, Any], output: Path) -> None:
    """Check that the folder has only cells of this model: a table has only one model.

    Raises:
        ArgumentError: the folder has cells of another model.
    """
    for cell in cells.read_all(output):
        if cells.described(cell.model) != cells.described(model):
            raise ArgumentError(
                f"{output} has results of {cells.described(cell.model)} ({cell.key}), this model is "
                f"{cells.described(model)}: choose another --output, or delete {output}"
            )


def _missing(requested: Plan, output: Path) -> list[CellKey]:
    """Return the keys of the plan whose cells the folder lacks."""
    return [key for key in requested.cell_keys() if cells.read(output, key) is None]


def _check_agreement(stored: Plan, requested: Plan, output: Path) -> None:
    """Check that the plans give the same cell for the same key.

    Raises:
        ArgumentError: the plans contradict each other.
    """
    again = f"choose another --output, or delete {output}"
    for name in ("name", "harness", "model", "limit"):
        before, now = getattr(stored, name), getattr(requested, name)
        if before != now:
            raise ArgumentError(f"{output} has results with {name} {before!r}, this plan has {now!r}: {again}")
    for arm in requested.arms.keys() & stored.arms.keys():
        if dict(requested.arms[arm]) != dict(stored.arms[arm]):
            raise ArgumentError(
                f"{output} has results of arm {arm!r} with {dict(stored.arms[arm])}, this plan has "
                f"{dict(requested.arms[arm])}: {again}, or rename the arm"
            )


def _merged(stored: Plan, requested: Plan) -> Plan:
    """Return the plan of the stored results and the requested results together."""
    seeds = tuple(dict.fromkeys([*stored.seeds, *requested.seeds]))

    def merged_seeds(arm: str) -> list[int]:
        plans = [plan for plan in (stored, requested) if arm in plan.arms]
        return [seed for seed in seeds if any(seed in plan.seeds_of.get(arm, plan.seeds) for plan in plans)]

    return dataclasses.replace(
        requested,
        tasks=tuple(dict.fromkeys([*stored.tasks, *requested.tasks])),
        seeds=seeds,
        arms={**stored.arms, **requested.arms},
        baseline=requested.baseline or stored.baseline,
        seeds_of={arm: merged_seeds(arm) for arm in {**stored.seeds_of, **requested.seeds_of}},
        groups={**stored.groups, **requested.groups},
        include_path=list(dict.fromkeys([*requested.include_path, *filter(os.path.isdir, stored.include_path)])),
    )


def _remaining_time(remaining: Sequence[CellKey], seconds: Mapping[str, Sequence[float]]) -> str:
    """Return in words the time that the remaining cells take, from the ``seconds`` of the finished cells by arm."""
    if not seconds:
        return ""
    overall = statistics.mean(duration for durations in seconds.values() for duration in durations)
    estimate = sum(statistics.mean(seconds[key.arm]) if key.arm in seconds else overall for key in remaining)
    return f", about {estimate / 60:.0f} min left" if estimate >= 60 else f", about {estimate:.0f} s left"
