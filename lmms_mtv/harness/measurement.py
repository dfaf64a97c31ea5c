"""The cell of a comparison, from the results of a harness and from what this package measured beside them."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from lmms_mtv.errors import DataError
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.runtime import distributed
from lmms_mtv.runtime.environment import versions
from lmms_mtv.vectors import TaskVector

_OF_HARNESS: Final = ("results", "versions", "n-shot", "higher_is_better", "n-samples")


@dataclass(frozen=True)
class Measurement:
    """What was measured for a cell beside the results of the harness.

    Attributes:
        model: name, revision and dtype of the model.
        method: name of the method.
        shots: demonstrations in each prompt.
        settings: settings of the method.
        answers: answer of each document, by the number of the document.
        prompts: digest of the prompt of each document, by the number of the document.
        tokens: mean number of tokens of a prompt: ``prompt``, ``image`` and ``text``; None if unknown.
        fit_seconds: seconds of the fit; None without a fit.
        fit_stages: seconds of each stage of the fit.
        evaluation_seconds: seconds of the evaluation.
        memory: peak memory of ``fit`` and ``evaluation`` in bytes; None if unknown.
        vector: the vector; None without edits.
        device: the device of the model.
    """

    model: Mapping[str, Any]
    method: str
    shots: int
    settings: Mapping[str, Any]
    answers: Mapping[int, str]
    prompts: Mapping[int, str]
    tokens: Mapping[str, float | None]
    fit_seconds: float | None
    fit_stages: Mapping[str, float]
    evaluation_seconds: float
    memory: Mapping[str, int | None]
    vector: TaskVector | None
    device: torch.device


@dataclass(frozen=True)
class Metric:
    """The metric that a comparison takes: the first metric of a task, in the filter that the task lists first.

    Attributes:
        name: name of the metric.
        filter: name of the filter.
        higher_is_better: True if a higher score is better.
    """

    name: str
    filter: str
    higher_is_better: bool


def metric_of(outcome: Mapping[str, Any], task: str) -> Metric:
    """Return the metric of a task in the results of a harness."""
    name, higher = next(iter(outcome["higher_is_better"][task].items()))
    entries = (key.partition(",") for key in outcome["results"][task])
    return Metric(name, next(of for metric, _, of in entries if metric == name), higher is not False)


def samples_of(outcome: Mapping[str, Any], task: str) -> list[Mapping[str, Any]]:
    """Return the samples of a task in the results of a harness: one of each document, by the task's :class:`Metric`."""
    metric = metric_of(outcome, task)
    samples = [sample for sample in outcome["samples"][task] if sample.get("filter", metric.filter) == metric.filter]
    return sorted(samples, key=lambda sample: sample["doc_id"])


def cell_of(plan: Plan, key: CellKey, outcome: Mapping[str, Any], measured: Measurement) -> tuple[Cell, dict[str, Any]]:
    """Return a cell, and the figures of the harness that are stored with the cell.

    Args:
        plan: the plan.
        key: the key of the cell.
        outcome: the results of the harness, with samples.
        measured: what was measured beside them.

    Raises:
        DataError: the metric is not a number for each document.
    """
    task, metric = key.task, metric_of(outcome, key.task)
    samples, results = samples_of(outcome, task), outcome["results"][task]
    error = results.get(f"{metric.name}_stderr,{metric.filter}")
    documents = [sample["doc_id"] for sample in samples]
    cell = Cell(
        plan=plan.name,
        task=task,
        arm=key.arm,
        seed=key.seed,
        arguments=dict(plan.arms[key.arm]),
        model=measured.model,
        method=measured.method,
        shots=measured.shots,
        settings=measured.settings,
        metric=metric.name,
        score=float(results[f"{metric.name},{metric.filter}"]),
        stderr=error if isinstance(error, float) else None,
        n=len(samples),
        higher_is_better=metric.higher_is_better,
        samples={
            "documents": documents,
            "scores": [_number(task, metric.name, sample) for sample in samples],
            "answers": [measured.answers[number] for number in documents],
            "prompts": [measured.prompts[number] for number in documents],
        },
        tokens=measured.tokens,
        seconds={
            "fit": None if measured.fit_seconds is None else round(measured.fit_seconds, 3),
            **{f"fit/{name}": seconds for name, seconds in measured.fit_stages.items()},
            "evaluation": round(measured.evaluation_seconds, 3),
        },
        memory=measured.memory,
        vector=None if measured.vector is None else _vector(measured.vector),
        versions=versions(),
        hardware=_hardware(measured.device),
    )
    return cell, {name: {task: outcome[name][task]} for name in _OF_HARNESS}


def _number(task: str, metric: str, sample: Mapping[str, Any]) -> int | float:
    value = sample.get(metric)
    if isinstance(value, bool | int | float):
        return int(value) if value == int(value) else float(value)
    raise DataError(
        f"metric {metric} of task {task} is {type(value).__name__} for document {sample['doc_id']}, expected a number "
        "for each document: a comparison needs one to compare them in pairs"
    )


def _vector(vector: TaskVector) -> dict[str, Any]:
    """Return the entry of a vector in a cell."""
    card = vector.card
    return {
        "id": vector.id,
        "task": card.task,
        "heads": [list(head) for head in vector.heads],
        "shape": [len(card.geometry), card.geometry[0][2], card.geometry[0][3]],
        "probabilities": [round(p, 4) for p in card.losses.get("probabilities", ())] or None,
        "policy": _thinned(card.losses.get("policy", ())),
        "steps": len(card.losses.get("policy", ())),
        "loss": {name: card.losses[name][0] for name in ("unedited", "chosen") if name in card.losses},
        "examples": card.config.get("iterations", 0) * card.config.get("fit_shots", 0),
        "used": card.used,
        "checksum": vector.checksum,
        "bytes": len(vector.content()),
    }


def _thinned(losses: Sequence[float]) -> list[float]:
    """Return at most 100 means of ``losses``, each over the same number of neighbours."""
    width = max(math.ceil(len(losses) / 100), 1)
    return [round(statistics.mean(losses[begin : begin + width]), 4) for begin in range(0, len(losses), width)]


def _hardware(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": name,
        "processes": distributed.current().count,
    }
