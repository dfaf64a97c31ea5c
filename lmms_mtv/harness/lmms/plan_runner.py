"""The cells of a plan, run by lmms-eval on one loaded model."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lmms_eval.evaluator import simple_evaluate

from lmms_mtv.errors import DataError
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.harness.lmms.loaded_run import load_run
from lmms_mtv.runtime import distributed
from lmms_mtv.runtime.environment import versions
from lmms_mtv.vectors import TaskVector

_OF_HARNESS: Final = ("results", "versions", "n-shot", "higher_is_better", "n-samples")


class PlanRunner:
    """The runner of the cells of a plan, with a model and tasks that are loaded once.

    Args:
        plan: the plan.
        library: folder of the vector library; None is the default folder.
        reuse: True takes a vector of the same recipe from the library.

    Raises:
        ArgumentError: a task or an argument of any arm is unknown. Nothing has run then.
    """

    def __init__(self, plan: Plan, library: Path | None = None, reuse: bool = True) -> None:
        self._plan = plan
        self._run = load_run(
            plan.tasks,
            plan.model,
            plan.arms,
            batch_size=plan.batch_size,
            library=library,
            reuse=reuse,
            include_path=plan.include_path,
        )

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """The single tasks of each task group in the plan."""
        return self._run.groups

    @property
    def leads(self) -> bool:
        """True if this process writes the results."""
        return distributed.current().rank == 0

    @property
    def model(self) -> dict[str, Any]:
        """Name, revision and dtype of the loaded model."""
        return self._run.model.identity

    def cell_keys(self) -> list[CellKey]:
        """Return all cells of the plan."""
        return dataclasses.replace(self._plan, groups=self.groups).cell_keys()

    def run(self, key: CellKey) -> tuple[Cell, dict[str, Any]] | None:
        """Return a cell and the harness's own figures of the cell; None on all processes except the first."""
        arguments = dict(self._plan.arms[key.arm])
        arm = self._run.model.arm({**self._run.arms[key.arm], "seed": key.seed})
        # The harness frees the model before it returns its results, so the references are taken now.
        task_records, vectors, base = arm.records, arm.vectors, self._run.model.base
        prompts: dict[str, dict[int, str]] = {}
        arm.prompts = prompts
        outcome = simple_evaluate(
            arm,
            tasks=[self._run.tasks[key.task]],
            limit=self._plan.limit,
            task_manager=self._run.manager,
            log_samples=True,
            verbosity="ERROR",
            distributed_executor_backend="torchrun" if distributed.current().count > 1 else "accelerate",
        )
        digests = _gathered(prompts[key.task])
        if outcome is None:
            return None
        task_record, vector = task_records[key.task], vectors[key.task]
        evaluation = task_record.evaluation
        if evaluation is None:
            raise DataError(f"task {key.task} was fitted and not evaluated: run it again")
        samples = sorted(outcome["samples"][key.task], key=lambda sample: sample["doc_id"])
        metric, higher = _metric(outcome["higher_is_better"][key.task])
        scores = [_number(key.task, metric, sample) for sample in samples]
        results = outcome["results"][key.task]
        entry = f"{metric},{_filter(results, metric)}"
        error = results.get(entry.replace(",", "_stderr,"))
        images = evaluation.image_tokens
        text = None if images is None else evaluation.input_tokens - images
        cell = Cell(
            plan=self._plan.name,
            task=key.task,
            arm=key.arm,
            seed=key.seed,
            arguments=arguments,
            model=self.model,
            method=task_record.method,
            shots=task_record.shots,
            settings=task_record.settings,
            metric=metric,
            score=float(results[entry]),
            stderr=error if isinstance(error, float) else None,
            n=len(samples),
            higher_is_better=higher,
            samples={
                "documents": [sample["doc_id"] for sample in samples],
                "scores": scores,
                "answers": [str(sample["filtered_resps"][0]) for sample in samples],
                "prompts": [digests[sample["doc_id"]] for sample in samples],
            },
            tokens={"prompt": evaluation.input_tokens, "image": images, "text": text},
            seconds={
                "fit": round(task_record.fit_seconds, 3) if vector.edits else None,
                **{f"fit/{name}": seconds for name, seconds in task_record.fit_stages.items()},
                "evaluation": round(evaluation.seconds, 3),
            },
            memory={"fit": task_record.fit_bytes, "evaluation": evaluation.bytes},
            vector=_vector(vector),
            versions=versions(),
            hardware=_hardware(base.device),
        )
        return cell, {name: {key.task: outcome[name][key.task]} for name in _OF_HARNESS}


def _gathered(own: Mapping[int, str]) -> dict[int, str]:
    """Return the digests of all processes."""
    if distributed.current().count == 1:
        return dict(own)
    parts: list[Any] = [None] * distributed.current().count
    torch.distributed.all_gather_object(parts, dict(own))
    return {number: digest for part in parts for number, digest in part.items()}


def _metric(higher_is_better: Mapping[str, bool | None]) -> tuple[str, bool]:
    """Return the first metric of a task, and True if a higher value is better."""
    metric, higher = next(iter(higher_is_better.items()))
    return metric, higher is not False


def _filter(results: Mapping[str, Any], metric: str) -> str:
    return next(key.partition(",")[2] for key in results if key.partition(",")[0] == metric)


def _number(task: str, metric: str, sample: Mapping[str, Any]) -> int | float:
    value = sample.get(metric)
    if isinstance(value, bool | int | float):
        return int(value) if value == int(value) else float(value)
    raise DataError(
        f"metric {metric} of task {task} is {type(value).__name__} for document {sample['doc_id']}, expected a number "
        "for each document: a comparison needs one to compare them in pairs"
    )


def _vector(vector: TaskVector) -> dict[str, Any] | None:
    """Return the entry of a vector in a cell."""
    if not vector.edits:
        return None
    card = vector.card
    return {
        "id": vector.id,
        "task": card.task,
        "heads": [list(head) for head in vector.heads],
        "shape": [len(card.geometry), card.geometry[0][2], card.geometry[0][3]],
        "probabilities": [round(p, 4) for p in card.losses.get("probabilities", ())] or None,
        "policy": _thinned(card.losses.get("policy", ())),
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
