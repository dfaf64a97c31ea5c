"""Published numbers with their sources, from ``results/paper`` in the repository."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lmms_mtv.errors import DataError

MTV: Final = "2406.15334"
"""The arXiv number of the MTV paper."""


@dataclass(frozen=True)
class Reported:
    """A number that a paper reports.

    Attributes:
        table: name of the table in the paper.
        model: name of the model in the paper.
        task: name of the task in this project.
        arm: name of the arm, written as in a plan: ``zero-shot``, ``4-shot``, ``MTV``, ``MTV + 1-shot``.
        value: the number.
        unit: unit of ``value`` and ``std``.
        quantity: the measured quantity, ``score`` in most tables.
        std: standard deviation over ``seeds`` runs; None if not reported.
        seeds: number of runs; None if not reported.
        title: title of the paper.
        arxiv: arXiv number of the paper.
        venue: venue of the paper.
        key: the table or section in the paper.
        read: source of the number in this project: ``paper``, or ``second-hand``.
        remarks: remarks on the number.
    """

    table: str
    model: str | None
    task: str | None
    arm: str
    value: float
    unit: str
    quantity: str
    std: float | None
    seeds: int | None
    title: str
    arxiv: str | None
    venue: str | None
    key: str | None
    read: str
    remarks: str

    @property
    def source(self) -> str:
        """The paper, its arXiv number, and the table or section."""
        number = f"arXiv {self.arxiv}" if self.arxiv else ""
        return ", ".join(part for part in (self.title, number, self.key) if part)


def folder() -> Path:
    """Return the folder of published numbers.

    An installed package has the folder inside; an editable installation uses ``results/paper`` of the repository.

    Raises:
        DataError: neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "paper_results", package.parent / "results" / "paper"):
        if candidate.is_dir():
            return candidate
    raise DataError(f"the reported numbers of lmms-mtv are missing beside {package}: install lmms-mtv again")


@functools.cache
def entries() -> tuple[Reported, ...]:
    """Return all published numbers, in the order of files and rows."""
    numbers = []
    for path in sorted(folder().glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        numbers += [_reported(table, entry) for entry in table["entries"]]
    return tuple(numbers)


def models(arxiv: str = MTV) -> list[str]:
    """Return the names of the models in a paper."""
    return sorted({entry.model for entry in entries() if entry.arxiv == arxiv and entry.model})


def published_result(task: str, arm: str, model: str, arxiv: str = MTV) -> Reported | None:
    """Return the score that the paper reports for a task, an arm and a model; None if the paper reports none."""
    for entry in entries():
        if (entry.arxiv, entry.quantity) == (arxiv, "score") and (entry.task, entry.arm, entry.model) == (
            task,
            arm,
            model,
        ):
            return entry
    return None


def _reported(table: dict[str, Any], entry: dict[str, Any]) -> Reported:
    source = table["source"]
    return Reported(
        table=table["table"],
        model=entry["model"],
        task=entry["task"],
        arm=entry["arm"],
        value=entry["value"],
        unit=entry.get("unit", table["unit"]),
        quantity=entry.get("quantity", "score"),
        std=entry.get("std"),
        seeds=entry.get("seeds"),
        title=source["title"],
        arxiv=source["arxiv"],
        venue=source["venue"],
        key=source["place"],
        read=table["read"],
        remarks=" ".join(part for part in (entry.get("remarks", ""), table["remarks"]) if part),
    )
