"""The evaluation of one task: the requests are answered in batches, with the vector of the task applied."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Final

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from lmms_mtv.data.pictures import UNREADABLE
from lmms_mtv.errors import DocumentError, HookError, MtvError
from lmms_mtv.harness.lmms.bases import Base
from lmms_mtv.harness.lmms.requests import batch_order, document_of, groups_of_equal_settings, settings_of
from lmms_mtv.harness.lmms.task import TaskPrompts
from lmms_mtv.harness.record import EvaluationRecord
from lmms_mtv.hooks import Fired, Watch, applied, watched
from lmms_mtv.models.prompts import Prompt
from lmms_mtv.models.text import one_line
from lmms_mtv.models.trial import mend_endless
from lmms_mtv.runtime import distributed
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.runtime.memory import peak
from lmms_mtv.vectors import TaskVector

_FEW_TOKENS: Final = 4
"""Smallest limit of an answer's tokens at which a cut-off answer is a sign of a bad vector."""

_LISTED: Final = 5
"""The number of unreadable documents that the log lists one by one."""


class TaskEvaluation:
    """The evaluation of one task.

    Args:
        harness: the model that lmms-eval knows, with its rank and its cache of answers.
        base: the base that answers.
        prompts: the prompts of the task.
        vector: the vector of the task.
        shots: demonstrations in a prompt.
        seed: the seed of the demonstrations.
        as_sent: True if the base answers the harness's own requests, instead of prompts that are made of the requests.
        keeps_texts: True keeps the texts of prompts.

    Attributes:
        texts: the text of each prompt that was made of a request, by the number of the document.
    """

    def __init__(
        self,
        harness: lmms,
        base: Base,
        prompts: TaskPrompts,
        vector: TaskVector,
        *,
        shots: int,
        seed: int,
        as_sent: bool,
        keeps_texts: bool = False,
    ) -> None:
        self._harness = harness
        self._base = base
        self._prompts = prompts
        self._vector = vector
        self._shots = shots
        self._seed = seed
        # A model of lmms-eval gets all of the harness's own requests at once, and makes its own batches.
        self._direct = base.harness_model if as_sent else None
        # The reasons why documents could not be shown, by the number of the document.
        self._unreadable: dict[int, Exception] = {}
        self._keeps_texts = keeps_texts
        self.texts: dict[int, str] = {}

    def run(self, requests: Sequence[Instance]) -> tuple[list[GenerationResult], EvaluationRecord]:
        """Return the answers in the order of the requests, and the figures of the evaluation.

        Raises:
            HookError: the edit did not run in every forward.
            DocumentError: no document could be shown.
        """
        direct, base = self._direct is not None, self._base
        groups = [range(len(requests))] if direct else groups_of_equal_settings(requests)
        size = BatchSize(len(requests)) if direct else base.batch_size.copy()
        edited = applied(base.sites, self._vector) if self._vector.edits else contextlib.nullcontext(Fired(0))
        bar = tqdm(
            total=len(requests),
            desc=f"Evaluating {self._prompts.name}",
            disable=direct or self._harness.rank != 0,
            dynamic_ncols=True,
        )
        answers: dict[int, GenerationResult] = {}
        input_tokens = 0
        began = time.perf_counter()
        with (
            distributed.current().raise_together(),
            edited as fired,
            watched(base.model, base.sites) as watch,
            peak(base.device) as memory,
            bar,
        ):

            def answer(positions: Sequence[int]) -> tuple[list[GenerationResult], int]:
                batch = [requests[position] for position in positions]
                results = self._answer(batch)
                self._check_edited(batch, fired, watch)
                return results

            for group in groups:
                order = group if direct else batch_order(requests, group)
                for positions, (results, tokens) in size.run_batches(order, answer):
                    bar.update(len(positions))
                    input_tokens += tokens
                    for position, result in zip(positions, results, strict=True):
                        answers[position] = result
                        if not direct:
                            self._cache(requests[position], result)
        ordered = [answers[position] for position in range(len(requests))]
        record = self._record(requests, ordered, input_tokens, watch, began, memory.bytes)
        return ordered, record

    def _answer(self, batch: Sequence[Instance]) -> tuple[list[GenerationResult], int]:
        """Return the answers to a batch and the number of tokens, with empty answers for unreadable documents."""
        if self._base.harness_model is not None:
            self._base.harness_model.share(self._harness)
        if self._direct is not None:
            return self._generate(batch, ())
        prompts = [self._prompt(request) for request in batch]
        readable = [(request, prompt) for request, prompt in zip(batch, prompts, strict=True) if prompt is not None]
        results, tokens = self._generate(*zip(*readable, strict=True)) if readable else ([], 0)
        remaining = iter(results)
        return [GenerationResult("") if prompt is None else next(remaining) for prompt in prompts], tokens

    def _prompt(self, request: Instance) -> Prompt | None:
        """Return the prompt of a request, or None if the document cannot be shown."""
        number, split = document_of(request)
        try:
            prompt = self._prompts.evaluation(number, split, self._shots, self._seed)
        except DocumentError as error:
            self._unreadable[number] = error
            return None
        if self._keeps_texts:
            self.texts[number] = self._base.rendered(prompt)
        return prompt

    def _generate(self, batch: Sequence[Instance], prompts: Sequence[Prompt]) -> tuple[list[GenerationResult], int]:
        """Return the answers to a batch and the number of tokens; an unreadable document costs no other answer."""
        edited = bool(self._vector.edits)
        try:
            if self._direct is not None:
                return self._direct.answers(batch, self._harness.cache_hook, edited)
            return self._base.generate(prompts, settings_of(batch[0]), edited)
        except (DocumentError, ValueError, *UNREADABLE) as error:
            # The base hf marks errors of a document. A base of lmms-eval reads documents itself.
            if not isinstance(error, DocumentError) and (self._direct is None or isinstance(error, MtvError)):
                raise
            if len(batch) == 1:
                self._unreadable[document_of(batch[0])[0]] = error
                return [GenerationResult("")], 0
        half = len(batch) // 2
        parts = [self._generate(batch[part], prompts[part]) for part in (slice(half), slice(half, None))]
        return [answer for answers, _ in parts for answer in answers], sum(tokens for _, tokens in parts)

    def _check_edited(self, batch: Sequence[Instance], fired: Fired, watch: Watch) -> None:
        """Check that the edit ran in every forward.

        Raises:
            HookError: the edit did not run in every forward.
        """
        readable = any(document_of(request)[0] not in self._unreadable for request in batch)
        if self._vector.edits and (fired.count != watch.forwards or (readable and not fired.count)):
            raise HookError(
                f"the edit ran in {fired.count} of {watch.forwards} forwards while the base generated, so that "
                "answers are partly or wholly those of the plain model: pass decoder= with the module that its "
                "forward calls"
            )

    def _cache(self, request: Instance, result: GenerationResult) -> None:
        """Add an answer to the harness's cache of answers."""
        self._harness.cache_hook.add_partial("generate_until", (request.args[0], settings_of(request)), result.text)

    def _record(
        self,
        requests: Sequence[Instance],
        answers: Sequence[GenerationResult],
        input_tokens: int,
        watch: Watch,
        began: float,
        memory: int | None,
    ) -> EvaluationRecord:
        """Return the figures of the evaluation, summed over all processes, and log warnings of bad answers.

        Raises:
            DocumentError: no document could be shown.
        """
        counts = [answer.token_counts.output_tokens for answer in answers if answer.token_counts is not None]
        lengths = [count for count in counts if count is not None]
        settings = settings_of(requests[0])
        limit = int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or 0)
        cut_off = sum(length >= limit for length in lengths) if limit else 0
        own = [len(answers), input_tokens, len(lengths), sum(lengths), len(self._unreadable), cut_off]
        total, all_input, counted, all_output, unreadable, all_cut_off = (
            distributed.current().all_reduce(torch.tensor(own, dtype=torch.float64)).tolist()
        )
        name = self._prompts.name
        if unreadable == total:
            raise next(iter(self._unreadable.values()), DocumentError(f"no document of task {name} could be shown"))
        self._warn_of_unreadable(len(requests))
        if self._vector.edits and limit >= _FEW_TOKENS and all_cut_off > counted / 2 and self._harness.rank == 0:
            logger.warning(
                f"{int(all_cut_off)} of {int(counted)} answers to task {name} reach max_new_tokens={limit}: the vector "
                f"may not have learned where an answer ends, {mend_endless(self._vector.card)}"
            )
        return EvaluationRecord(
            requests=int(total),
            unreadable=int(unreadable),
            cut_off=int(all_cut_off),
            seconds=time.perf_counter() - began,
            input_tokens=all_input / total,
            image_tokens=watch.images / watch.prompts if watch.images is not None and watch.prompts else None,
            bytes=memory,
            output_tokens=all_output / counted if counted else None,
        )

    def _warn_of_unreadable(self, total: int) -> None:
        """Warn of documents that could not be shown."""
        if not self._unreadable:
            return
        name = self._prompts.name
        for number, reason in sorted(self._unreadable.items())[:_LISTED]:
            logger.warning(f"document {number} of task {name} is answered with nothing: {one_line(reason, 2000)}")
        logger.warning(
            f"{len(self._unreadable)} of {total} documents of task {name} could not be shown to the model and count as "
            "wrong in its score"
        )
