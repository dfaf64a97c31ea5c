"""What was run: the model, the data, the versions, and the settings of each arm that differ from the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final

from lmms_mtv import methods
from lmms_mtv.errors import MtvError
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.report.results import Results
from lmms_mtv.experiments.report.summary import MISSING, NONE
from lmms_mtv.experiments.report.table import Table

_IN_COLUMNS: Final = ("method", "shots")
_LONGEST: Final = 40
"""The number of characters of a value that a table shows."""


def run(results: Results) -> Table:
    """Return the model, the data, the seeds, the hardware and the versions, a row for each."""
    model = {
        f"{cell.model['name']}, revision {cell.model['revision']}, {cell.model['dtype']}" for cell in results.cells
    }
    arguments = [f"{name}={value}" for name, value in results.plan.model.items()]
    documents: dict[str, list[str]] = {}
    for task in results.tasks:
        counts = {str(cell.n) for cell in results.cells if cell.task == task}
        documents.setdefault(_either(counts) or MISSING, []).append(task)
    rows = [
        ["model", _either(model)],
        ["model arguments", ", ".join(arguments) or NONE],
        ["data", "; ".join(f"{', '.join(tasks)}: {count} documents" for count, tasks in documents.items())],
        ["seeds", ", ".join(map(str, results.plan.seeds))],
        ["batch size", str(results.plan.batch_size)],
        ["hardware", machines(results)],
        ["versions", versions(results)],
    ]
    return Table("Run", ["what", "value"], rows, words=True)


def arms(results: Results) -> Table:
    """Return a row for each arm: its method, its shots, and its settings that differ from the defaults."""
    rows = []
    for arm in results.arms:
        cells = results.of(arm)
        method, shots = _either(cell.method for cell in cells), _either(str(cell.shots) for cell in cells)
        settings = ", ".join(f"{name}={value}" for name, value in _changed(cells).items())
        rows.append([arm, method or MISSING, shots or MISSING, settings or NONE])
    return Table("Arms", ["arm", "method", "shots", "settings that differ from the defaults"], rows, words=True)


def machines(results: Results) -> str:
    """Return the hardware of the cells as text."""
    return _either(
        f"{cell.hardware['machine']}, {cell.hardware['cores']} cores, {cell.hardware['device']}, "
        f"{cell.hardware['processes']} process{'es' if cell.hardware['processes'] > 1 else ''}"
        for cell in results.cells
    )


def versions(results: Results) -> str:
    """Return the versions of the libraries as text; all of them if cells differ."""
    found: dict[str, set[str]] = {}
    for cell in results.cells:
        for name, version in cell.versions.items():
            found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {_either(own)}" for name, own in sorted(found.items()))


def _changed(cells: Iterable[Cell]) -> dict[str, str]:
    """Return the settings and arguments of the cells of an arm that differ from the defaults, as text by name.

    A cell of an earlier version may lack a setting. The fit was then as with None.
    """
    values: dict[str, dict[str, None]] = {}
    for cell in cells:
        defaults = _defaults(cell.method)
        settings = {**cell.settings, **{name: None for name in _optional(cell.method) if name not in cell.settings}}
        own = {name: value for name, value in settings.items() if name not in defaults or value != defaults[name]}
        own |= {name: value for name, value in cell.arguments.items() if name not in (*_IN_COLUMNS, *cell.settings)}
        for name, value in own.items():
            values.setdefault(name, {})[_text(value)] = None
    return {name: " or ".join(texts) for name, texts in values.items()}


def _defaults(method: str) -> Mapping[str, Any]:
    """Return the defaults of a method; empty if the method belongs to a package that is not installed."""
    return {field.name: field.default for field in _fields(method)}


def _optional(method: str) -> list[str]:
    """Return the settings of a method that can be None."""
    return [field.name for field in _fields(method) if "None" in str(field.type)]


def _fields(method: str) -> tuple[dataclasses.Field[Any], ...]:
    try:
        return dataclasses.fields(methods.get(method).config)
    except MtvError:
        return ()


def _text(value: object) -> str:
    """Return a value as text. Of a long value the text has the beginning."""
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _either(values: Iterable[str]) -> str:
    """Return different values with "or" between them."""
    return " or ".join(sorted(set(values)))
