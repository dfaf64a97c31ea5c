"""The record of a run: method, vector, heads and settings of each task, written beside the harness's results."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from lmms_mtv.runtime import files
from lmms_mtv.vectors import TaskVector
from lmms_mtv.vectors.library.place import FILE, folder_name

PACKAGES: Final = ("lmms-mtv", "lmms-eval", "lm-eval", "torch", "transformers")


@dataclass(frozen=True)
class EvaluationRecord:
    """The figures of one evaluated task, over all processes but for ``seconds``, ``image_tokens`` and ``bytes``.

    ``requests``: number of requests; ``unreadable``: number of documents that could not be shown; ``cut_off``: number
    of answers that reached ``max_new_tokens``. ``seconds``: time of the evaluation. ``input_tokens``,
    ``image_tokens`` and ``output_tokens``: means over the requests, None if unknown. ``bytes``: peak of the memory.
    """

    requests: int
    unreadable: int
    cut_off: int
    seconds: float
    input_tokens: float
    image_tokens: float | None
    bytes: int | None
    output_tokens: float | None


@dataclass(frozen=True)
class TaskRecord:
    """The record of one task.

    ``source``: file or folder of the vector, or how the vector came about. ``reused``: the vector is from an earlier
    run, and so are ``fit_seconds``, ``fit_stages`` and ``fit_bytes``. ``heads``: layer and head, where layers count
    sites: blocks in the ``skipped`` of a :class:`ModelRecord` have no site. ``shots``: demonstrations in an evaluated
    prompt. ``declared``: settings that the task declares and that were used. ``remarks``: remarks of the session on
    the training split. ``evaluation``: None until the task is evaluated, and always None in lm-eval.
    """

    method: str
    vector: str
    source: str
    reused: bool
    heads: Sequence[Sequence[int]]
    shots: int
    seed: int
    settings: Mapping[str, Any]
    fit_seconds: float
    fit_stages: Mapping[str, float]
    fit_bytes: int | None
    fit_replay: str | None
    fit_accuracy: Mapping[str, float]
    loss: Mapping[str, float]
    split: str
    examples: str
    prompt: str
    declared: Mapping[str, Any]
    remarks: Sequence[str]
    evaluation: EvaluationRecord | None = None


@dataclass(frozen=True)
class UneditedRecord:
    """The record of a task that lm-eval's own model answers, without a vector."""

    method: str = "none"
    source: str = "nothing to fit"
    heads: Sequence[Sequence[int]] = field(default_factory=list)


@dataclass(frozen=True)
class ModelRecord:
    """The record of the model of a run.

    ``skipped``: blocks without softmax attention. ``base``: the configuration of the base. ``arguments``: the plugin's
    own arguments.
    """

    name: str
    revision: str | None
    dtype: str
    skipped: Sequence[int]
    base: Mapping[str, Any]
    arguments: Mapping[str, Any]


def task_record(
    vector: TaskVector,
    source: str,
    *,
    seed: int,
    shots: int,
    reused: bool,
    declared: Mapping[str, Any],
    remarks: Sequence[str],
) -> TaskRecord:
    """Return the record of a task that is to be evaluated with ``vector``; the other arguments are its fields."""
    card = vector.card
    return TaskRecord(
        method=card.method,
        vector=vector.id,
        source=source,
        reused=reused,
        heads=[list(head) for head in vector.heads],
        shots=shots,
        seed=seed,
        settings=dict(card.config),
        fit_seconds=card.seconds,
        fit_stages=dict(card.stages),
        fit_bytes=card.memory,
        fit_replay=card.replay,
        fit_accuracy=dict(card.accuracy),
        loss={name: card.losses[name][0] for name in ("unedited", "chosen") if name in card.losses},
        split=card.split,
        examples=card.examples,
        prompt=card.prompt,
        declared=declared,
        remarks=remarks,
    )


def as_json(record: TaskRecord | UneditedRecord | ModelRecord) -> dict[str, Any]:
    """Return a record as values that JSON knows. A task without an evaluation has no such entry."""
    entries = dataclasses.asdict(record)
    if entries.get("evaluation", ...) is None:
        del entries["evaluation"]
    return entries


def versions() -> dict[str, str]:
    """Return the versions of the packages that a number depends on."""
    return {package: version(package) for package in PACKAGES}


def vector_path(folder: Path, vector: TaskVector) -> Path:
    """Return the file of a vector beside the results: ``<task>/<method>-<id>/vector.safetensors``."""
    return folder / folder_name(vector.card.task) / f"{folder_name(vector.card.method)}-{vector.id}" / FILE


def unwritable(folder: Path) -> str | None:
    """Return the reason why nothing can be written into ``folder``, in one line, or None if writing works."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = files.temporary(folder / "probe")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return f"results cannot be written to {folder} ({error.strerror or error}): choose another --output_path"
    return None


def write(folder: Path, model: ModelRecord, tasks: Mapping[str, TaskRecord]) -> Path:
    """Write ``<time>_mtv.json`` into ``folder``, whole or not at all, and return the path of the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%d_%H%M%S')}_mtv.json"
    content = {
        "model": as_json(model),
        "versions": versions(),
        "tasks": {name: as_json(record) for name, record in tasks.items()},
    }
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
