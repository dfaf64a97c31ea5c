"""The lm-eval model ``mtv``: the library's ``hf`` model with a task vector fitted for each task."""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple, TypeVar

import jinja2
import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string
from torch import Tensor

from lmms_mtv.errors import ArgumentError, ContextLengthError, HookError
from lmms_mtv.harness import gguf, record
from lmms_mtv.harness.arguments import (
    Arguments,
    SplitArguments,
    field_names,
    split_arguments,
    validate,
    with_text_restored,
)
from lmms_mtv.harness.checkpoint import adapter_of, identity, text_files_of
from lmms_mtv.harness.generation import GREEDY, attention_of
from lmms_mtv.harness.lm.evaluation import Evaluation, current
from lmms_mtv.harness.lm.task import LmPrompt, LmPrompts, Turns
from lmms_mtv.harness.prompts import Reply, blanks
from lmms_mtv.harness.provider import TaskVectorProvider
from lmms_mtv.harness.record import TaskRecord, UneditedRecord
from lmms_mtv.harness.text import one_line
from lmms_mtv.hooks import applied, find_sites
from lmms_mtv.runtime.batches import BatchSize
from lmms_mtv.runtime.compat import unwrapped
from lmms_mtv.vectors import TaskVector

# A child of the harness's logger: its command line shows no others.
logger = logging.getLogger("lm_eval.mtv")

NAME: Final = "mtv"
"""The model's name in lm-eval."""

_CACHE_OWNER: Final = "lmms-mtv"
"""Key of the entry in a cache of answers that says whose answers they are."""

A = TypeVar("A")
Request = tuple[Any, list[int], list[int]]
"""What lm-eval scores: the strings, the tokens of the context, the tokens of the continuation."""

_ELSEWHERE: Final = {
    "shots": "demonstrations in the prompts are the harness's own here: pass --num_fewshot",
    "wrong": "lm-eval writes the demonstrations of its prompts itself: leave it out",
    "base": "the base is lm-eval's model hf: leave it out",
}
_OWN: Final = tuple(name for name in field_names(Arguments) if name not in _ELSEWHERE)
# HFLM hands what its signature does not name to from_pretrained; of those, the ones in use.
_LOADING: Final = (
    "attn_implementation",
    "device_map",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_type",
)
# Arguments of hf that change neither tokens nor what is computed of them, or that a card has elsewhere: the weights,
# the precision, the adapter, and what shapes the text of a prompt. All others are part of a recipe.
_NOT_COMPUTING: Final = (
    *("pretrained", "gguf_file", "revision", "dtype", "peft", "delta", "tokenizer", "attn_implementation"),
    *("device", "device_map", "parallelize", "max_memory_per_gpu", "max_cpu_memory", "offload_folder", "tp_plan"),
    *("batch_size", "max_batch_size", "logits_cache", "softmax_dtype", "truncation", "trust_remote_code", "backend"),
    *("think_end_token", "enable_thinking", "chat_template_args"),
)
_BASE: Final = (
    *(name for name, p in inspect.signature(HFLM).parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD),
    *_LOADING,
)


def split_lm_eval_arguments(given: Mapping[str, Any]) -> SplitArguments:
    """Model arguments by whom they are for: see :func:`~lmms_mtv.harness.arguments.split_arguments`.

    Raises :class:`ArgumentError` for one that nobody knows or that is lm-eval's to take, or if there is no model.
    """
    for name, instead in _ELSEWHERE.items():
        if name in given:
            raise ArgumentError(f"{name}={given[name]} is no argument of mtv in lm-eval; {instead}")
    parts = split_arguments(given, _BASE, _OWN)
    if "pretrained" not in given:
        raise ArgumentError("pretrained= is missing: give the name of a model on the hub, or a folder")
    return parts


class _Row(NamedTuple):
    """A row of a forward that scores: its input tokens, and how many of the last ones predict a scored token."""

    tokens: list[int]
    scored: int


@register_model(NAME)
class LmEvalMtv(HFLM):  # type: ignore[misc]
    """MTV and its controls on lm-eval's ``hf`` model; with ``method=none`` it is that model.

    Takes the arguments of ``hf``, of the method, and :class:`~lmms_mtv.harness.arguments.Arguments` but for ``base``
    and ``shots``. ``evaluation`` is what it takes part in; the command ``lmms-mtv lm-eval`` knows.

    Raises :class:`ArgumentError` for an argument that nobody knows, a model that cannot be loaded, or one whose heads
    cannot be edited.
    """

    def __init__(self, evaluation: Evaluation | None = None, **given: Any) -> None:
        self._arguments, method, settings, for_base = split_lm_eval_arguments(given)
        validate(self._arguments)
        self._plain = self._arguments.vector is None and method.name == "none"
        source, file = gguf.located(str(for_base["pretrained"]), for_base.get("gguf_file"))
        if file is not None:
            for_base |= {"pretrained": source, "gguf_file": file}
        self.given = for_base
        self._evaluation = evaluation
        try:
            super().__init__(**for_base)
        except (OSError, ValueError, KeyError) as error:
            raise ArgumentError(f"pretrained={for_base['pretrained']} cannot be loaded: {one_line(error)}") from error
        self._edit: TaskVector | None = None
        self._expected: deque[_Row] = deque()
        self._fitted: dict[tuple[str, int], tuple[LmPrompts, TaskVector]] = {}
        self.records: dict[str, TaskRecord | UneditedRecord] = {}
        if self._plain:
            return
        if self.backend != "causal":
            raise ArgumentError(
                f"{self.pretrained} is an encoder-decoder model (backend={self.backend}), whose heads mtv does not "
                "edit: use method=none"
            )
        self._sites = find_sites(unwrapped(self.model), self._arguments.decoder)
        self._provider = TaskVectorProvider[LmPrompt](
            self._arguments, method, settings, _Runner(self), self._sites, logger
        )

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> LmEvalMtv:
        """Return the model that the command line describes. What is among the model arguments wins over flags."""
        flags = {key: value for key, value in (additional_config or {}).items() if value is not None}
        return cls(current(), **flags | arg_dict)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LmEvalMtv:
        """Return the same for arguments in one string."""
        return cls.create_from_arg_obj(
            with_text_restored(simple_parse_args_string(arg_string), arg_string), additional_config
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations; edited is each position that predicts a scored token."""
        return self._by_task(requests, super().loglikelihood, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; edited is every position, as each predicts a scored token."""
        return self._by_task(requests, super().loglikelihood_rolling, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return answers; edited are the last token of the prompt and every generated one."""
        return self._by_task(requests, super().generate_until, disable_tqdm)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Keep answers in the cache only where they are of this very model, method and vector.

        The library keeps answers under their prompts alone. An entry of ours in the file says whose they are.

        Raises :class:`ArgumentError` if the file has answers of another run.
        """
        if (kept := cache_hook.dbdict) is not None:
            own = None if self._plain else self._provider.identity
            found = kept.get(_CACHE_OWNER)
            if found != own and (len(kept) > 0 or found is not None):
                raise ArgumentError(
                    "--use_cache names a file with the answers of another model, method, seed or vector, which it "
                    "would give for this one: name another file, or delete that one"
                )
            if own is not None:
                kept[_CACHE_OWNER] = own
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """Return the library's entries of the results, and under ``mtv`` method, vector, heads and settings of each
        task.

        ``skipped`` are the blocks without softmax attention, or None without edits, when no block is looked at.
        """
        skipped = None if self._plain else list(self._sites.skipped)
        tasks = {name: record.as_json(task_record) for name, task_record in self.records.items()}
        used = {"versions": record.versions(), "skipped": skipped, "tasks": tasks}
        info: dict[str, Any] = super().get_model_info()
        return info | {"mtv": used}

    def finished(self, chat_history: Turns) -> str:
        """Return a conversation as text, its last turn ended, without a system turn where the template has none."""

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
        """Return answers in the order of the requests, each task's with its own vector."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.task_name, []).append(index)
        if self._plain:
            for name in groups:
                self.records[name] = UneditedRecord()
            return answer(requests, disable_tqdm)
        self._refuse_ambiguous_cache(requests)
        answers: dict[int, A] = {}
        for name, indices in groups.items():
            own = [requests[index] for index in indices]
            with self._editing(self._vector(name, own)):
                answers |= dict(zip(indices, answer(own, disable_tqdm), strict=True))
        return [answers[index] for index in range(len(requests))]

    def _refuse_ambiguous_cache(self, requests: Sequence[Instance]) -> None:
        if self.cache_hook.dbdict is None:
            return
        asked: dict[str, str] = {}
        for request in requests:
            other = asked.setdefault(repr(request.args), request.task_name)
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
        return vector

    @contextmanager
    def _editing(self, vector: TaskVector | None) -> Iterator[None]:
        """Edit the forwards inside the block; with None, or a vector without edits, they are the library's."""
        before, expected = self._edit, self._expected
        self._edit, self._expected = vector if vector is not None and vector.edits else None, deque()
        try:
            yield
        finally:
            self._edit, self._expected = before, expected

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        if self._edit is None:
            plain: Tensor = super()._model_generate(context, max_length, stop, **settings)
            return plain
        with applied(self._sites, self._edit) as fired:
            output: Tensor = super()._model_generate(context, max_length, stop, **settings)
        _ran(fired.count)
        return output

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        score = super()._loglikelihood_tokens
        if self._edit is None:
            plain: list[tuple[float, bool]] = score(requests, disable_tqdm, override_bs)
            return plain
        answers: dict[int, tuple[float, bool]] = {}
        for indices in _rounds(requests) if self.logits_cache else [range(len(requests))]:
            own = [requests[index] for index in indices]
            self._expected = deque(_rows(own, self.max_length, self.logits_cache))
            answers |= dict(zip(indices, score(own, disable_tqdm, override_bs), strict=True))
            if self._expected:
                raise _reordered()
        return [answers[index] for index in range(len(requests))]

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        if self._edit is None:
            plain: Tensor = super()._model_call(inps, attn_mask, labels)
            return plain
        if len(self._expected) < len(inps):
            raise _reordered()
        rows = [self._expected.popleft() for _ in range(len(inps))]
        padded = torch.zeros_like(inps)
        real = torch.zeros_like(inps)
        for index, row in enumerate(rows):
            fitting = row.tokens[: inps.shape[1]]
            padded[index, : len(fitting)] = torch.tensor(fitting, device=inps.device)
            real[index, : len(row.tokens)] = 1
        if not torch.equal(padded, inps) or max(len(row.tokens) for row in rows) != inps.shape[1]:
            raise _reordered()
        # The rows are padded on the right and no mask is passed on, so the edit is told where it belongs.
        tail = torch.tensor([row.scored for row in rows], device=inps.device)
        with applied(self._sites, self._edit, tail=tail, real=real) as fired:
            logits: Tensor = super()._model_call(inps, attn_mask, labels)
        _ran(fired.count)
        return logits

    def _detect_batch_size(self, requests: Sequence[Request] | None = None, pos: int = 0) -> int:
        with self._editing(None):
            found: int = super()._detect_batch_size(requests, pos)
            return found


class _Runner:
    """The model as a fit uses it: the same tokens as in the evaluation, padded on the left."""

    def __init__(self, lm: LmEvalMtv) -> None:
        self._lm = lm
        self.model: torch.nn.Module = unwrapped(lm.model)
        source = lm.pretrained if isinstance(lm.pretrained, str) else lm.model.name_or_path
        commit = getattr(lm.config, "_commit_hash", None)
        name, self.revision, text_files = identity(source, commit, lm.given.get("gguf_file"))
        adapter = adapter_of(lm.peft) if lm.peft else None
        self.name = "+".join(filter(None, (name, lm.delta, adapter)))
        self.dtype = str(lm.model.dtype).removeprefix("torch.")
        self.device: torch.device = lm.device
        self.recipe = _recipe(lm, text_files)
        # An automatic batch size is one of evaluation; activations do not depend on it.
        self.batch_size = BatchSize(lm.batch_size if isinstance(lm.batch_size, int) else 1)

    def text_parts(self, prompt: LmPrompt) -> list[str]:
        """Return the context, and what stands before, in and after the target."""
        return [prompt.context, prompt.delimiter, prompt.target, prompt.ending]

    @torch.no_grad()
    def run(self, prompts: Sequence[LmPrompt]) -> None:
        """The first forward of a generation, which works out the positions of padded rows."""
        self._generated_ids(prompts, 1)

    @torch.no_grad()
    def greedy_replies(self, prompts: Sequence[LmPrompt], new_tokens: int, edited: bool) -> list[Reply]:
        """Greedy answers of at most ``new_tokens`` tokens; none to prompts whose target is scored.

        See :class:`~lmms_mtv.harness.prompts.Reply`.
        """
        if any(prompt.scored for prompt in prompts):
            return []
        made = []
        for prompt, ids in zip(prompts, self._generated_ids(prompts, new_tokens).tolist(), strict=True):
            end = self._lm.tokenizer.eos_token_id
            own = ids[: ids.index(end)] if end in ids else ids
            whole: str = self._lm.tok_decode(own)
            text = whole.split(prompt.ending)[0] if prompt.ending else whole
            made.append(Reply(text, len(own) < len(ids) or text != whole))
        return made

    def _generated_ids(self, prompts: Sequence[LmPrompt], new_tokens: int) -> Tensor:
        """Tokens [prompts, at most new_tokens] that follow the prompts."""
        rows = [self._tokens(prompt)[0] for prompt in prompts]
        longest, pad = max(map(len, rows)), self._lm.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=self._lm.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._lm.device)
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1, **GREEDY}
        settings |= {"pad_token_id": pad, "use_cache": True, "cache_implementation": None}
        output: Tensor = self._lm.model.generate(input_ids=ids, attention_mask=mask, **settings)
        return output[:, longest:]

    def lead_ids(self, prompt: LmPrompt) -> list[int]:
        """Blank tokens between the context and :meth:`target_ids`."""
        ids = self._tokens(prompt)[1]
        return ids[: blanks(ids, self._lm.tok_decode)]

    def target_ids(self, prompt: LmPrompt) -> list[int]:
        """Tokens that are scored, or of a generated target with what ends it.

        As they follow the context and :meth:`lead_ids`.
        """
        ids = self._tokens(prompt)[1]
        return ids[blanks(ids, self._lm.tok_decode) :]

    def _tokens(self, prompt: LmPrompt) -> tuple[list[int], list[int]]:
        """Tokens of the context and of the target, split as lm-eval splits them.

        Raises :class:`ContextLengthError` where lm-eval would cut the beginning off.
        """
        before, after = self._scored(prompt) if prompt.scored else self._generated(prompt)
        if len(before) + len(after) > self._lm.max_length + 1:
            raise ContextLengthError(
                f"a prompt of {len(before)} tokens with a target of {len(after)} does not fit the "
                f"{self._lm.max_length} tokens of {self.name}: pass a smaller fit_shots= (or --num_fewshot)"
            )
        return before, after

    def _scored(self, prompt: LmPrompt) -> tuple[list[int], list[int]]:
        lm = self._lm
        if prompt.context:
            before, after = lm._encode_pair(prompt.context, prompt.continuation)
            return before, after
        after = lm.tok_encode(prompt.continuation, add_special_tokens=False)
        return (after[:1], after[1:]) if after[:1] == [lm.prefix_token_id] else ([lm.prefix_token_id], after)

    def _generated(self, prompt: LmPrompt) -> tuple[list[int], list[int]]:
        lm, answer = self._lm, prompt.continuation + prompt.ending
        before: list[int] = lm.tok_batch_encode([prompt.context])[0][0].tolist()
        whole: list[int] = lm.tok_batch_encode([prompt.context + answer])[0][0].tolist()
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        return before, lm.tok_encode(answer, add_special_tokens=False)


def _recipe(lm: LmEvalMtv, files: str | None) -> dict[str, Any]:
    """Return what changes tokens or what is computed of them, where it is not the default of lm-eval's ``hf``."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(HFLM).parameters.items()}
    given = {name: value for name, value in lm.given.items() if name not in _NOT_COMPUTING}
    found = {name: value for name, value in given.items() if value is not None and value != defaults.get(name)}
    found |= attention_of(lm.model)
    tokenizer = lm.given.get("tokenizer")
    if tokenizer is not None:
        files = text_files_of(str(tokenizer))
    if tokenizer is not None or files is not None:
        found["files"] = files or str(tokenizer)
    return found


def _rounds(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of requests, in rounds within which the same input always has as many scored tokens.

    lm-eval runs requests with the same input once. That holds for edited ones only where the same positions are
    edited; it is nearly always the case, and then there is one round.
    """
    by_input: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        lengths = by_input.setdefault((*context, *continuation[:-1]), {})
        lengths.setdefault(len(continuation), []).append(index)
    rounds: list[list[int]] = []
    for lengths in by_input.values():
        for turn, length in enumerate(sorted(lengths, reverse=True)):
            if turn == len(rounds):
                rounds.append([])
            rounds[turn] += lengths[length]
    return [sorted(indices) for indices in rounds]


def _rows(requests: Sequence[Request], limit: int, once: bool) -> list[_Row]:
    """Return the rows that lm-eval makes of the requests, in its order: the longest first, the same input only
    ``once``.
    """
    firsts: dict[Any, Request] = {}
    for index, request in enumerate(requests):
        firsts.setdefault((*request[1], *request[2][:-1]) if once else index, request)
    whole = [(context + continuation, len(continuation)) for _, context, continuation in firsts.values()]
    whole.sort(key=lambda row: (-len(row[0]), row[0]))
    return [_Row(tokens[-(limit + 1) :][:-1], scored) for tokens, scored in whole]


def _ran(count: int) -> None:
    if count == 0:
        raise HookError(
            "the edit never ran while the model answered, so that the answers are those of the plain model: pass "
            "decoder= with the module that its forward calls"
        )


def _reordered() -> HookError:
    return HookError(
        f"lm-eval {lm_eval.__version__} did not run its requests in the order that mtv knows, so that the positions to "
        "edit are not certain: install lm-eval 0.4.13, with which this is tested"
    )
