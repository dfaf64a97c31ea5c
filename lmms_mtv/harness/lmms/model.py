"""The lmms-eval model ``mtv``, which fits a task vector for each task and evaluates with the vector."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.utils import sanitize_model_name
from loguru import logger

from lmms_mtv.errors import ArgumentError, DocumentError
from lmms_mtv.harness.lmms import bases, caller
from lmms_mtv.harness.lmms.bases import Base, LoadedBase
from lmms_mtv.harness.lmms.command_line import parsed
from lmms_mtv.harness.lmms.failure import fail_with_status
from lmms_mtv.harness.lmms.requests import document_of, only_generation, show_prompts, task_of
from lmms_mtv.harness.lmms.results import finish
from lmms_mtv.harness.lmms.task import TaskPrompts, task_for_model, task_requests
from lmms_mtv.harness.lmms.task_evaluation import TaskEvaluation
from lmms_mtv.harness.provider import TaskVectorProvider
from lmms_mtv.harness.record import ModelRecord, RunRecord, TaskRecord
from lmms_mtv.harness.tracking import log_fit
from lmms_mtv.models.prompts import Prompt
from lmms_mtv.runtime import distributed
from lmms_mtv.vectors import TaskVector


class LmmsEvalMtv(lmms):  # type: ignore[misc]
    """MTV, its controls and its baselines as one model of lmms-eval.

    Attributes:
        vectors: the vector of each evaluated task, by the name of the task.
        records: the record of each evaluated task, by the name of the task.
        prompts: None, or a mapping that is filled with digests of the prompts, by task and by document.

    Args:
        loaded: a loaded base; None loads the base that the arguments describe.
        model_args: model arguments by name: :class:`~lmms_mtv.harness.arguments.Arguments`, settings of the method, and
            arguments of the base. For a loaded base they change the arguments that the base was loaded with.

    Raises:
        ArgumentError: an argument is unknown or wrong, or belongs to a base that is loaded already.
    """

    is_simple = False

    def __init__(self, loaded: LoadedBase | None = None, /, **model_args: Any) -> None:
        super().__init__()
        self._loaded = bases.load(model_args) if loaded is None else loaded.changed(model_args)
        arguments, method, settings, _ = self._loaded.split({})
        self._arguments = arguments
        if (harness_model := self.base.harness_model) is not None:
            # The harness asks in the form of the base: text and images for a simple base, messages for a chat base.
            self.is_simple = harness_model.is_simple
            harness_model.share(self)
        self._provider = TaskVectorProvider[Prompt](
            arguments, method, settings, self.base, self.base.sites, logger, distributed.current
        )
        self.vectors: dict[str, TaskVector] = {}
        self.records: dict[str, TaskRecord] = {}
        self.prompts: dict[str, dict[int, str]] | None = None
        self._text = ",".join(f"{name}={value}" for name, value in self._loaded.model_args.items())
        self._run: RunRecord | None = None
        self._path: Path | None = None
        self._rows: dict[str, int] = {}

    @classmethod
    @fail_with_status
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LmmsEvalMtv:
        """Return the model that the command line describes.

        Args:
            arg_string: the model arguments, ``name=value,name=value``.
            additional_config: ``--batch_size`` and ``--device``, even if the user did not pass them: the model
                arguments win.
        """
        model = cls(**parsed(arg_string, additional_config or {}))
        model._check_uncached()
        model._text = arg_string
        return model

    def arm(self, model_args: Mapping[str, Any]) -> LmmsEvalMtv:
        """Return the same loaded model with changed arguments of the plugin or of a method.

        Raises:
            ArgumentError: an argument is unknown, or belongs to the base, which is loaded already.
        """
        return LmmsEvalMtv(self._loaded, **model_args)

    @property
    def base(self) -> Base:
        """The loaded model."""
        return self._loaded.base

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision and dtype of the loaded model, as in records and cells."""
        return {"name": self.base.name, "revision": self.base.revision, "dtype": self.base.dtype}

    @property
    def batch_sizes(self) -> dict[str, int]:
        """The rows of a batch of each task.

        The harness asks for them after the scores are computed, and asks its model for nothing after that. So this is
        where the record of the run gets the scores and goes into the results.
        """
        results = caller.evaluation().get("results")
        if self._run is not None and isinstance(results, dict):
            finished = finish(self._run, results, self.vectors, None if self._path is None else self._path.parent)
            self._run = None
            if self._write(finished):
                logger.info(f"methods, vectors, heads and settings: {self._path}")
        return self._rows

    @property
    def edits(self) -> bool:
        """True if the answers come from an edited model."""
        return self._arguments.vector is not None or self._arguments.method != "none"

    @property
    def device(self) -> torch.device:
        return self.base.device

    def fit(self, task: Any) -> TaskVector:
        """Return the vector of a task of the harness, fitted or reused, without an evaluation."""
        vector, _ = self._provider.of(self._prompts_of(task), self._shots(task), None)
        return vector

    def clean(self) -> None:
        """Free the model. The harness calls this method after the last answer."""
        del self._loaded, self._provider
        super().clean()

    @fail_with_status
    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return answers in the order of the requests. The vector of a task is fitted before the task is answered."""
        self._check_uncached()
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(index)
        answers: dict[int, GenerationResult] = {}
        output: str | None = None
        for indices in groups.values():
            task = task_of(requests[indices[0]])
            output = getattr(getattr(task, "args", None), "output_path", None)
            results = self._evaluate(task, [requests[index] for index in indices], output)
            answers |= dict(zip(indices, results, strict=True))
        if self.rank == 0 and self.records:
            self._record_run(output)
        return [answers[index] for index in range(len(requests))]

    @fail_with_status
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise only_generation(requests)

    @fail_with_status
    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise only_generation(requests)

    def _evaluate(self, task: Any, requests: Sequence[Instance], output: str | None) -> list[GenerationResult]:
        """Return the answers to all requests of a task, in the order of the requests."""
        wrapped, sent = self.base.harness_model is not None, requests
        if wrapped and (own := task_for_model(task, self.base.config.name)) is not task:
            task, requests = own, task_requests(own, requests)
        prompts, shots = self._prompts_of(task), self._shots(task)
        vector, task_record = self._provider.of(prompts, shots, self._folder(output) if output else None)
        if self.rank == 0 and caller.tracks("wandb_args"):
            log_fit("wandb", prompts.name, vector)
        if self.prompts is not None:
            self.prompts[prompts.name] = {
                number: self._digest(prompts, number, split, shots) for number, split in map(document_of, requests)
            }
        evaluation = TaskEvaluation(
            self,
            self.base,
            prompts,
            vector,
            shots=shots,
            seed=self._arguments.seed,
            as_sent=wrapped and not shots and not task.config.num_fewshot,
            keeps_texts=caller.keeps_samples(),
        )
        answers, figures = evaluation.run(requests)
        show_prompts(sent, evaluation.texts)
        self._rows[prompts.name] = self.base.batch_size.rows
        self.vectors[prompts.name] = vector
        self.records[prompts.name] = dataclasses.replace(task_record, evaluation=figures)
        return answers

    def _digest(self, prompts: TaskPrompts, number: int, split: str, shots: int) -> str:
        try:
            return prompts.evaluation(number, split, shots, self._arguments.seed).digest()
        except DocumentError:
            return "unreadable"

    def _prompts_of(self, task: Any) -> TaskPrompts:
        arguments, as_sent = self._arguments, self.base.harness_model is not None
        return TaskPrompts(task, arguments.demonstrations, as_sent=as_sent, wrong=arguments.wrong, seed=arguments.seed)

    def _shots(self, task: Any) -> int:
        """Return the number of demonstrations in an evaluated prompt."""
        shots, of_harness = self._arguments.shots, task.config.num_fewshot or 0
        if shots is not None and of_harness not in (0, shots):
            # A task file can have the number too, and the model cannot tell a task file from the command line.
            logger.warning(f"shots={shots} is used, not the {of_harness} of --num_fewshot or of the task file")
        return of_harness if shots is None else shots

    def _record_run(self, output: str | None) -> None:
        """Keep the record of the run, and write it beside the harness's results if there is a folder for results."""
        model = ModelRecord(
            **self.identity,
            skipped=list(self.base.sites.skipped),
            base=dataclasses.asdict(self.base.config),
            arguments=dataclasses.asdict(self._arguments),
        )
        self._run = RunRecord(model, self._text, dict(self.records))
        if output and self._path is None:
            stem = caller.results_file() or self._folder(output) / time.strftime("%Y%m%d_%H%M%S")
            self._path = stem.with_name(f"{stem.name}_mtv.json")
        self._write(self._run)

    def _write(self, run: RunRecord) -> bool:
        """Write the record of the run to its file, if there is one, and return whether the record is there."""
        if self._path is None:
            return False
        try:
            run.write(self._path)
            return True
        except OSError as error:
            # The answers exist, and the harness still shows their scores.
            logger.error(f"the record of this run is not written ({error}): choose another --output_path")
            return False

    def _folder(self, output: str) -> Path:
        """Return the folder into which the harness writes the results of this run."""
        if (results := caller.results_file()) is not None:
            return results.parent
        return Path(output, sanitize_model_name(self._loaded.model_args.get("pretrained", "")))

    def _check_uncached(self) -> None:
        """Check that the harness does not cache the answers of an edited model.

        Raises:
            ArgumentError: the harness would cache the answers.
        """
        if self.edits and caller.caches_answers():
            raise ArgumentError(
                "--use_cache knows a model by the text of its arguments, and would give the answers of another vector "
                "or of other training examples for those of this run: leave it out (fitted vectors are kept in the "
                "library)"
            )
