"""A base that is one of lmms-eval's own models: its preprocessing and its generation, hooked."""

from __future__ import annotations

import contextlib
import copy
import dis
import importlib.util
import inspect
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from lmms_eval.api.instance import GenerationResult, Instance, unwrap_generation_output
from lmms_eval.api.model import CacheHook, lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history, log_metrics, reset_logged_metrics
from loguru import logger
from PIL import Image
from torch import nn

from lmms_mtv.errors import ArgumentError, HookError, MtvError
from lmms_mtv.harness import prompts as writing
from lmms_mtv.harness.checkpoint import name_of, revision_of, text_files_of
from lmms_mtv.harness.lmms.bases.hf import one_line
from lmms_mtv.harness.prompts import Message, Prompt, Reply
from lmms_mtv.hooks import Sites, Watch, capture, find_sites, watched
from lmms_mtv.runtime.batches import BatchSize

EXTRA: Final = {"decord": "decord", "qwen_vl_utils": "qwen-vl-utils"}
"""Modules, and the packages of ``lmms-mtv[bases]`` that have them."""

OWN: Final = ("force_simple", "fewshot_as_multiturn", "image_placeholder")
"""The arguments of a wrapped base that are not its wrapper's."""

# Arguments of a wrapper that change nothing in what it computes, or that a card has elsewhere.
_ELSEWHERE: Final = ("pretrained", "revision", "dtype", "torch_dtype", "device", "device_map", "batch_size")
# What the harness writes onto its model, and the wrappers read from themselves.
_SHARED: Final = ("task_dict", "_rank", "_world_size", "accelerator")
_FIGURES: Final = ("total_elapsed_time", "total_gen_tokens", "avg_speed")
_MODULES: Final = ("model", "_model")
_TASK: Final = "lmms_mtv"
_SPLIT: Final = "prompts"
_ONE_TOKEN: Final = {"until": ["\n"], "max_new_tokens": 1, "do_sample": False, "temperature": 0, "num_beams": 1}
_QUESTION: Final[list[Message]] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
_DEFAULT_PLACEHOLDER: Final = "<image>"
_NUMBERED_PLACEHOLDER: Final = "<image {n}>"

Template = Callable[[list[Message], bool], str]
"""Writes messages as text, with what stands before an answer if the second argument is True."""


@dataclass(frozen=True)
class WrappedConfig:
    """Arguments of a base that is a model of lmms-eval.

    ``name``: as in ``--model``; ``arguments``: those of its wrapper, verbatim. ``force_simple``: its simple wrapper
    where it has a chat wrapper too, as ``--force_simple`` does. ``fewshot_as_multiturn``: demonstrations of a chat
    wrapper are turns of their own, or stand in the query's turn. ``image_placeholder``: what marks the place of an
    image in the text of a simple wrapper's few-shot prompt, ``{n}`` for its number.
    """

    name: str
    force_simple: bool = False
    fewshot_as_multiturn: bool = True
    image_placeholder: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("force_simple", "fewshot_as_multiturn"):
            if not isinstance(getattr(self, name), bool):
                raise ArgumentError(f"{name}={getattr(self, name)!r}, expected True or False")


class _Doc(NamedTuple):
    """A prompt as a document of the synthetic task."""

    text: str
    visuals: list[Image.Image]
    messages: list[Message]


def wrapper_class(name: str, force_simple: bool = False) -> type[lmms]:
    """Return the wrapper class of lmms-eval's model ``name``.

    Raises :class:`ArgumentError` if it does not import, with the package that is missing, or if it never has a model
    in this process, as those of servers and APIs.
    """
    try:
        found: type[lmms] = MODEL_REGISTRY_V2.get_model_class(name, force_simple=force_simple)
    except ImportError as error:
        missing = (error.name or "").split(".")[0]
        mend = ""
        if missing in EXTRA:
            mend = (
                f": install {EXTRA[missing]}, or what lmms-eval's models often need, with pip install lmms-mtv[bases]"
            )
        elif isinstance(error, ModuleNotFoundError) and missing:
            there = importlib.util.find_spec(missing) is not None
            mend = f": the installed {missing} lacks it" if there else f": install the package that has {missing}"
        raise ArgumentError(f"base={name} does not import: {one_line(error)}{mend}") from error
    except Exception as error:
        raise ArgumentError(f"base={name} does not import: {type(error).__name__}: {one_line(error)}") from error
    if not _sets_a_model(found):
        raise _no_module(name)
    return found


def parameters(wrapper: type[lmms]) -> dict[str, inspect.Parameter]:
    """Return the keyword arguments of a wrapper, those that its ``**kwargs`` hand to its parents among them."""
    found: dict[str, inspect.Parameter] = {}
    for parent in wrapper.__mro__:
        if "__init__" not in vars(parent):
            continue
        own = list(inspect.signature(parent.__init__).parameters.values())[1:]  # type: ignore[misc]
        named = (one for one in own if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL))
        found = {one.name: one for one in named} | found
        if not any(one.kind is one.VAR_KEYWORD for one in own):
            break
    return found


def known(name: str, force_simple: bool = False) -> tuple[str, ...]:
    """Return the names of all arguments that the base ``name`` takes."""
    return (*OWN, *parameters(wrapper_class(name, force_simple)))


class WrapperBase:
    """A loaded wrapper of lmms-eval. ``sites`` are those of the torch module it runs.

    Raises :class:`ArgumentError` if the wrapper cannot be constructed, or has no torch module,
    :class:`DiscoveryError` if the module's heads are not found.
    """

    def __init__(self, config: WrappedConfig, decoder: str | None = None) -> None:
        self.config = config
        kind = wrapper_class(config.name, config.force_simple)
        self.is_simple: bool = kind.is_simple
        try:
            self.wrapper = kind(**config.arguments)
        except Exception as error:
            raise ArgumentError(
                f"base={config.name} cannot be constructed with {dict(config.arguments)}: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from error
        self.model = _module(self.wrapper, config.name)
        self.sites: Sites = find_sites(self.model, decoder)
        parameter = next(self.model.parameters())
        self.dtype = str(getattr(self.model, "dtype", parameter.dtype)).removeprefix("torch.")
        self.device = parameter.device
        self.name, self.revision = self._source(parameters(kind))
        self.batch_size = BatchSize(_batch_size(self.wrapper))
        # The template that writes the wrapper's prompts, once it is looked for: none, or one.
        self._found: tuple[Template, ...] | None = None

    def _source(self, taken: Mapping[str, inspect.Parameter]) -> tuple[str, str | None]:
        """Name and revision of the checkpoint."""
        of_model = getattr(self.model, "config", None)
        given = dict(self.config.arguments)
        default = taken["pretrained"].default if "pretrained" in taken else None
        name = given.get("pretrained") or default or getattr(of_model, "_name_or_path", None) or self.config.name
        revision = revision_of(str(name), getattr(of_model, "_commit_hash", None))
        self._text_files = text_files_of(str(name))
        return name_of(str(name), revision), revision

    def share(self, harness: lmms) -> None:
        """Let what the harness wrote onto its model reach the wrapper, and what only the wrapper has the harness."""
        for name in _SHARED:
            if hasattr(harness, name):
                setattr(self.wrapper, name, getattr(harness, name))
            elif hasattr(self.wrapper, name):
                setattr(harness, name, getattr(self.wrapper, name))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The base, the arguments with which its wrapper was constructed, and the files of a local checkpoint."""
        given = {key: value for key, value in self.config.arguments.items() if key not in _ELSEWHERE}
        files = {} if self._text_files is None else {"files": self._text_files}
        return {"base": self.config.name, **given, **files}

    def text_parts(self, prompt: Prompt) -> list[str]:
        """Return the tokens that the wrapper makes of the prompt, and what stands before, in and after its target."""
        kind = "simple" if self.is_simple else "chat"
        ids = json.dumps(self._ids(prompt))
        return [kind, ids, prompt.target_delimiter, prompt.target, prompt.fewshot_delimiter]

    @torch.no_grad()
    def run(self, prompts: Sequence[Prompt]) -> None:
        """The prompts' forwards, each the first of a generation of one token.

        Raises :class:`HookError` if the model failed, or did not run once for every prompt.
        """
        with _quiet(), _unmeasured(), watched(self.model, self.sites) as watch:
            self._generate(self._requests(prompts, _ONE_TOKEN), CacheHook(None), watch)
        self._check(watch, len(prompts))

    def lead_ids(self, prompt: Prompt) -> list[int]:
        """Blank tokens between the prompt and :meth:`target_ids`."""
        ids = self._following(prompt)
        return ids[: writing.blanks(ids, self._decode)]

    def target_ids(self, prompt: Prompt) -> list[int]:
        """Tokens of the target as they follow the prompt and :meth:`lead_ids`, and of what ends an answer there.

        If the wrapper's prompts end in what its chat template writes before an answer, they are what the template
        writes for the target, to the end of that turn. Otherwise they are those of the target between the delimiters
        of the task.
        """
        ids = self._following(prompt)
        return ids[writing.blanks(ids, self._decode) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = _tokenizer(self.wrapper, self.config.name).decode(ids)
        return text

    def _following(self, prompt: Prompt) -> list[int]:
        """Tokens between the prompt and the end of the answered one."""
        template = self._template(prompt)
        bare = Prompt(_QUESTION, target=prompt.target)
        text = None if template is None else writing.continuation(bare, template)
        if template is not None and text is not None:
            before, text = template(bare.chat(), True), text.rstrip()
        else:
            before, text = "", prompt.target_delimiter + prompt.target + prompt.fewshot_delimiter
        known_ids, whole = self._tokens(before), self._tokens(before + text)
        return whole[len(known_ids) :] if whole[: len(known_ids)] == known_ids else self._tokens(text)

    @torch.no_grad()
    def answers(
        self, requests: Sequence[Instance], hook: CacheHook, edited: bool
    ) -> tuple[list[GenerationResult], int]:
        """Return answers to the harness's own requests, exactly as it sent them, and the number of tokens that went in.

        ``edited`` says that an edit is in place. Then a request that the wrapper answers although its model failed or
        did not run is a :class:`HookError`; otherwise it is a warning, and the answer is the wrapper's own.
        """
        with watched(self.model, self.sites) as watch:
            given = self._generate(requests, hook, watch)
        self._check(watch, len(requests), edited)
        if edited and not watch.cached:
            raise HookError(
                f"base={self.config.name} generates without a cache, so that the edit of earlier answer tokens is lost "
                "at each new one: pass use_cache=True"
            )
        return given, watch.tokens

    def generate(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], edited: bool
    ) -> tuple[list[GenerationResult], int]:
        """Return answers to prompts of our own making, as :meth:`answers` does."""
        with _quiet():
            return self.answers(self._requests(prompts, settings), CacheHook(None), edited)

    def greedy_replies(self, prompts: Sequence[Prompt], new_tokens: int, edited: bool) -> list[Reply]:
        """Greedy answers of at most ``new_tokens`` tokens; see :class:`~lmms_mtv.harness.prompts.Reply`."""
        with _unmeasured():
            found, _ = self.generate(prompts, _ONE_TOKEN | {"until": [], "max_new_tokens": new_tokens}, edited)
        made = []
        for answer, prompt in zip(found, prompts, strict=True):
            ids = _tokenizer(self.wrapper, self.config.name)(answer.text, add_special_tokens=False)["input_ids"]
            text = answer.text.split(prompt.fewshot_delimiter)[0] if prompt.fewshot_delimiter else answer.text
            made.append(Reply(text, len(ids) < new_tokens - 1 or text != answer.text))
        return made

    def _requests(self, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> list[Instance]:
        """Return the prompts as requests over a synthetic task, which is put where the wrapper looks for documents."""
        docs = [self._doc(prompt) for prompt in prompts]
        self.wrapper.task_dict[_TASK] = {_SPLIT: docs}
        made = []
        for index, doc in enumerate(docs):
            own = copy.deepcopy(dict(settings))
            where = (index, _TASK, _SPLIT)
            args = (doc.text, own, _visuals, *where) if self.is_simple else (doc.text, _messages, own, *where)
            metadata = {"task": _TASK, "doc_id": index, "repeats": 1, "split": _SPLIT}
            made.append(Instance("generate_until", args, 0, metadata))
        return made

    def _doc(self, prompt: Prompt) -> _Doc:
        if not self.is_simple:
            spoken = (prompt if self.config.fewshot_as_multiturn else prompt.inline()).spoken()
            return _Doc(prompt.raw(""), [], spoken)
        images = prompt.images()
        if prompt.leads():
            return _Doc(prompt.raw(""), images, [])
        mark = self._placeholder
        pieces = prompt.raw("\0").split("\0")
        text = pieces[0] + "".join(mark.replace("{n}", str(n)) + piece for n, piece in enumerate(pieces[1:], 1))
        return _Doc(text, images, [])

    @property
    def _placeholder(self) -> str:
        if self.config.image_placeholder is not None:
            return self.config.image_placeholder
        # Several wrappers read numbered places when they are told to interleave, and put all images first if not.
        return _NUMBERED_PLACEHOLDER if getattr(self.wrapper, "interleave_visuals", False) else _DEFAULT_PLACEHOLDER

    def _generate(self, requests: Sequence[Instance], hook: CacheHook, watch: Watch) -> list[GenerationResult]:
        self.wrapper.cache_hook = hook
        try:
            outputs = self.wrapper.generate_until(list(requests))
        except Exception as error:
            if isinstance(watch.error, MtvError):
                raise watch.error from error
            if isinstance(error, AssertionError):
                raise ArgumentError(f"base={self.config.name} refuses: {one_line(error)}") from error
            if absent := _absent(self.wrapper, error):
                raise ArgumentError(
                    f"base={self.config.name} failed: {one_line(error)}; it did without {', '.join(absent)}, which did "
                    "not import: pip install lmms-mtv[bases]"
                ) from error
            raise
        finally:
            self.wrapper.task_dict.pop(_TASK, None)
        if len(outputs) != len(requests):
            raise HookError(f"base={self.config.name} gave {len(outputs)} answers to {len(requests)} requests")
        return [GenerationResult(*unwrap_generation_output(output)) for output in outputs]

    def _check(self, watch: Watch, prompts: int, strict: bool = True) -> None:
        """Raise, or warn of, what a wrapper hides: a failed forward, or a prompt that its model never saw."""
        if isinstance(watch.error, MtvError):
            raise watch.error
        if watch.error is not None:
            found = f"its model failed ({type(watch.error).__name__}: {one_line(watch.error)})"
        elif watch.prompts < prompts:
            found = f"its model saw {watch.prompts} of {prompts} prompts"
        else:
            return
        message = f"base={self.config.name} answered although {found}; its own log may say why"
        if strict:
            raise HookError(message) from watch.error
        logger.warning(message)

    def _ids(self, prompt: Prompt) -> list[int]:
        with capture(self.model, self.sites) as captured:
            self.run([prompt])
        ids: list[int] = captured.prefill().inputs["input_ids"][0].tolist()
        return ids

    def _template(self, prompt: Prompt) -> Template | None:
        """Return the chat template that writes the wrapper's prompts, or None if no part of ``prompt`` is from one."""
        if self._found is None:
            ids = self._ids(prompt)
            # Some wrappers set their template when they first generate.
            self._found = tuple(one for one in _templates(self.wrapper) if self._opens(one, ids))[:1]
        return self._found[0] if self._found else None

    def _opens(self, template: Template, ids: list[int]) -> bool:
        """Return whether ``ids`` end in what the template writes between a question and its answer."""
        text = template(_QUESTION, True)
        asked = text[: text.rindex("?") + 1]
        turn = self._tokens(text)[len(self._tokens(asked)) :]
        return bool(turn) and ids[-len(turn) :] == turn

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = _tokenizer(self.wrapper, self.config.name)(text, add_special_tokens=False)["input_ids"]
        return ids


def _visuals(doc: _Doc) -> list[Image.Image]:
    return list(doc.visuals)


def _messages(doc: _Doc) -> list[Message]:
    # Wrappers add to the list they get.
    return [{"role": turn["role"], "content": [dict(part) for part in turn["content"]]} for turn in doc.messages]


def _sets_a_model(wrapper: type[lmms]) -> bool:
    """Return whether instances have an attribute ``model`` or ``_model``, as far as the class tells."""
    for parent in wrapper.__mro__[: wrapper.__mro__.index(lmms)]:
        if isinstance(vars(parent).get("model"), property):
            return True
        code = getattr(vars(parent).get("__init__"), "__code__", None)
        if code is not None and any(
            step.opname == "STORE_ATTR" and step.argval in _MODULES for step in dis.get_instructions(code)
        ):
            return True
    return False


def _module(wrapper: lmms, name: str) -> nn.Module:
    for attribute in _MODULES:
        found = getattr(wrapper, attribute, None)
        if isinstance(found, nn.Module):
            return found
    raise _no_module(name)


def _no_module(name: str) -> ArgumentError:
    return ArgumentError(
        f"base={name} has no torch module in this process, so that its heads cannot be edited: an API, a server or an "
        "engine of its own runs it. Use base=hf, or a model of lmms-eval that runs in transformers"
    )


def _batch_size(wrapper: lmms) -> int:
    try:
        return max(1, int(getattr(wrapper, "batch_size", 1)))
    except (TypeError, ValueError):
        return 1


def _holders(wrapper: lmms) -> Iterator[Any]:
    """Return what may have a tokenizer or a chat template: processors before tokenizers."""
    for name in ("processor", "_processor", "_image_processor", "tokenizer", "_tokenizer"):
        if (found := getattr(wrapper, name, None)) is not None:
            yield found


def _tokenizer(wrapper: lmms, name: str) -> Any:
    for holder in reversed(list(_holders(wrapper))):
        tokenizer = getattr(holder, "tokenizer", holder)
        if hasattr(tokenizer, "convert_ids_to_tokens"):
            return tokenizer
    raise ArgumentError(f"base={name} has no tokenizer of transformers, which the tokens of targets come from: use hf")


def _templates(wrapper: lmms) -> Iterator[Template]:
    """Functions that write messages as the wrapper's chat templates do: with lists of parts, or with plain texts."""
    for holder in _holders(wrapper):
        if not getattr(holder, "chat_template", None):
            continue
        for flat in (False, True):
            template = _writer(holder, flat)
            try:
                text = template(_QUESTION, True)
            except Exception:
                # A template may raise anything on messages that are not for it.
                continue
            if "?" in text and "'type'" not in text:
                yield template


def _writer(holder: Any, flat: bool) -> Template:
    def write(messages: list[Message], add_generation_prompt: bool) -> str:
        if flat:
            texts = ("".join(part["text"] for part in message["content"]) for message in messages)
            messages = [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]
        text: str = holder.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return text

    return write


def _absent(wrapper: lmms, error: Exception) -> list[str]:
    """Return names that the wrapper's generation calls but that optional imports left as None."""
    if not isinstance(error, TypeError) or "NoneType" not in str(error):
        return []
    function = type(wrapper).generate_until
    around = vars(sys.modules[function.__module__])
    return [name for name in function.__code__.co_names if name in around and around[name] is None]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the wrapper's progress bars and figures out of our own; what it wrote is shown if it fails."""
    kept = io.StringIO()
    logger.disable(log_metrics.__module__)
    try:
        with contextlib.redirect_stderr(kept):
            yield
    except BaseException:
        sys.stderr.write(kept.getvalue())
        raise
    finally:
        logger.enable(log_metrics.__module__)


@contextlib.contextmanager
def _unmeasured() -> Iterator[None]:
    """Leave the harness's throughput as it is: a fit is no part of the evaluation."""
    before = get_logged_metrics_history()
    try:
        yield
    finally:
        reset_logged_metrics()
        for figures in map(dict, before):
            own = {name: figures.pop(name) for name in _FIGURES}
            log_metrics(**own, additional_metrics=figures)
