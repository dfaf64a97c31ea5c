"""One cell of a comparison as a file: what the harness measured, what it was measured with, and what it cost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lmms_mtv.errors import DataError
from lmms_mtv.experiments.plan import CellKey, slug
from lmms_mtv.runtime import files

SCHEMA: Final = 1
"""Version of a cell's fields."""

FOLDER: Final = "cells"
"""Folder of the cells in a folder of results."""


@dataclass(frozen=True)
class Cell:
    """One task, arm and seed.

    ``arguments`` are the arm's, ``settings`` all of its method's. ``score`` is the mean of ``samples["scores"]``
    unless the task sums up differently, ``stderr`` its standard error over ``n`` documents. ``samples`` has lists of
    the same length: ``documents``, ``scores``, ``answers`` and ``prompts`` (digests). ``tokens`` are means over the
    evaluated prompts, ``seconds`` and ``memory`` (peak bytes) those of ``fit`` and ``evaluation``, None where there
    is nothing to measure; ``seconds`` also has the parts of the fit, as ``fit/`` and the name of its stage.
    ``vector`` is None without one.
    """

    plan: str
    task: str
    arm: str
    seed: int
    arguments: Mapping[str, Any]
    model: Mapping[str, Any]
    method: str
    shots: int
    settings: Mapping[str, Any]
    metric: str
    score: float
    stderr: float | None
    n: int
    higher_is_better: bool
    samples: Mapping[str, Sequence[Any]]
    tokens: Mapping[str, float | None]
    seconds: Mapping[str, float | None]
    memory: Mapping[str, int | None]
    vector: Mapping[str, Any] | None
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    schema: int = SCHEMA

    @property
    def key(self) -> CellKey:
        return CellKey(self.task, self.arm, self.seed)


def path(folder: Path, key: CellKey) -> Path:
    """Return where a cell is kept."""
    return folder / FOLDER / slug(key.task) / f"{slug(key.arm)}-seed{key.seed}.json"


def write(folder: Path, cell: Cell, of_harness: Mapping[str, Any]) -> Path:
    """Write a cell, sealed, with the harness's own figures beside it; whole or not at all."""
    content = {**of_harness, "mtv": dataclasses.asdict(cell)}
    content["seal"] = seal(content)
    found = path(folder, cell.key)
    files.write(found, _written(content).encode())
    return found


def read(folder: Path, key: CellKey) -> Cell | None:
    """Return the cell at ``place``, None if there is none.

    Raises :class:`DataError` if its file is damaged, was altered, or is the cell of another place.
    """
    found = path(folder, key)
    if not found.is_file():
        return None
    cell = _opened(found)
    if cell.key != key:
        raise DataError(f"{found} is the cell of {cell.key}, expected {key}: delete it and run lmms-mtv compare")
    return cell


def read_all(folder: Path) -> list[Cell]:
    """Return all cells of a folder of results, by task, arm and seed.

    Raises :class:`DataError` as :func:`read` does.
    """
    return sorted((_opened(found) for found in folder.glob(f"{FOLDER}/*/*.json")), key=lambda cell: cell.key)


def contradictions(found: Sequence[Cell]) -> list[str]:
    """Return, a line each, what keeps cells from standing in one table.

    All cells have to be of one model: name, revision and precision. The cells of a task have to be of the same
    documents, and those with the same demonstrations of the same prompts.
    """
    lines = []
    models: dict[str, CellKey] = {}
    documents: dict[str, tuple[set[Any], CellKey]] = {}
    prompts: dict[str, tuple[dict[Any, Any], CellKey]] = {}
    for cell in sorted(found, key=lambda cell: cell.key):
        models.setdefault(described(cell.model), cell.key)
        written_of = dict(zip(cell.samples["documents"], cell.samples["prompts"], strict=True))
        shown, key = documents.setdefault(cell.task, (set(written_of), cell.key))
        if shown != written_of.keys():
            lines.append(f"{key} has {len(shown)} documents of task {cell.task}, {cell.key} has others")
            continue
        written, key = prompts.setdefault(_prompts_of(cell), (written_of, cell.key))
        if written != written_of:
            lines.append(f"{key} and {cell.key} were measured with different prompts or documents")
    if len(models) > 1:
        lines.insert(0, "several models: " + ", ".join(f"{model} ({key})" for model, key in models.items()))
    return lines


def described(model: Mapping[str, Any]) -> str:
    """Return a model of a cell in words."""
    return f"{model.get('name')} revision {model.get('revision')} in {model.get('dtype')}"


def _prompts_of(cell: Cell) -> str:
    """Return what the prompts of a cell depend on, as a key: without demonstrations on the task alone."""
    shown = [cell.shots, cell.seed, cell.arguments.get("wrong"), cell.arguments.get("demonstrations")]
    return json.dumps([cell.task, *(shown if cell.shots else ())])


def seal(content: Mapping[str, Any]) -> str:
    """Return SHA-256 of everything in a cell's file but the seal."""
    bare = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def _opened(found: Path) -> Cell:
    again = "delete it and run lmms-mtv compare again"
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
        given = content["mtv"]
        if content["seal"] != seal(content):
            raise DataError(f"{found} was altered after it was measured (its seal differs): {again}")
        if given["schema"] > SCHEMA:
            raise DataError(f"{found} was written by a newer version of lmms-mtv: upgrade it")
        return Cell(**given)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{found} is no cell ({type(error).__name__}: {error}): {again}") from error


def _written(content: Mapping[str, Any]) -> str:
    """JSON with a line for each entry of the cell, so that lists of samples do not take a line for each number."""
    outer = {key: json.dumps(value, ensure_ascii=False) for key, value in content.items() if key != "mtv"}
    inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in content["mtv"].items())
    lines = [f" {json.dumps(key)}: {value}" for key, value in outer.items()]
    return "{\n" + ",\n".join([*lines[:-1], f' "mtv": {{\n{inner}\n }}', lines[-1]]) + "\n}\n"
