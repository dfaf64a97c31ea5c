"""The plan of a comparison: a model, tasks, arms and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from lmms_mtv.errors import ArgumentError, unknown
from lmms_mtv.runtime import files

FILE: Final = "plan.yaml"
"""Name of the plan file in a results folder."""

OF_THE_PLAN: Final = ("seed", "batch_size", "limit", "library", "reuse")
"""Model arguments that the plan sets, and that no arm may set."""

LM_EVAL: Final = "lm-eval"
"""Name of lm-evaluation-harness in a plan."""

HARNESSES: Final = ("lmms-eval", LM_EVAL)
"""The harnesses that a plan can name."""

SEEDS: Final = "different integers, 0 or more"
"""The seeds of a plan, in words."""


class CellKey(NamedTuple):
    """The key of a cell in a comparison: a task, an arm and a seed."""

    task: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Axis:
    """The x axis of the score plot.

    Attributes:
        axis: label of the axis.
        values: position of each arm on the axis.
        series: name of the line that each arm belongs to; empty for a single line.
    """

    axis: str
    values: Mapping[str, float]
    series: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A comparison: every arm on every task with every seed.

    Attributes:
        name: name of the plan, one word.
        model: model arguments that all arms share.
        tasks: tasks and task groups of the harness.
        arms: model arguments of each arm.
        seeds: seeds of the comparison.
        batch_size: rows of a forward, or ``auto``.
        limit: number of documents of each task; None for all documents.
        title: title of the report.
        baseline: the arm that the other arms are compared with; see :attr:`compared_with`.
        paper: the model in ``results/paper`` whose published numbers stand in the report.
        tolerance: largest accepted change of a number: ``score`` of a cell, absolute; ``values`` of a vector, relative
            to the largest value.
        x: x axis of the score plot.
        groups: tasks of each task group, after the harness has listed the tasks.
        seeds_of: seeds of the arms that run with only some of the seeds.
        include_path: folders of further task files. In a plan file, relative to the folder of the file.
        harness: the harness that has the tasks and runs the cells, one of :data:`HARNESSES`.

    Raises:
        ArgumentError: a field is missing, has a wrong value, or contradicts another field.
    """

    name: str
    model: Mapping[str, Any]
    tasks: Sequence[str]
    arms: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0,)
    batch_size: int | str = 1
    limit: int | None = None
    title: str | None = None
    baseline: str | None = None
    paper: str | None = None
    tolerance: Mapping[str, float] = field(default_factory=lambda: {"score": 0.02, "values": 1e-3})
    x: Axis | None = None
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    seeds_of: Mapping[str, Sequence[int]] = field(default_factory=dict)
    include_path: Sequence[str] = field(default_factory=list)
    harness: str = HARNESSES[0]

    def __post_init__(self) -> None:
        for name in ("tasks", "arms", "seeds"):
            if not getattr(self, name):
                raise ArgumentError(f"the plan {self.name!r} has no {name}")
        if self.harness not in HARNESSES:
            raise unknown("harness", str(self.harness), HARNESSES)
        if not self.name or any(c in self.name for c in "/\\"):
            raise ArgumentError(f"a plan's name is one word for a folder, found {self.name!r}: change name")
        for arm, arguments in self.arms.items():
            if not isinstance(arguments, Mapping):
                raise ArgumentError(f"arm {arm!r} of plan {self.name!r} is {arguments!r}, expected model arguments")
            for key in OF_THE_PLAN:
                if key in arguments or key in self.model:
                    where = f"arm {arm!r}" if key in arguments else "model"
                    raise ArgumentError(f"{key}= stands under {where} of plan {self.name!r}: it belongs to the plan")
        arm_of_file: dict[str, str] = {}
        for arm in self.arms:
            if (other := arm_of_file.setdefault(slug(arm), arm)) != arm:
                raise ArgumentError(f"arms {other!r} and {arm!r} of plan {self.name!r} would share a file: rename one")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ArgumentError(
                f"baseline {self.baseline!r} of plan {self.name!r} is none of its arms: {', '.join(self.arms)}"
            )
        if not are_seeds(self.seeds):
            raise ArgumentError(f"seeds of plan {self.name!r} are {list(self.seeds)}, expected {SEEDS}")
        for arm, seeds in self.seeds_of.items():
            if arm not in self.arms or not set(seeds) <= set(self.seeds):
                raise ArgumentError(
                    f"seeds_of of plan {self.name!r} has {arm!r}: {list(seeds)}, expected an arm of the plan and some "
                    f"of its seeds {list(self.seeds)}"
                )

    @property
    def leaves(self) -> tuple[str, ...]:
        """The single tasks, in order; a group stands under its own name until ``groups`` has the tasks of the group."""
        return tuple(dict.fromkeys(leaf for task in self.tasks for leaf in self.groups.get(task, (task,))))

    @property
    def compared_with(self) -> str | None:
        """The baseline: ``baseline`` if the plan sets one, else the first arm without method and shots."""
        if self.baseline is not None:
            return self.baseline
        return next((arm for arm, arguments in self.arms.items() if not seeded(arguments)), None)

    def seeds_for(self, arm: str) -> list[int]:
        """Return the seeds that an arm runs with: only the first seed if the seed does not change the results."""
        seeds = [seed for seed in self.seeds if seed in self.seeds_of.get(arm, self.seeds)]
        return seeds if seeded({**self.model, **self.arms[arm]}) else seeds[:1]

    def cell_keys(self) -> list[CellKey]:
        """Return the keys of all cells in the order of the run.

        All arms of a seed come before the next seed, because an arm may need the vector of another arm.
        """
        return [
            CellKey(task, arm, seed)
            for seed in self.seeds
            for arm in self.arms
            if seed in self.seeds_for(arm)
            for task in self.leaves
        ]

    def write(self, folder: Path) -> None:
        """Write ``plan.yaml`` into ``folder``."""
        content = {key: value for key, value in dataclasses.asdict(self).items() if value not in (None, {}, [])}
        text = yaml.safe_dump(plain(content), sort_keys=False, allow_unicode=True, width=120)
        files.write(folder / FILE, text.encode())


def read(path: Path) -> Plan:
    """Return the plan in a YAML file or in a results folder.

    Raises:
        ArgumentError: the path has no plan, or the content of the file is not a plan.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ArgumentError(f"no plan at {path}: give a YAML file, or a folder that lmms-mtv compare has written")
    fields = [entry.name for entry in dataclasses.fields(Plan)]
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ArgumentError(f"{path} holds a {type(content).__name__}, expected a mapping with {', '.join(fields)}")
    if unknown := sorted(content.keys() - set(fields)):
        raise ArgumentError(f"{path} has {', '.join(unknown)}, expected only {', '.join(fields)}")
    if missing := sorted({"model", "tasks", "arms"} - content.keys()):
        raise ArgumentError(f"{path} lacks {', '.join(missing)}")
    axis, include_path = content.pop("x", None), content.pop("include_path", [])
    include_path = [include_path] if isinstance(include_path, str) else include_path
    try:
        return Plan(
            **{"name": path.stem, **content},
            x=None if axis is None else Axis(**axis),
            include_path=[str(path.resolve().parent / folder) for folder in include_path],
        )
    except TypeError as error:
        raise ArgumentError(f"{path} is not a plan: {error}") from error


def check_include_path(folders: Sequence[str]) -> None:
    """Check that the folders of further task files exist.

    Raises:
        ArgumentError: a folder does not exist.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise ArgumentError(
                f"there is no folder {folder} of task files (include_path): pass --include_path with the folder where "
                "they are now"
            )


def are_seeds(seeds: Sequence[Any]) -> bool:
    """Return True if the seeds are :data:`SEEDS`."""
    return len(set(seeds)) == len(seeds) and all(isinstance(seed, int) and seed >= 0 for seed in seeds)


def seeded(arguments: Mapping[str, Any]) -> bool:
    """Return True if a seed changes the results: with a vector or with demonstrations."""
    no_vector = arguments.get("method", "mtv") == "none" and "vector" not in arguments
    return not no_vector or bool(arguments.get("shots", 0))


def slug(name: str) -> str:
    """Return ``name`` in the form of a file name."""
    return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in name).split())


def plain(value: Any) -> Any:
    """Return ``value`` as YAML and JSON would load it: mappings as dicts, tuples as lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
