"""One loaded model and its tasks, for many runs: what a comparison asks of lmms-eval."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from lmms_mtv.errors import DataError, MtvError, unknown
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.harness import record
from lmms_mtv.harness.lmms.model import Mtv
from lmms_mtv.harness.lmms.plugin import register_tasks
from lmms_mtv.runtime import distributed
from lmms_mtv.vectors import TaskVector

_PATIENCE: Final = timedelta(hours=24)
_OF_HARNESS: Final = ("results", "versions", "n-shot", "higher_is_better", "n-samples")


class PlanRunner:
    """The model and the tasks of a plan, loaded once.

    ``library`` is the folder of the vectors (None: the default one), ``reuse`` says whether one of the same recipe is
    taken from there. ``groups`` has the single tasks of those names in the plan that are groups.

    Raises :class:`ArgumentError` if a task or an argument of any arm is unknown, before anything runs.
    """

    def __init__(self, plan: Plan, library: Path | None = None, reuse: bool = True) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # As lmms-eval's own command does: the processes find each other.
            Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
        register_tasks()
        self._plan = plan
        self._manager = TaskManager("ERROR")
        for name in plan.tasks:
            if name not in self._manager.all_tasks:
                raise unknown("task", name, self._manager.all_tasks)
        own = {"batch_size": plan.batch_size, "reuse": reuse, "library": None if library is None else str(library)}
        self._model = Mtv(**own, **plan.model)
        for arguments in plan.arms.values():
            self._model.check(arguments)
        kind = "simple" if self._model.is_simple else "chat"
        loaded = {name: _loaded(name, self._manager, kind) for name in plan.tasks}
        self._tasks = {name: task for tasks in loaded.values() for name, task in tasks.items()}
        self.groups = {name: list(tasks) for name, tasks in loaded.items() if list(tasks) != [name]}

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes."""
        return distributed.current().rank == 0

    @property
    def model(self) -> dict[str, Any]:
        """Name, revision and dtype of the loaded model."""
        return self._model.identity

    def cell_keys(self) -> list[CellKey]:
        """Return all cells of the plan."""
        return dataclasses.replace(self._plan, groups=self.groups).cell_keys()

    def fit(self, key: CellKey) -> TaskVector:
        """Return the vector of a cell, fitted or from the library, without evaluating."""
        arm = self._model.arm({**self._plan.arms[key.arm], "seed": key.seed})
        task = self._tasks[key.task]
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        return arm.fit(task)

    def run(self, key: CellKey) -> tuple[Cell, dict[str, Any]] | None:
        """Return a cell, and the harness's own figures of it. None on all processes but the first."""
        arguments = dict(self._plan.arms[key.arm])
        arm = self._model.arm({**arguments, "seed": key.seed})
        # The harness lets the model free what it holds before it gives its results.
        recorded, vectors, base = arm.used, arm.vectors, self._model.base
        prompts: dict[str, dict[int, str]] = {}
        arm.prompts = prompts
        found = simple_evaluate(
            arm,
            tasks=[self._tasks[key.task]],
            limit=self._plan.limit,
            task_manager=self._manager,
            log_samples=True,
            verbosity="ERROR",
            distributed_executor_backend="torchrun" if distributed.current().count > 1 else "accelerate",
        )
        seen = _gathered(prompts[key.task])
        if found is None:
            return None
        used = recorded[key.task]
        samples = sorted(found["samples"][key.task], key=lambda sample: sample["doc_id"])
        metric, higher = _metric(key.task, found)
        scores = [_number(key.task, metric, sample) for sample in samples]
        entry = f"{metric},{_filter(found['results'][key.task], metric)}"
        error = found["results"][key.task].get(entry.replace(",", "_stderr,"))
        evaluation = used["evaluation"]
        text = None if evaluation["image_tokens"] is None else evaluation["input_tokens"] - evaluation["image_tokens"]
        cell = Cell(
            plan=self._plan.name,
            task=key.task,
            arm=key.arm,
            seed=key.seed,
            arguments=arguments,
            model=self.model,
            method=used["method"],
            shots=used["shots"],
            settings=used["settings"],
            metric=metric,
            score=float(found["results"][key.task][entry]),
            stderr=error if isinstance(error, float) else None,
            n=len(samples),
            higher_is_better=higher,
            samples={
                "documents": [sample["doc_id"] for sample in samples],
                "scores": scores,
                "answers": [str(sample["filtered_resps"][0]) for sample in samples],
                "prompts": [seen[sample["doc_id"]] for sample in samples],
            },
            tokens={"prompt": evaluation["input_tokens"], "image": evaluation["image_tokens"], "text": text},
            seconds={
                "fit": round(used["fit_seconds"], 3) if vectors[key.task].edits else None,
                **{f"fit/{name}": seconds for name, seconds in used["fit_stages"].items()},
                "evaluation": round(evaluation["seconds"], 3),
            },
            memory={"fit": used["fit_bytes"], "evaluation": evaluation["bytes"]},
            vector=_vector(vectors[key.task]),
            versions=record.versions(),
            hardware=_hardware(base.device),
        )
        return cell, {name: {key.task: found[name][key.task]} for name in _OF_HARNESS}


def _loaded(name: str, manager: TaskManager, kind: str) -> dict[str, Any]:
    """Return the single tasks behind the name of a task or group, by their names.

    Raises :class:`DataError` if a data set of ours cannot be had.
    """
    try:
        return _single(get_task_dict([name], manager, kind))
    except RetryError as error:
        # The harness asks for a data set several times, and tells how often instead of what was wrong.
        if isinstance(reason := error.last_attempt.exception(), MtvError):
            raise reason from error
        raise


def _single(loaded: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the single tasks in what the harness loads for a name: tasks, and groups of them in groups."""
    found: dict[str, Any] = {}
    for task in loaded.values():
        found |= _single(task) if isinstance(task, Mapping) else {task.config.task: task}
    return found


def _gathered(own: Mapping[int, str]) -> dict[int, str]:
    """Return the digests of all processes."""
    if distributed.current().count == 1:
        return dict(own)
    parts: list[Any] = [None] * distributed.current().count
    torch.distributed.all_gather_object(parts, dict(own))
    return {number: digest for part in parts for number, digest in part.items()}


def _metric(task: str, found: Mapping[str, Any]) -> tuple[str, bool]:
    """Return the task's first metric, and whether more of it is better."""
    metric, higher = next(iter(found["higher_is_better"][task].items()))
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
    """Return what a cell keeps of its vector."""
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
        "checksum": vector.checksum,
        "bytes": len(vector.content()),
    }


def _thinned(losses: Sequence[float]) -> list[float]:
    """``losses`` as at most 100 means of as many neighbours each."""
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
