"""The cells of a plan, run by lmms-eval on one loaded model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.evaluator import simple_evaluate

from lmms_mtv.errors import DataError
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.harness.lmms.loaded_run import load_run
from lmms_mtv.harness.measurement import Measurement, cell_of, samples_of
from lmms_mtv.runtime import distributed


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
        images = evaluation.image_tokens
        text = None if images is None else evaluation.input_tokens - images
        measured = Measurement(
            model=self.model,
            method=task_record.method,
            shots=task_record.shots,
            settings=task_record.settings,
            answers={sample["doc_id"]: str(sample["filtered_resps"][0]) for sample in samples_of(outcome, key.task)},
            prompts=digests,
            tokens={"prompt": evaluation.input_tokens, "image": images, "text": text},
            fit_seconds=task_record.fit_seconds if vector.edits else None,
            fit_stages=task_record.fit_stages,
            evaluation_seconds=evaluation.seconds,
            memory={"fit": task_record.fit_bytes, "evaluation": evaluation.bytes},
            vector=vector if vector.edits else None,
            device=base.device,
        )
        return cell_of(self._plan, key, outcome, measured)


def _gathered(own: Mapping[int, str]) -> dict[int, str]:
    """Return the digests of all processes."""
    if distributed.current().count == 1:
        return dict(own)
    parts: list[Any] = [None] * distributed.current().count
    torch.distributed.all_gather_object(parts, dict(own))
    return {number: digest for part in parts for number, digest in part.items()}
