"""The cells of a plan, run by lm-eval on one loaded model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from lm_eval.evaluator import simple_evaluate

from lmms_mtv.errors import DataError, unknown
from lmms_mtv.experiments.cell import Cell
from lmms_mtv.experiments.plan import CellKey, Plan
from lmms_mtv.harness.arms import arm_arguments
from lmms_mtv.harness.lm.arguments import BASE, refuse_foreign
from lmms_mtv.harness.lm.evaluation import Evaluation, Tasks
from lmms_mtv.harness.lm.model import LmEvalMtv
from lmms_mtv.harness.measurement import Measurement, cell_of, samples_of
from lmms_mtv.harness.paths import LM_EVAL, tasks_folder
from lmms_mtv.harness.record import TaskRecord

_OF_EVALUATION: Final = ("apply_chat_template", "fewshot_as_multiturn", "system_instruction")
"""Flags of lm-eval that a plan has under ``model``."""

_LISTING: Final = "lmms-mtv lm-eval ls tasks"


class LmPlanRunner:
    """The runner of the cells of a plan with ``harness: lm-eval``, with a model that is loaded once.

    Args:
        plan: the plan. ``shots`` of an arm is lm-eval's ``--num_fewshot``, the seed is the seed of the fit and of the
            drawn demonstrations.
        library: folder of the vector library; None is the default folder.
        reuse: True takes a vector of the same recipe from the library.

    Raises:
        ArgumentError: a task or an argument of any arm is unknown. Nothing has run then.
    """

    def __init__(self, plan: Plan, library: Path | None = None, reuse: bool = True) -> None:
        self._plan = plan
        self._flags = {name: plan.model[name] for name in _OF_EVALUATION if name in plan.model}
        common = {name: value for name, value in plan.model.items() if name not in _OF_EVALUATION}
        for arguments in (common, *plan.arms.values()):
            refuse_foreign({name: value for name, value in arguments.items() if name != "shots"})
        parts = arm_arguments(common, plan.arms, BASE)
        of_base = {name: value for name, value in parts.shared.items() if name in BASE}
        of_plugin = {name: value for name, value in parts.shared.items() if name not in BASE}
        own = {"reuse": reuse, "library": None if library is None else str(library)}
        self._arms = {name: {**own, **of_plugin, **arguments} for name, arguments in parts.arms.items()}
        self._tasks = Tasks(include_path=[str(tasks_folder() / LM_EVAL), *plan.include_path])
        for name in plan.tasks:
            if name not in self._tasks.all_tasks:
                raise unknown("task", name, self._tasks.all_tasks, _LISTING)
        single = {name: list(self._tasks.load([name])["tasks"]) for name in plan.tasks}
        self._groups = {name: tasks for name, tasks in single.items() if tasks != [name]}
        self._lm = LmEvalMtv(**of_base, method="none", batch_size=plan.batch_size)
        self.model = self._lm.identity
        """Name, revision and dtype of the loaded model."""

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """The single tasks of each task group in the plan."""
        return self._groups

    @property
    def leads(self) -> bool:
        """True if this process writes the results."""
        return bool(self._lm.rank == 0)

    def run(self, key: CellKey) -> tuple[Cell, dict[str, Any]] | None:
        """Return a cell and the harness's own figures of the cell; None on all processes except the first.

        Raises:
            DataError: the task has a fixed number of demonstrations, and the arm has another.
        """
        arguments = dict(self._arms[key.arm])
        shots = arguments.pop("shots", None)
        arm = self._lm.arm(Evaluation(self._tasks.of, **self._flags), {**arguments, "seed": key.seed})
        outcome = simple_evaluate(
            arm,
            tasks=[key.task],
            num_fewshot=shots,
            fewshot_random_seed=key.seed,
            limit=self._plan.limit,
            task_manager=self._tasks,
            log_samples=True,
            **{"fewshot_as_multiturn": False, **self._flags},
        )
        if outcome is None:
            return None
        used = int(outcome["n-shot"][key.task])
        if shots is not None and used != shots:
            raise DataError(
                f"task {key.task} has num_fewshot: {used} in its file, which lm-eval does not change: leave shots= out "
                f"of arm {key.arm!r}, or the task out of the plan"
            )
        record, vector, cost = arm.records[key.task], arm.vector_of(key.task), arm.costs[key.task]
        edited = vector is not None and bool(vector.edits)
        samples = samples_of(outcome, key.task)
        tokens = fmean(len(arm.tok_encode(text)) for sample in samples for text in _contexts(sample))
        fitted = record if isinstance(record, TaskRecord) else None
        measured = Measurement(
            model=self.model,
            method=record.method,
            shots=used,
            settings={} if fitted is None else fitted.settings,
            answers={sample["doc_id"]: _answer(sample) for sample in samples},
            prompts={sample["doc_id"]: _digest(sample) for sample in samples},
            tokens={"prompt": tokens, "image": 0, "text": tokens},
            fit_seconds=fitted.fit_seconds if fitted is not None and edited else None,
            fit_stages={} if fitted is None else fitted.fit_stages,
            evaluation_seconds=cost.seconds,
            memory={"fit": None if fitted is None else fitted.fit_bytes, "evaluation": cost.bytes},
            vector=vector if edited else None,
            device=arm.device,
        )
        return cell_of(self._plan, key, outcome, measured)


def _contexts(sample: Mapping[str, Any]) -> list[str]:
    """Return the text before the target in each request of a document."""
    return [str(request[0]) for request in sample["arguments"]]


def _answer(sample: Mapping[str, Any]) -> str:
    """Return the answer to a document: the text, or the log-likelihood of each choice with four decimals."""
    answers = [
        answer[0] if isinstance(answer, Sequence) and not isinstance(answer, str) else answer
        for answer in sample["filtered_resps"]
    ]
    return " ".join(answer if isinstance(answer, str) else f"{answer:.4f}" for answer in answers)


def _digest(sample: Mapping[str, Any]) -> str:
    """Return the SHA-256 of all requests of a document, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(sample["arguments"], sort_keys=True, default=str).encode()).hexdigest()
