"""What is compared: a model, tasks, arms and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

from lmms_mtv.errors import ArgumentError
from lmms_mtv.runtime import files

FILE: Final = "plan.yaml"
"""Name of a plan's file in a folder of results."""

OF_THE_PLAN: Final = ("seed", "batch_size", "limit", "library", "reuse")
"""Model arguments that no arm has: the plan gives them."""


class CellKey(NamedTuple):
    """Which cell of a comparison: a task, an arm, a seed."""

    task: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}, {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class Axis:
    """What a curve over arms is drawn against: ``values`` by arm, and ``series`` by arm where there are several."""

    axis: str
    values: Mapping[str, float]
    series: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A comparison: every arm on every task with every seed.

    ``model`` are the model arguments of all arms, ``arms`` those of each by its name. ``seeds_of`` has the arms that
    run with some of the seeds only, as costly ones. ``tasks`` may name groups of the harness; ``groups`` has the tasks
    of each once they are known. ``limit`` is the number of documents of a task.
    ``baseline`` is the arm that the others are compared with, ``paper`` the model in results/paper whose numbers stand
    beside. ``tolerance`` is how far a number may move: ``score`` of a cell, absolute; ``values`` of a vector,
    relative to their largest. ``x`` is what a curve over the arms is drawn against.

    Raises :class:`ArgumentError` if something is missing or does not fit.
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

    def __post_init__(self) -> None:
        for name in ("tasks", "arms", "seeds"):
            if not getattr(self, name):
                raise ArgumentError(f"the plan {self.name!r} has no {name}")
        if not self.name or any(c in self.name for c in "/\\"):
            raise ArgumentError(f"a plan's name is one word for a folder, found {self.name!r}")
        for arm, arguments in self.arms.items():
            if not isinstance(arguments, Mapping):
                raise ArgumentError(f"arm {arm!r} of plan {self.name!r} is {arguments!r}, expected model arguments")
            for key in OF_THE_PLAN:
                if key in arguments or key in self.model:
                    where = f"arm {arm!r}" if key in arguments else "model"
                    raise ArgumentError(f"{key}= stands under {where} of plan {self.name!r}: it belongs to the plan")
        files: dict[str, str] = {}
        for arm in self.arms:
            if (other := files.setdefault(slug(arm), arm)) != arm:
                raise ArgumentError(f"arms {other!r} and {arm!r} of plan {self.name!r} would share a file: rename one")
        if self.baseline is not None and self.baseline not in self.arms:
            raise ArgumentError(f"baseline {self.baseline!r} of plan {self.name!r} is none of its arms")
        if len(set(self.seeds)) < len(self.seeds) or not all(isinstance(seed, int) for seed in self.seeds):
            raise ArgumentError(f"seeds of plan {self.name!r} are {list(self.seeds)}, expected different integers")
        for arm, seeds in self.seeds_of.items():
            if arm not in self.arms or not set(seeds) <= set(self.seeds):
                raise ArgumentError(
                    f"seeds_of of plan {self.name!r} has {arm!r}: {list(seeds)}, expected an arm of the plan and some "
                    f"of its seeds {list(self.seeds)}"
                )

    @property
    def leaves(self) -> tuple[str, ...]:
        """The single tasks, in order. Groups are in it under their own name until ``groups`` has them."""
        return tuple(dict.fromkeys(leaf for task in self.tasks for leaf in self.groups.get(task, (task,))))

    @property
    def compared_with(self) -> str | None:
        """The baseline: the one that is named, else the first arm without method and shots."""
        if self.baseline is not None:
            return self.baseline
        return next((arm for arm, arguments in self.arms.items() if not seeded(arguments)), None)

    def seeds_for(self, arm: str) -> list[int]:
        """Return the seeds that an arm runs with: the first one alone where no seed changes anything."""
        seeds = [seed for seed in self.seeds if seed in self.seeds_of.get(arm, self.seeds)]
        return seeds if seeded({**self.model, **self.arms[arm]}) else seeds[:1]

    def cell_keys(self) -> list[CellKey]:
        """Return all cells, in the order in which they run: what an arm needs of another arm with its seed comes
        before.
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
    """Return the plan in a YAML file, or in a folder of results.

    Raises :class:`ArgumentError` if there is none, or if it is not a plan.
    """
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ArgumentError(f"no plan at {path}: give a YAML file, or a folder that lmms-mtv compare has written")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ArgumentError(f"{path} has no plan but {type(found).__name__}")
    fields = {entry.name: entry for entry in dataclasses.fields(Plan)}
    if other := sorted(found.keys() - fields.keys()):
        raise ArgumentError(f"{path} has {', '.join(other)}, which no plan has: {', '.join(fields)}")
    if missing := sorted({"model", "tasks", "arms"} - found.keys()):
        raise ArgumentError(f"{path} lacks {', '.join(missing)}")
    axis = found.pop("x", None)
    try:
        return Plan(**{"name": path.stem, **found}, x=None if axis is None else Axis(**axis))
    except TypeError as error:
        raise ArgumentError(f"{path} is no plan: {error}") from error


def seeded(arguments: Mapping[str, Any]) -> bool:
    """Return whether a seed changes anything: not without a vector and without demonstrations."""
    plain = arguments.get("method", "mtv") == "none" and "vector" not in arguments
    return not plain or bool(arguments.get("shots", 0))


def slug(name: str) -> str:
    """``name`` as part of a file name."""
    return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in name).split())


def plain(value: Any) -> Any:
    """``value`` as YAML and JSON give it back: mappings are dicts, and tuples are lists."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value
