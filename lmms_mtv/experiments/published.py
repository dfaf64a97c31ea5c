"""Numbers that papers report, as data with their source: ``results/paper`` in the repository."""

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
    """One reported number.

    ``quantity`` is ``score`` unless the table is of something else, ``unit`` the unit of ``value`` and ``std``
    (standard deviation over ``seeds`` runs, where given). ``task`` is this project's name of it; ``model``, ``arm`` and
    ``table`` are the paper's words, with arms written as in a plan: ``zero-shot``, ``4-shot``, ``MTV``,
    ``MTV + 1-shot``. ``read`` says where the number was read: in the ``paper``, or ``second-hand``.
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
        """The paper, its arXiv number, and where in it."""
        number = f"arXiv {self.arxiv}" if self.arxiv else ""
        return ", ".join(part for part in (self.title, number, self.key) if part)


def folder() -> Path:
    """Return the folder of reported numbers: inside an installed package, in ``results`` of the repository in an
    editable one.

    Raises DataError if there is neither.
    """
    package = Path(__file__).resolve().parents[1]
    for found in (package / "paper_results", package.parent / "results" / "paper"):
        if found.is_dir():
            return found
    raise DataError(f"the reported numbers of lmms-mtv are missing beside {package}: install lmms-mtv again")


@functools.cache
def entries() -> tuple[Reported, ...]:
    """Return every reported number, in the order of files and rows."""
    found = []
    for path in sorted(folder().glob("*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        found += [_reported(table, entry) for entry in table["entries"]]
    return tuple(found)


def models(arxiv: str = MTV) -> list[str]:
    """Return the models that a paper has scores of."""
    return sorted({entry.model for entry in entries() if entry.arxiv == arxiv and entry.model})


def published_result(task: str, arm: str, model: str, arxiv: str = MTV) -> Reported | None:
    """Return the score that the paper reports for a task, an arm and a model; None where it has none."""
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
