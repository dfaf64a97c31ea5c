"""The lmms-eval model ``mtv``: it fits a task vector for each task, then evaluates with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.api.task import Task
from lmms_eval.utils import sanitize_model_name, simple_parse_args_string
from loguru import logger
from tqdm import tqdm

from lmms_mtv import ranks
from lmms_mtv.errors import DataError, HookError
from lmms_mtv.harness import bases, record
from lmms_mtv.harness.arguments import Arguments, divide, names
from lmms_mtv.harness.failure import reported
from lmms_mtv.harness.hf import Answer
from lmms_mtv.harness.prompts import Prompt
from lmms_mtv.harness.task import TaskPrompts
from lmms_mtv.harness.vectors import Vectors
from lmms_mtv.hooks import Fired, applied, find_sites
from lmms_mtv.vector import TaskVector


class Mtv(lmms):  # type: ignore[misc]
    """MTV, its controls and its baselines as one model of the harness.

    See :class:`~lmms_mtv.harness.arguments.Arguments` for its arguments; those of the method and of the base are
    given beside them.
    """

    is_simple = False

    def __init__(self, **given: Any) -> None:
        super().__init__()
        base = given.get("base", Arguments.base)
        self._arguments, method, settings, for_base = divide(given, names(bases.config(base)))
        # A file that cannot be used is better known before the model is loaded.
        loaded = TaskVector.load(self._arguments.vector) if self._arguments.vector is not None else None
        self._base = bases.build(base, for_base)
        self._sites = find_sites(self._base.model, self._arguments.decoder)
        self._vectors = Vectors[Prompt](
            self._arguments, method, settings, self._base, self._sites, loaded, logger, ranks.current
        )
        self._pretrained = given.get("pretrained", "")

    @classmethod
    @reported
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Mtv:
        """The model that the command line describes.

        ``--batch_size`` and ``--device`` come as ``additional_config``, with defaults that cannot be told from given
        values: what is among the model arguments wins.
        """
        flags = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(**flags | simple_parse_args_string(arg_string))

    @property
    def device(self) -> Any:
        return self._base.device

    def clean(self) -> None:
        """Free the model, as the harness asks when all answers are there."""
        del self._base, self._sites, self._vectors
        super().clean()

    @reported
    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests. Each task gets its own vector, fitted when its turn comes."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(index)
        answers: dict[int, GenerationResult] = {}
        output: str | None = None
        for indices in groups.values():
            task = _task_of(requests[indices[0]])
            output = getattr(getattr(task, "args", None), "output_path", None)
            answers |= self._answers(task, [requests[index] for index in indices], indices, output)
        if output and self.rank == 0 and self._vectors.record:
            path = record.write(
                self._folder(output),
                {"name": self._base.name, "revision": self._base.revision, "dtype": self._base.dtype}
                | {"base": dataclasses.asdict(self._base.config), "arguments": dataclasses.asdict(self._arguments)},
                self._vectors.record,
            )
            logger.info(f"methods, vectors, heads and settings: {path}")
        return [answers[index] for index in range(len(requests))]

    @reported
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise _only_generation(requests)

    @reported
    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise _only_generation(requests)

    def _answers(
        self, task: Any, requests: Sequence[Instance], indices: Sequence[int], output: str | None
    ) -> dict[int, GenerationResult]:
        prompts = TaskPrompts(task, self._arguments.demonstrations)
        shots = self._shots(task)
        vector = self._vectors.of(prompts, shots, self._folder(output) if output else None)

        # Requests of a batch share their generation settings.
        by_settings: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            by_settings.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(position)

        answers: dict[int, GenerationResult] = {}
        began = time.perf_counter()
        edited = applied(self._sites, vector) if vector.edits else contextlib.nullcontext(Fired(0))
        bar = tqdm(total=len(requests), desc=f"Evaluating {prompts.name}", disable=self.rank != 0, dynamic_ncols=True)
        together = ranks.current()
        with together.together(), edited as fired, bar:

            def answered(batch: Sequence[int]) -> list[Answer]:
                before = fired.count
                args = [requests[position].args for position in batch]
                made = [prompts.evaluation(arg[3], arg[5], shots, self._arguments.seed) for arg in args]
                found = self._base.generate(made, args[0][2])
                if vector.edits and fired.count == before:
                    raise HookError(
                        "the edit never ran while the base generated, so that the answers are those of the plain "
                        "model: pass decoder= with the module that its forward calls"
                    )
                return found

            size = self._base.batch_size.copy()
            for batch, found in (part for same in by_settings.values() for part in size.over(same, answered)):
                bar.update(len(batch))
                for position, answer in zip(batch, found, strict=True):
                    request = requests[position]
                    self.cache_hook.add_partial("generate_until", request.args[:1] + request.args[2:3], answer.text)
                    counts = TokenCounts(input_tokens=answer.input_tokens, output_tokens=answer.output_tokens)
                    answers[indices[position]] = GenerationResult(answer.text, counts)
        counted = [answer.token_counts for answer in answers.values()]
        tokens = [[1, counts.input_tokens, counts.output_tokens] for counts in counted]
        count, taken, given = together.total(torch.tensor(tokens, dtype=torch.float64).sum(0)).tolist()
        self._vectors.record[prompts.name]["evaluation"] = {
            "requests": int(count),
            "seconds": time.perf_counter() - began,
            "input_tokens": taken / count,
            "output_tokens": given / count,
        }
        return answers

    def _folder(self, output: str) -> Path:
        """The folder into which the harness writes the results of this run."""
        return Path(output, sanitize_model_name(self._pretrained))

    def _shots(self, task: Any) -> int:
        asked, of_harness = self._arguments.shots, task.config.num_fewshot or 0
        if asked is not None and of_harness not in (0, asked):
            # A task file can say so too, and that cannot be told from the command line.
            logger.warning(f"shots={asked} is used, not the {of_harness} of --num_fewshot or of the task file")
        return of_harness if asked is None else asked


def _task_of(request: Instance) -> Any:
    """The harness's task behind a request: the owner of its bound ``doc_to_messages``."""
    task = getattr(request.args[1], "__self__", None)
    if not isinstance(task, Task):
        raise _only_generation([request])
    return task


def _only_generation(requests: Sequence[Instance]) -> DataError:
    found = sorted({f"{request.task_name} ({request.request_type})" for request in requests})
    return DataError(f"mtv runs tasks with output_type generate_until in lmms-eval, found {', '.join(found)}")
