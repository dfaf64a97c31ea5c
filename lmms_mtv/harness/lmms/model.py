"""The lmms-eval model ``mtv``: it fits a task vector for each task, then evaluates with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import Task
from lmms_eval.utils import sanitize_model_name, simple_parse_args_string
from loguru import logger
from tqdm import tqdm

from lmms_mtv.data.pictures import UNREADABLE
from lmms_mtv.errors import ArgumentError, DataError, DocumentError, HookError, MtvError
from lmms_mtv.harness import record
from lmms_mtv.harness.arguments import Arguments, as_written, split_arguments, validate
from lmms_mtv.harness.lmms import bases
from lmms_mtv.harness.lmms.bases.hf import HfBase, one_line
from lmms_mtv.harness.lmms.bases.wrapped import WrapperBase
from lmms_mtv.harness.lmms.failure import caches_answers, fail_with_status
from lmms_mtv.harness.lmms.task import TaskPrompts, as_loaded_for, asked
from lmms_mtv.harness.prompts import Prompt
from lmms_mtv.harness.provider import TaskVectorProvider
from lmms_mtv.harness.record import EvaluationRecord, ModelRecord, TaskRecord
from lmms_mtv.hooks import Fired, Sites, applied, watched
from lmms_mtv.methods import Method
from lmms_mtv.runtime import distributed
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.runtime.memory import peak
from lmms_mtv.vectors import TaskVector

_LONG_ENOUGH: Final = 4
"""Tokens that an answer may have at least, where one that is cut off is a sign."""

_NAMED: Final = 5
"""Documents that could not be shown, named one by one in the log."""


class LmmsEvalMtv(lmms):  # type: ignore[misc]
    """MTV, its controls and its baselines as one model of the harness.

    See :class:`~lmms_mtv.harness.arguments.Arguments` for its arguments; those of the method and of the base are
    given beside them.
    """

    is_simple = False

    def __init__(self, **given: Any) -> None:
        super().__init__()
        base = given.get("base", Arguments.base)
        known = bases.known(base, bool(given.get("force_simple", False)))
        arguments, method, settings, for_base = split_arguments(given, known)
        validate(arguments)
        self._given, self._known = given, known
        self._pretrained = given.get("pretrained", "")
        built = bases.build(base, for_base, arguments.decoder)
        self._begin(arguments, method, settings, *built)

    def _begin(
        self, arguments: Arguments, method: Method, settings: dict[str, Any], base: HfBase | WrapperBase, sites: Sites
    ) -> None:
        self._arguments, self._base, self._sites = arguments, base, sites
        if isinstance(base, WrapperBase):
            # The harness asks as it asks the base: a simple one with a text and its images, a chat one with messages.
            self.is_simple = base.is_simple
            base.share(self)
        self.vectors: dict[str, TaskVector] = {}
        self.records: dict[str, TaskRecord] = {}
        self._provider = TaskVectorProvider[Prompt](
            arguments, method, settings, base, sites, logger, distributed.current
        )
        # Digests of the prompts by document, for each task; filled where somebody wants to compare them.
        self.prompts: dict[str, dict[int, str]] | None = None

    def arm(self, given: Mapping[str, Any]) -> LmmsEvalMtv:
        """Return the same loaded model under other arguments of the plugin or of a method, beside those it was made
        with.

        Raises :class:`ArgumentError` for an argument of the base, which is loaded already, or an unknown one.
        """
        arguments, method, settings, _ = self._split(given)
        arm = LmmsEvalMtv.__new__(LmmsEvalMtv)
        super(LmmsEvalMtv, arm).__init__()
        arm._given, arm._known, arm._pretrained = {**self._given, **given}, self._known, self._pretrained
        validate(arguments)
        arm._begin(arguments, method, settings, self._base, self._sites)
        return arm

    @property
    def base(self) -> HfBase | WrapperBase:
        """The loaded model."""
        return self._base

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise :class:`ArgumentError` unless :meth:`arm` could be made with ``given``."""
        self._split(given)

    def _split(self, given: Mapping[str, Any]) -> tuple[Arguments, Method, dict[str, Any], dict[str, Any]]:
        """Return what :func:`split_arguments` makes of ``given`` beside the arguments that this model was made with."""
        if fixed := sorted(key for key in given if key in self._known or key in ("base", "decoder")):
            raise ArgumentError(f"{', '.join(fixed)}: one model is loaded for all arms, so this belongs to the model")
        return split_arguments({**self._given, **given}, self._known)

    def fit(self, task: Any) -> TaskVector:
        """Return the vector of a task of the harness, fitted or reused, without evaluating."""
        vector, _ = self._provider.of(self._prompts(task), self._shots(task), None)
        return vector

    def _prompts(self, task: Any) -> TaskPrompts:
        wrapped, given = isinstance(self._base, WrapperBase), self._arguments
        return TaskPrompts(task, given.demonstrations, as_sent=wrapped, wrong=given.wrong, seed=given.seed)

    @classmethod
    @fail_with_status
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LmmsEvalMtv:
        """Return the model that the command line describes.

        ``--batch_size`` and ``--device`` come as ``additional_config``, with defaults that cannot be told from given
        values: what is among the model arguments wins.
        """
        flags = {key: value for key, value in (additional_config or {}).items() if value is not None}
        made = cls(**flags | as_written(simple_parse_args_string(arg_string), arg_string))
        made._check_uncached()
        return made

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision and dtype of the loaded model, as records and cells have them."""
        return {"name": self._base.name, "revision": self._base.revision, "dtype": self._base.dtype}

    def _check_uncached(self) -> None:
        if self.edits and caches_answers():
            raise ArgumentError(
                "--use_cache knows a model by the text of its arguments, and would give the answers of another vector "
                "or of other training examples for those of this run: leave it out (fitted vectors are kept in the "
                "library)"
            )

    @property
    def edits(self) -> bool:
        """Whether answers are those of an edited model."""
        return self._arguments.vector is not None or self._arguments.method != "none"

    @property
    def device(self) -> Any:
        return self._base.device

    def clean(self) -> None:
        """Free the model, as the harness asks when all answers are there."""
        del self._base, self._sites, self._provider
        super().clean()

    @fail_with_status
    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Return answers in the order of the requests. Each task gets its own vector, fitted when its turn comes."""
        self._check_uncached()
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(index)
        answers: dict[int, GenerationResult] = {}
        output: str | None = None
        for indices in groups.values():
            task = _task_of(requests[indices[0]])
            output = getattr(getattr(task, "args", None), "output_path", None)
            answers |= self._answers(task, [requests[index] for index in indices], indices, output)
        if output and self.rank == 0 and self.records:
            model = ModelRecord(
                **self.identity,
                skipped=list(self._sites.skipped),
                base=dataclasses.asdict(self._base.config),
                arguments=dataclasses.asdict(self._arguments),
            )
            try:
                path = record.write(self._folder(output), model, self.records)
                logger.info(f"methods, vectors, heads and settings: {path}")
            except OSError as error:
                # The answers are there, and the harness still shows their scores.
                logger.error(f"the record of this run is not written ({error}): choose another --output_path")
        return [answers[index] for index in range(len(requests))]

    @fail_with_status
    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise _only_generation(requests)

    @fail_with_status
    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise _only_generation(requests)

    def _answers(
        self, task: Any, requests: Sequence[Instance], indices: Sequence[int], output: str | None
    ) -> dict[int, GenerationResult]:
        if isinstance(self._base, WrapperBase) and (own := as_loaded_for(task, self._base.config.name)) is not task:
            task, requests = own, asked(own, requests)
        prompts = self._prompts(task)
        shots = self._shots(task)
        vector, task_record = self._provider.of(prompts, shots, self._folder(output) if output else None)

        # An lmms-eval model gets the harness's own requests at once, and makes its own batches of them.
        as_sent = isinstance(self._base, WrapperBase) and not shots and not task.config.num_fewshot
        groups = [range(len(requests))] if as_sent else _alike(requests)
        size = BatchSize(len(requests)) if as_sent else self._base.batch_size.copy()
        answers: dict[int, GenerationResult] = {}
        # Why a document, by its number, could not be shown.
        unreadable: dict[int, Exception] = {}
        input_tokens = 0
        edited = applied(self._sites, vector) if vector.edits else contextlib.nullcontext(Fired(0))
        quiet = as_sent or self.rank != 0
        bar = tqdm(total=len(requests), desc=f"Evaluating {prompts.name}", disable=quiet, dynamic_ncols=True)
        together = distributed.current()
        if self.prompts is not None:
            asked_for = (_document(request) for request in requests)
            self.prompts[prompts.name] = {
                number: _digest(prompts, number, split, shots, self._arguments.seed) for number, split in asked_for
            }
        began = time.perf_counter()
        with (
            together.raise_together(),
            edited as fired,
            watched(self._base.model, self._sites) as watch,
            peak(self._base.device) as memory,
            bar,
        ):

            def shown(request: Instance) -> Prompt | None:
                """Return the prompt of a request; None if its document cannot be shown."""
                try:
                    return prompts.evaluation(*_document(request), shots, self._arguments.seed)
                except DocumentError as error:
                    unreadable[_document(request)[0]] = error
                    return None

            def generated(ours: Sequence[Instance], made: Sequence[Prompt]) -> tuple[list[GenerationResult], int]:
                """Return answers to prompts; what cannot be shown costs no other document its answer."""
                try:
                    if isinstance(self._base, WrapperBase) and as_sent:
                        return self._base.answers(ours, self.cache_hook, edited=bool(vector.edits))
                    return self._base.generate(made, _settings(ours[0]), edited=bool(vector.edits))
                except (DocumentError, ValueError, *UNREADABLE) as error:
                    # Our own base says which errors are of a document; a base of lmms-eval reads documents itself.
                    if not isinstance(error, DocumentError) and (not as_sent or isinstance(error, MtvError)):
                        raise
                    if len(ours) == 1:
                        unreadable[_document(ours[0])[0]] = error
                        return [GenerationResult("")], 0
                half = len(ours) // 2
                parts = [generated(ours[part], made[part]) for part in (slice(half), slice(half, None))]
                return [answer for answers, _ in parts for answer in answers], sum(tokens for _, tokens in parts)

            def answered(batch: Sequence[int]) -> tuple[list[GenerationResult], int]:
                ours = [requests[position] for position in batch]
                if isinstance(self._base, WrapperBase):
                    self._base.share(self)
                if as_sent:
                    found = generated(ours, ())
                else:
                    pairs = [(request, shown(request)) for request in ours]
                    showing = [(request, prompt) for request, prompt in pairs if prompt is not None]
                    given, tokens = generated(*zip(*showing, strict=True)) if showing else ([], 0)
                    answers_of = iter(given)
                    found = [GenerationResult("") if p is None else next(answers_of) for _, p in pairs], tokens
                able = any(_document(request)[0] not in unreadable for request in ours)
                if vector.edits and (fired.count != watch.forwards or (able and not fired.count)):
                    raise HookError(
                        f"the edit ran in {fired.count} of {watch.forwards} forwards while the base generated, so that "
                        "answers are partly or wholly those of the plain model: pass decoder= with the module that its "
                        "forward calls"
                    )
                return found

            for batch, (given, tokens) in (part for group in groups for part in size.run_batches(group, answered)):
                bar.update(len(batch))
                input_tokens += tokens
                for position, answer in zip(batch, given, strict=True):
                    if not as_sent:
                        request = requests[position]
                        self.cache_hook.add_partial(
                            "generate_until", (request.args[0], _settings(request)), answer.text
                        )
                    answers[indices[position]] = answer
        counted = [answer.token_counts.output_tokens for answer in answers.values() if answer.token_counts is not None]
        made = [count for count in counted if count is not None]
        limit = int(_settings(requests[0]).get("max_new_tokens") or _settings(requests[0]).get("max_gen_toks") or 0)
        cut = sum(count >= limit for count in made) if limit else 0
        sums = [len(answers), input_tokens, len(made), sum(made), len(unreadable), cut]
        count, taken, told, written, lost, endless = together.all_reduce(
            torch.tensor(sums, dtype=torch.float64)
        ).tolist()
        if lost == count:
            raise next(iter(unreadable.values()), DocumentError(f"no document of task {prompts.name} could be shown"))
        self._tell_of(unreadable, prompts.name, len(requests))
        if vector.edits and limit >= _LONG_ENOUGH and endless > told / 2 and self.rank == 0:
            logger.warning(
                f"{int(endless)} of {int(told)} answers to task {prompts.name} reach max_new_tokens={limit}: a vector "
                "that did not learn where an answer ends runs on (fit it with loss=all, or with another method=)"
            )
        evaluation = EvaluationRecord(
            requests=int(count),
            unreadable=int(lost),
            cut_off=int(endless),
            seconds=time.perf_counter() - began,
            input_tokens=taken / count,
            image_tokens=watch.images / watch.prompts if watch.images is not None and watch.prompts else None,
            bytes=memory.bytes,
            output_tokens=written / told if told else None,
        )
        self.vectors[prompts.name] = vector
        self.records[prompts.name] = dataclasses.replace(task_record, evaluation=evaluation)
        return answers

    @staticmethod
    def _tell_of(unreadable: Mapping[int, Exception], task: str, total: int) -> None:
        """Name documents that could not be shown, where others could."""
        if not unreadable:
            return
        for number, reason in list(unreadable.items())[:_NAMED]:
            logger.warning(f"document {number} of task {task} is answered with nothing: {one_line(reason, 2000)}")
        logger.warning(
            f"{len(unreadable)} of {total} documents of task {task} could not be shown to the model and count as wrong "
            "in its score"
        )

    def _folder(self, output: str) -> Path:
        """Return the folder into which the harness writes the results of this run."""
        return Path(output, sanitize_model_name(self._pretrained))

    def _shots(self, task: Any) -> int:
        asked, of_harness = self._arguments.shots, task.config.num_fewshot or 0
        if asked is not None and of_harness not in (0, asked):
            # A task file can say so too, and that cannot be told from the command line.
            logger.warning(f"shots={asked} is used, not the {of_harness} of --num_fewshot or of the task file")
        return of_harness if asked is None else asked


def _digest(prompts: TaskPrompts, number: int, split: str, shots: int, seed: int) -> str:
    try:
        return prompts.evaluation(number, split, shots, seed).digest()
    except DocumentError:
        return "unreadable"


def _alike(requests: Sequence[Instance]) -> list[list[int]]:
    """Return positions of requests that share their generation settings, as those of a batch have to."""
    found: dict[str, list[int]] = {}
    for position, request in enumerate(requests):
        found.setdefault(json.dumps(_settings(request), sort_keys=True, default=str), []).append(position)
    return list(found.values())


def _task_of(request: Instance) -> Any:
    """Return the harness's task behind a request: the owner of its bound ``doc_to_messages`` or ``doc_to_visual``."""
    for argument in request.args[1:3]:
        if isinstance(task := getattr(argument, "__self__", None), Task):
            return task
    raise _only_generation([request])


def _settings(request: Instance) -> dict[str, Any]:
    """Return the generation settings of a request: before its images for a simple model, after its messages for a chat
    one.
    """
    settings: dict[str, Any] = next(argument for argument in request.args[1:3] if isinstance(argument, dict))
    return settings


def _document(request: Instance) -> tuple[int, str]:
    """Return number and split of the document that a request is about."""
    return request.args[3], request.args[5]


def _only_generation(requests: Sequence[Instance]) -> DataError:
    found = sorted({f"{request.task_name} ({request.request_type})" for request in requests})
    return DataError(f"mtv runs tasks with output_type generate_until in lmms-eval, found {', '.join(found)}")
