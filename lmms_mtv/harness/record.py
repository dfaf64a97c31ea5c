"""The record of a run: method, vector, heads and settings of each task, written beside the harness's results."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lmms_mtv.runtime import files
from lmms_mtv.runtime.environment import versions
from lmms_mtv.vectors import TaskVector
from lmms_mtv.vectors.library.place import FILE, folder_name

_SECRET: Final = re.compile(r"(?i)(\w*(?:api_key|token|secret|password))=[^,\s]+")
_LIST: Final = re.compile(r"\[\n([-+.\deE,\s]*)\]")
_LIST_OF_LISTS: Final = re.compile(r"\[\n((?:\s*\[[-+.\deE, ]*\],?)+)\s*\]")


@dataclass(frozen=True)
class EvaluationRecord:
    """The figures of one evaluated task, over all processes except for ``seconds``, ``image_tokens`` and ``bytes``.

    Attributes:
        requests: number of requests.
        unreadable: number of documents that could not be shown.
        cut_off: number of answers that reached ``max_new_tokens``.
        seconds: time of the evaluation.
        input_tokens: mean number of tokens of a prompt.
        image_tokens: mean number of image tokens of a prompt; None if unknown.
        bytes: peak of the memory; None if unknown.
        output_tokens: mean number of tokens of an answer; None if unknown.
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

    Attributes:
        method: name of the method.
        vector: id of the vector.
        source: file or folder of the vector, or the origin of the vector in words.
        reused: True if the vector is from an earlier run; then ``fit_seconds``, ``fit_stages`` and ``fit_bytes`` are
            too.
        heads: layer and head of each edited head. Layers count sites: blocks in the ``skipped`` of a
            :class:`ModelRecord` have no site.
        shots: demonstrations in an evaluated prompt.
        seed: seed of the run.
        settings: settings of the method.
        fit_seconds: seconds of the fit.
        fit_stages: seconds of each stage of the fit.
        fit_bytes: peak memory of the fit; None if unknown.
        fit_replay: way that losses were computed; None without losses.
        fit_accuracy: accuracy of the trial after the fit.
        loss: loss without the edit (``unedited``) and with the edit (``chosen``).
        split: split of the training examples.
        examples: digest of the training examples.
        prompt: digest of a prompt.
        declared: settings that the task declares and that were used.
        remarks: remarks of the session on the training split.
        scores: metrics of the task with their standard errors; empty until they are known, and in lm-eval.
        evaluation: figures of the evaluation; None until the task is evaluated, and always None in lm-eval.
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
    scores: Mapping[str, float] = field(default_factory=dict)
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

    Attributes:
        name: name of the model.
        revision: revision of the model; None if unknown.
        dtype: precision of the weights.
        skipped: blocks without softmax attention.
        base: configuration of the base.
        arguments: the plugin's own arguments.
    """

    name: str
    revision: str | None
    dtype: str
    skipped: Sequence[int]
    base: Mapping[str, Any]
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The record of a run of lmms-eval.

    Attributes:
        model: record of the model.
        model_args: model arguments as text.
        tasks: record of each task, by the name of the task.
    """

    model: ModelRecord
    model_args: str
    tasks: Mapping[str, TaskRecord]

    def scored(self, results: Mapping[str, Mapping[str, Any]]) -> RunRecord:
        """Return the record with the scores in ``results``, the harness's figures of each task."""
        tasks = {
            name: dataclasses.replace(task, scores=_scores(results.get(name, {}))) for name, task in self.tasks.items()
        }
        return dataclasses.replace(self, tasks=tasks)

    def as_json(self) -> dict[str, Any]:
        """Return the record as values for JSON. Passwords and keys in ``model_args`` are left out."""
        return {
            "model": as_json(self.model),
            "model_args": _SECRET.sub(r"\1=[REDACTED]", self.model_args),
            "versions": versions(),
            "tasks": {name: as_json(task) for name, task in self.tasks.items()},
        }

    def write(self, path: Path) -> None:
        """Write the record as JSON, atomically. A list of numbers is one line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False)
        for lists in (_LIST, _LIST_OF_LISTS):
            text = lists.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)


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
    """Return the record of a task before its evaluation with ``vector``; the other arguments are fields."""
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
    """Return a record as values for JSON. The record of a task without an evaluation has no such entry."""
    entries = dataclasses.asdict(record)
    if entries.get("evaluation", ...) is None:
        del entries["evaluation"]
    return entries


def vector_path(folder: Path, vector: TaskVector) -> Path:
    """Return the file of a vector beside the results: ``<task>/<method>-<id>/vector.safetensors``."""
    return folder / folder_name(vector.card.task) / f"{folder_name(vector.card.method)}-{vector.id}" / FILE


def unwritable(folder: Path) -> str | None:
    """Return the reason why nothing can be written into ``folder``, in one line, or None if writing works."""
    reason = files.obstacle(folder)
    return None if reason is None else f"results cannot be written to {folder} ({reason}): choose another --output_path"


def _scores(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a task's figures that are scores or standard errors: those that name a metric, a filter."""
    return {
        name: float(value)
        for name, value in figures.items()
        if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
