"""The lm-eval model ``mtv``: the library's ``hf`` model with a task vector fitted for each task."""

from __future__ import annotations

import copy
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from lmms_mtv.errors import ArgumentError
from lmms_mtv.harness import record
from lmms_mtv.harness.arguments import SplitArguments, near_argument, validate, with_text_restored
from lmms_mtv.harness.lm.arguments import split_lm_eval_arguments
from lmms_mtv.harness.lm.edited import EditedHFLM
from lmms_mtv.harness.lm.evaluation import Evaluation, current
from lmms_mtv.harness.lm.runner import LmRunner
from lmms_mtv.harness.lm.task import LmPrompt, LmPrompts, Turns
from lmms_mtv.harness.provider import TaskVectorProvider
from lmms_mtv.harness.record import TaskRecord, UneditedRecord
from lmms_mtv.harness.summary import result_line
from lmms_mtv.harness.tracking import log_fit
from lmms_mtv.hooks import find_sites
from lmms_mtv.models import gguf
from lmms_mtv.models.text import one_line
from lmms_mtv.runtime.attention import check_attention
from lmms_mtv.runtime.compat import unwrapped
from lmms_mtv.runtime.environment import versions
from lmms_mtv.runtime.memory import peak
from lmms_mtv.runtime.threads import limit_threads
from lmms_mtv.vectors import TaskVector

# A child of the harness's logger: its command line shows only such loggers.
logger = logging.getLogger("lm_eval.mtv")

NAME: Final = "mtv"
"""The model's name in lm-eval."""

_CACHE_OWNER: Final = "lmms-mtv"
"""Key of the entry in a cache of answers that names the owner of the answers."""

A = TypeVar("A")


@dataclass(frozen=True)
class Cost:
    """The cost of an evaluation.

    Attributes:
        seconds: time of the evaluation, in seconds.
        bytes: peak memory in bytes; None if unknown.
    """

    seconds: float
    bytes: int | None


@register_model(NAME)
class LmEvalMtv(EditedHFLM):
    """MTV and its controls on lm-eval's ``hf`` model. With ``method=none`` the model is ``hf`` itself.

    Attributes:
        records: the record of each task, by the name of the task.
        costs: seconds and memory of the evaluation of each task, without the fit, by the name of the task.
        hf_arguments: the arguments of ``hf``.

    Args:
        evaluation: the evaluation that the model takes part in; the command ``lmms-mtv lm-eval`` passes it.
        model_args: model arguments by name: arguments of ``hf`` and of the method, and the arguments in
            :class:`~lmms_mtv.harness.arguments.Arguments` except ``base``, ``shots`` and ``wrong``.

    Raises:
        ArgumentError: an argument is unknown, the model cannot be loaded, or its heads cannot be edited.
    """

    def __init__(self, evaluation: Evaluation | None = None, **model_args: Any) -> None:
        parts = split_lm_eval_arguments(model_args)
        validate(parts.plugin)
        for_base = dict(parts.base)
        source, file = gguf.located(str(for_base["pretrained"]), for_base.get("gguf_file"))
        if file is not None:
            for_base |= {"pretrained": source, "gguf_file": file}
        self.hf_arguments = for_base
        self._evaluation = evaluation
        try:
            super().__init__(**for_base)
        except (OSError, ValueError, KeyError) as error:
            name = str(for_base["pretrained"])
            hint = near_argument(name, gguf.PACKAGED)
            raise ArgumentError(f"pretrained={name} cannot be loaded:{hint} {one_line(error)}") from error
        check_attention(unwrapped(self.model))
        if (line := limit_threads(self.model)) is not None:
            logger.info(line)
        self._configure(parts)

    def _configure(self, parts: SplitArguments) -> None:
        """Set everything that depends on the method and on the arguments of the plugin."""
        self._arguments = parts.plugin
        self._plain = parts.plugin.vector is None and parts.method.name == "none"
        self._edit, self._expected = None, deque()
        self._fitted: dict[tuple[str, int], tuple[LmPrompts, TaskVector]] = {}
        self.records: dict[str, TaskRecord | UneditedRecord] = {}
        self.costs: dict[str, Cost] = {}
        if self._plain:
            return
        if self.backend != "causal":
            raise ArgumentError(
                f"{self.pretrained} is an encoder-decoder model (backend={self.backend}), whose heads mtv does not "
                "edit: use method=none"
            )
        self._sites = find_sites(unwrapped(self.model), parts.plugin.decoder)
        self._provider = TaskVectorProvider[LmPrompt](
            parts.plugin,
            parts.method,
            parts.settings,
            LmRunner(self, self.hf_arguments),
            self._sites,
            logger,
        )

    def arm(self, evaluation: Evaluation, model_args: Mapping[str, Any]) -> LmEvalMtv:
        """Return the same loaded model in another evaluation, with other arguments of the plugin and of a method.

        Args:
            evaluation: the evaluation.
            model_args: model arguments by name, without those of ``hf``.

        Raises:
            ArgumentError: an argument is unknown or wrong.
        """
        parts = split_lm_eval_arguments({"pretrained": self.hf_arguments["pretrained"], **model_args})
        validate(parts.plugin)
        arm = copy.copy(self)
        arm._evaluation = evaluation
        arm._configure(parts)
        return arm

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision and dtype of the loaded model, as in cells."""
        runner = LmRunner(self, self.hf_arguments)
        return {"name": runner.name, "revision": runner.revision, "dtype": runner.dtype}

    def vector_of(self, task: str) -> TaskVector | None:
        """Return the vector that a task was last evaluated with; None without one."""
        return next((vector for (name, _), (_, vector) in reversed(self._fitted.items()) if name == task), None)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LmEvalMtv:
        """Return the model that the command line describes. Model arguments win over flags."""
        flags = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(current(), **flags | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LmEvalMtv:
        """Return the model that the arguments in a string describe.

        Args:
            arg_string: the model arguments, ``name=value,name=value``.
            additional_config: flags of the command line; model arguments win over flags.
        """
        return cls.create_from_arg_obj(
            with_text_restored(simple_parse_args_string(arg_string), arg_string), additional_config
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations, edited at each position that predicts a scored token."""
        return self._by_task(requests, super().loglikelihood, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts, edited at every position: all positions predict scored tokens."""
        return self._by_task(requests, super().loglikelihood_rolling, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return answers, edited at the last token of the prompt and at every generated token."""
        return self._by_task(requests, super().generate_until, disable_tqdm)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Cache answers only in a file of this model, method and vector.

        lm-eval caches answers by their prompts alone. An entry of this package in the file names the owner of the
        answers.

        Raises:
            ArgumentError: the file has answers of another run.
        """
        if (cached := cache_hook.dbdict) is not None:
            own = None if self._plain else self._provider.identity
            owner = cached.get(_CACHE_OWNER)
            if owner != own and (len(cached) > 0 or owner is not None):
                raise ArgumentError(
                    "--use_cache names a file with the answers of another model, method, seed or vector, which it "
                    "would give for this one: name another file, or delete that one"
                )
            if own is not None:
                cached[_CACHE_OWNER] = own
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """Return the library's entries of the results, and an entry ``mtv``. The log gets a line about each task.

        The entry ``mtv`` has method, vector, heads and settings of each task. ``skipped`` in this entry lists the
        blocks without softmax attention, or is None without edits, when no block is inspected.
        """
        skipped = None if self._plain else list(self._sites.skipped)
        tasks = {name: record.as_json(task_record) for name, task_record in self.records.items()}
        folder = None if self._evaluation is None else self._evaluation.folder
        for (name, _), (_, vector) in self._fitted.items():
            if isinstance(task_record := self.records[name], TaskRecord):
                logger.info(result_line(name, vector, task_record, folder))
        info: dict[str, Any] = super().get_model_info()
        return info | {"mtv": {"versions": versions(), "skipped": skipped, "tasks": tasks}}

    def finished(self, chat_history: Turns) -> str:
        """Return a conversation as text, with its last turn ended. Drop system turns if the template has none."""

        def as_text(turns: Turns) -> str:
            options = {"tokenize": False, "add_generation_prompt": False, **self.chat_template_args}
            text: str = self.tokenizer.apply_chat_template(turns, **options)
            return text

        try:
            return as_text(chat_history)
        except jinja2.exceptions.TemplateError:
            return as_text([turn for turn in chat_history if turn["role"] != "system"])

    def _by_task(
        self, requests: list[Instance], answer: Callable[[list[Instance], bool], list[A]], disable_tqdm: bool
    ) -> list[A]:
        """Return answers in the order of the requests, each task with its own vector."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(index)
        if self._plain:
            for name in groups:
                self.records[name] = UneditedRecord()
            with self._watching(groups):
                return answer(requests, disable_tqdm)
        self._refuse_ambiguous_cache(requests)
        answers: dict[int, A] = {}
        for name, indices in groups.items():
            own = [requests[index] for index in indices]
            with self.editing(self._vector(name, own)), self._watching([name]):
                answers |= dict(zip(indices, answer(own, disable_tqdm), strict=True))
        return [answers[index] for index in range(len(requests))]

    @contextmanager
    def _watching(self, tasks: Iterable[str]) -> Iterator[None]:
        """Measure the cost of the block. Tasks that are answered together, unedited, share the cost of all."""
        began = time.perf_counter()
        with peak(self.device) as memory:
            yield
        seconds = time.perf_counter() - began
        for task in tasks:
            before = self.costs.get(task, Cost(0.0, None))
            self.costs[task] = Cost(
                before.seconds + seconds, max(filter(None, (before.bytes, memory.bytes)), default=None)
            )

    def _refuse_ambiguous_cache(self, requests: Sequence[Instance]) -> None:
        if self.cache_hook.dbdict is None:
            return
        task_of_request: dict[str, str] = {}
        for request in requests:
            other = task_of_request.setdefault(repr(request.args), request.task_name)
            if other != request.task_name:
                raise ArgumentError(
                    f"tasks {other} and {request.task_name} ask the same, and --use_cache would give one the answers "
                    "of the other: leave it out, or evaluate them apart with a file each"
                )

    def _vector(self, name: str, requests: Sequence[Instance]) -> TaskVector:
        if self._evaluation is None:
            raise ArgumentError(
                f"mtv does not know how task {name} writes its prompts: start the evaluation with lmms-mtv lm-eval, "
                "or pass evaluation=Evaluation(...) to the model"
            )
        prompts = LmPrompts(self._evaluation.task(name), self._arguments.demonstrations, self._evaluation, self)
        prompts.check(requests)
        known, vector = self._fitted.get((name, prompts.shots), (None, None))
        if vector is None or known is None or not known.same(prompts):
            device = self.device.type
            with torch.autocast(device, self.mixed_precision_dtype, enabled=self.mixed_precision_dtype is not None):
                vector, self.records[name] = self._provider.of(prompts, prompts.shots, self._evaluation.folder)
            self._fitted[name, prompts.shots] = prompts, vector
            if self.rank == 0:
                for tracker in self._evaluation.trackers:
                    log_fit(tracker, name, vector)
        return vector
