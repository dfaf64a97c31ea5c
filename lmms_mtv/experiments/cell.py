"""The cell of a comparison as a file: the measured scores, the settings and versions, and the cost."""

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
"""Name of the folder of cells in a results folder."""


@dataclass(frozen=True)
class Cell:
    """The result of one task, arm and seed.

    Attributes:
        plan: name of the plan.
        task: name of the task in the harness.
        arm: name of the arm in the plan.
        seed: seed of the fit and of the drawn demonstrations.
        arguments: model arguments of the arm.
        model: name, revision and dtype of the model.
        method: name of the method.
        shots: demonstrations in each prompt.
        settings: all settings of the method.
        metric: name of the metric.
        score: the mean of ``samples["scores"]``, or the value that the task's own aggregation returns.
        stderr: standard error of ``score`` over the documents, None if unknown.
        n: number of documents.
        higher_is_better: True if a higher score is better.
        samples: lists of equal length, with an entry for each document: ``documents`` (numbers), ``scores``,
            ``answers`` and ``prompts`` (digests).
        tokens: mean number of tokens of the evaluated prompts: ``prompt``, ``image`` and ``text``; None if unknown.
        seconds: seconds of ``fit`` and ``evaluation``, and of each stage of the fit as ``fit/STAGE``; None if nothing
            was measured.
        memory: peak memory of ``fit`` and ``evaluation`` in bytes; None if nothing was measured.
        vector: facts of the vector, among them its id and checksum; None without a vector.
        versions: versions of the libraries.
        hardware: machine, cores, device and number of processes.
        schema: version of the fields.
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
        """The task, the arm and the seed."""
        return CellKey(self.task, self.arm, self.seed)


def path(folder: Path, key: CellKey) -> Path:
    """Return the path of the file of a cell in a results folder."""
    return folder / FOLDER / slug(key.task) / f"{slug(key.arm)}-seed{key.seed}.json"


def write(folder: Path, cell: Cell, harness_results: Mapping[str, Any]) -> Path:
    """Write a cell with the results of the harness and a seal, and return the path of the file.

    The write is atomic: the file is complete or absent.

    Args:
        folder: the results folder.
        cell: the cell.
        harness_results: the harness's own results of the cell.
    """
    content = {**harness_results, "mtv": dataclasses.asdict(cell)}
    content["seal"] = seal(content)
    file = path(folder, cell.key)
    files.write(file, _json_text(content).encode())
    return file


def read(folder: Path, key: CellKey) -> Cell | None:
    """Return the cell with ``key``, None if the folder has no such cell.

    Args:
        folder: the results folder.
        key: the key of the cell.

    Raises:
        DataError: the file is damaged, was altered, or holds the cell of another key.
    """
    file = path(folder, key)
    if not file.is_file():
        return None
    cell = _read_file(file)
    if cell.key != key:
        raise DataError(f"{file} is the cell of {cell.key}, expected {key}: delete it and run lmms-mtv compare")
    return cell


def read_all(folder: Path) -> list[Cell]:
    """Return all cells of a results folder, in the order of task, arm and seed.

    Raises:
        DataError: a file is damaged or was altered.
    """
    return sorted((_read_file(file) for file in folder.glob(f"{FOLDER}/*/*.json")), key=lambda cell: cell.key)


def contradictions(cells: Sequence[Cell]) -> list[str]:
    """Return the reasons why the cells do not belong in one table, a line for each reason.

    All cells must have the same model: name, revision and precision. The cells of a task must have the same documents,
    and the cells of a task with the same demonstrations must have the same prompts.
    """
    lines = []
    models: dict[str, CellKey] = {}
    documents: dict[str, tuple[set[Any], CellKey]] = {}
    prompts: dict[str, tuple[dict[Any, Any], CellKey]] = {}
    for cell in sorted(cells, key=lambda cell: cell.key):
        models.setdefault(described(cell.model), cell.key)
        cell_prompts = dict(zip(cell.samples["documents"], cell.samples["prompts"], strict=True))
        first_documents, key = documents.setdefault(cell.task, (set(cell_prompts), cell.key))
        if first_documents != cell_prompts.keys():
            lines.append(f"{key} has {len(first_documents)} documents of task {cell.task}, {cell.key} has others")
            continue
        first_prompts, key = prompts.setdefault(_prompts_key(cell), (cell_prompts, cell.key))
        if first_prompts != cell_prompts:
            lines.append(f"{key} and {cell.key} were measured with different prompts or documents")
    if len(models) > 1:
        lines.insert(0, "several models: " + ", ".join(f"{model} ({key})" for model, key in models.items()))
    return lines


def described(model: Mapping[str, Any]) -> str:
    """Return the model of a cell in words: name, revision and precision."""
    return f"{model.get('name')} revision {model.get('revision')} in {model.get('dtype')}"


def _prompts_key(cell: Cell) -> str:
    """Return a key that is equal for cells with equal prompts: the task and, with shots, the demonstrations."""
    demonstrations = [cell.shots, cell.seed, cell.arguments.get("wrong"), cell.arguments.get("demonstrations")]
    return json.dumps([cell.task, *(demonstrations if cell.shots else ())])


def seal(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the content of a cell's file without the seal, in hexadecimal digits."""
    bare = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True).encode()).hexdigest()


def _read_file(file: Path) -> Cell:
    again = "delete it and run lmms-mtv compare again"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        fields = content["mtv"]
        if content["seal"] != seal(content):
            raise DataError(f"{file} was altered after the measurement (the seal differs): {again}")
        if fields["schema"] > SCHEMA:
            raise DataError(f"{file} was written by a newer version of lmms-mtv: upgrade lmms-mtv")
        return Cell(**fields)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a cell ({type(error).__name__}: {error}): {again}") from error


def _json_text(content: Mapping[str, Any]) -> str:
    """Return the content as JSON, with one line for each field of the cell."""
    outer = {key: json.dumps(value, ensure_ascii=False) for key, value in content.items() if key != "mtv"}
    inner = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in content["mtv"].items())
    lines = [f" {json.dumps(key)}: {value}" for key, value in outer.items()]
    return "{\n" + ",\n".join([*lines[:-1], f' "mtv": {{\n{inner}\n }}', lines[-1]]) + "\n}\n"
