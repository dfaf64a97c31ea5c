"""The base ``hf``: any image-text or text model that the Auto classes of transformers load."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from loguru import logger
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from lmms_mtv.errors import ArgumentError, ContextLengthError, DocumentError, MtvError, unknown
from lmms_mtv.harness import gguf
from lmms_mtv.harness import prompts as writing
from lmms_mtv.harness.checkpoint import adapter_of, identity
from lmms_mtv.harness.prompts import Message, Prompt, Reply
from lmms_mtv.runtime.batches import AUTO, BatchSize
from lmms_mtv.runtime.compat import unwrapped
from lmms_mtv.shapes import CHECKPOINT

TINY: Final = "tiny"
"""Name of the bundled checkpoint in ``pretrained=``."""

_DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
# What a task asks for counts, whatever the checkpoint's generation configuration says.
_NEUTRAL: Final = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0}
GREEDY: Final = {"temperature": None, "top_p": None, "top_k": None}
_IMAGE_SETTINGS: Final = ("do_image_splitting", "min_pixels", "max_pixels")
_SAMPLING: Final = (*_NEUTRAL, *GREEDY)
# Without a cache the edit of earlier answer tokens would be lost at each new one. A static one, which some checkpoints
# ask for, hides from the hooks which tokens are padding.
_FIXED: Final = {"use_cache": True, "cache_implementation": None}
# What tasks say of generation that is not transformers' to do.
_OF_TASKS: Final = ("until", "max_new_tokens", "max_gen_toks", "do_sample", "image_aspect_ratio")


@dataclass(frozen=True)
class HfConfig:
    """Arguments of the base.

    ``pretrained``: name on the hub, folder, GGUF file, ``tiny``, or the name of a small model that an extra of this
    package installs (``smollm2``, ``gemma3-270m``); ``gguf_file``: the name of a GGUF file in the folder or on the hub,
    whose weights are made whole again; ``revision``: of the hub. ``peft``: an adapter of PEFT that is
    put on the model, a folder or a name on the hub. ``device``: default is the GPU if there is one, with several
    processes each its own; ``device_map``: passed to transformers, to spread a model over
    devices. ``dtype``: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``. ``prompt_style``:
    ``raw`` writes the task's text alone, as the MTV authors do, ``chat`` uses the model's chat template; there,
    demonstrations are turns of their own (``fewshot_as_multiturn``), or stand in the query's turn, written as in a
    raw prompt. ``image_placeholder``: the text for an image in a raw prompt, where it cannot be told from the
    processor.

    ``batch_size``: rows of a forward, or ``auto``: 16, halved each time the memory runs out.

    An image costs what its processor makes of it. ``do_image_splitting`` cuts large images into crops where the
    processor can (Idefics 2 and 3, SmolVLM); it is off, as in the MTV authors' code, so that few-shot prompts fit;
    None leaves it to the checkpoint. ``min_pixels`` and ``max_pixels`` bound an image's size where the processor
    keeps its resolution (Qwen-VL).
    """

    pretrained: str = "HuggingFaceM4/idefics2-8b"
    gguf_file: str | None = None
    peft: str | None = None
    revision: str | None = None
    device: str | None = None
    device_map: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    prompt_style: str = "raw"
    fewshot_as_multiturn: bool = True
    do_image_splitting: bool | None = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    image_placeholder: str | None = None
    batch_size: int | str = 1

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise unknown("dtype", str(self.dtype), _DTYPES)
        if self.prompt_style not in writing.STYLES:
            raise unknown("prompt_style", str(self.prompt_style), writing.STYLES)
        if not isinstance(self.fewshot_as_multiturn, bool):
            raise ArgumentError(f"fewshot_as_multiturn={self.fewshot_as_multiturn!r}, expected True or False")
        if self.batch_size != "auto" and (not str(self.batch_size).isdigit() or int(self.batch_size) < 1):
            raise ArgumentError(f"batch_size={self.batch_size!r}, expected a number, 1 or more, or auto")


class _Until(StoppingCriteria):  # type: ignore[misc]
    """Stops a row once its new text has one of the stop strings.

    transformers' own ``stop_strings`` needs a vocabulary of pieces of text and fails on one of whole words.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any, begin: int) -> None:
        self._stops, self._tokenizer, self._begin = stops, tokenizer, begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._begin :], skip_special_tokens=True)
        found = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)  # type: ignore[return-value]


class HfBase:
    """A loaded model with its processor. It runs :class:`Prompt` batches, left-padded."""

    def __init__(self, config: HfConfig) -> None:
        self.config = config
        automatic = config.batch_size == "auto"
        self.batch_size = BatchSize(AUTO if automatic else int(config.batch_size), automatic)
        source, file = gguf.located(
            str(CHECKPOINT) if config.pretrained == TINY else config.pretrained, config.gguf_file
        )
        options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        if file is not None:
            options["gguf_file"] = file
        try:
            settings = AutoConfig.from_pretrained(source, **options)
            multimodal = type(settings) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            if multimodal:
                self._processor = _processor(source, config, options)
            else:
                self._processor = AutoTokenizer.from_pretrained(source, **options)
            loader = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
            model = loader.from_pretrained(
                source,
                dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
                attn_implementation=config.attn_implementation,
                device_map=config.device_map,
                # A GGUF file is read once less.
                **({} if file is None else {"config": settings}),
                **options,
            )
        except MtvError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise ArgumentError(
                f"pretrained={config.pretrained} cannot be loaded: {one_line(error)} (give the name of a model on "
                f"the hub, a folder, or {TINY!r}; without network, the model has to be in the local cache)"
            ) from error
        if config.peft is not None:
            model = _adapted(model, config.peft)
        self.device = _device(config.device)
        if config.device_map is None:
            model.to(self.device)
        else:
            self.device = model.device
        self.model: nn.Module = model.eval()
        self._weights_dtype: torch.dtype = model.dtype
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # Longest prompt in tokens, or None where the model does not say.
        self.context: int | None = limit if isinstance(limit, int) else None
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = padding(self._tokenizer)
        self._multimodal = multimodal
        self._warned: set[str] = set()
        # A branch or a tag moves, the commit it stood for does not.
        self.name, self.revision, self._text_files = identity(source, getattr(settings, "_commit_hash", None), file)
        self.revision = self.revision or config.revision
        if config.pretrained == TINY:
            self.name, self._text_files = "lmms-mtv/tiny", None
        self._adapter = None if config.peft is None else adapter_of(config.peft)
        self.dtype = str(model.dtype).removeprefix("torch.")

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What changes the tokens of a text, or what the model computes of them, where it is not the default.

        The weights, the precision and the text of a prompt are elsewhere on a card.
        """
        known = _known_to(getattr(self._processor, "image_processor", None))
        given = {name: getattr(self.config, name) for name in _IMAGE_SETTINGS if name in known}
        found = {name: value for name, value in given.items() if value != getattr(HfConfig, name)}
        found |= attention_of(self.model)
        if self._adapter is not None:
            found["peft"] = self._adapter
        if type(self.model).__module__.startswith("transformers_modules"):
            found["code"] = type(self.model).__name__
        if self._text_files is not None:
            found["files"] = self._text_files
        return found

    def rendered(self, prompt: Prompt) -> str:
        """Return the prompt as the text that goes to the processor."""
        pictured = bool(prompt.images())
        if pictured and not self._multimodal:
            raise ArgumentError(f"{self.name} is a text model, but the task has images: choose another pretrained=")
        if self.config.prompt_style == "chat":
            return self._template(self._conversation(prompt).chat(), True)
        return prompt.raw(self._placeholder if pictured else "")

    def _conversation(self, prompt: Prompt) -> Prompt:
        return prompt if self.config.fewshot_as_multiturn else prompt.inline()

    def text_parts(self, prompt: Prompt) -> list[str]:
        """Return the prompt as text, and what stands before, in and after its target."""
        return [self.rendered(prompt), prompt.target_delimiter, prompt.target, prompt.fewshot_delimiter]

    @torch.no_grad()
    def run(self, prompts: Sequence[Prompt]) -> None:
        """One forward over the prompts: the first of a generation, so that positions are those of evaluation.

        Prompts with images and prompts without any have a forward each, in their order.
        """
        for group in _with_images_or_without(prompts):
            self._generate(self._inputs(group, 0), max_new_tokens=1, do_sample=False, **GREEDY)

    def lead_ids(self, prompt: Prompt) -> list[int]:
        """Blank tokens between the prompt and :meth:`target_ids`."""
        ids = self._following(prompt)
        return ids[: writing.blanks(ids, self._tokenizer.decode)]

    def target_ids(self, prompt: Prompt) -> list[int]:
        """Tokens of the target as they follow the prompt and :meth:`lead_ids`, and of what ends an answer there.

        That is the delimiter between demonstrations in a raw prompt, and the end of the turn in a chat.
        """
        ids = self._following(prompt)
        return ids[writing.blanks(ids, self._tokenizer.decode) :]

    def _following(self, prompt: Prompt) -> list[int]:
        """Tokens between the prompt and the end of the answered one."""
        before = self.rendered(prompt)
        if self.config.prompt_style == "chat":
            text = writing.continuation(self._conversation(prompt), self._template)
            text = prompt.target if text is None else text.rstrip()
        else:
            text = prompt.target_delimiter + prompt.target + prompt.fewshot_delimiter
        known, whole = self._ids(before), self._ids(before + text)
        return whole[len(known) :] if whole[: len(known)] == known else self._ids(text)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], edited: bool = False
    ) -> tuple[list[GenerationResult], int]:
        """Return answers to a batch of prompts under the harness's generation settings, ``until`` among them.

        Also the number of tokens that went in. An exception is never kept back, with or without an edit.
        """
        found = [self._answers(group, settings) for group in _with_images_or_without(prompts)]
        return [answer for answers, _ in found for answer in answers], sum(tokens for _, tokens in found)

    def greedy_replies(self, prompts: Sequence[Prompt], new_tokens: int, edited: bool) -> list[Reply]:
        """Greedy answers of at most ``new_tokens`` tokens; see :class:`Reply`."""
        found, _ = self.generate(prompts, {"max_new_tokens": new_tokens, "do_sample": False}, edited)
        return [Reply(one.text, _length(one) < new_tokens) for one in found]

    def _answers(self, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> tuple[list[GenerationResult], int]:
        stops = self._stops(prompts, settings.get("until") or ())
        limit = int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or 256)
        chosen = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
        chosen |= self._passed_on(settings)
        sampling = bool(settings.get("do_sample", chosen.get("temperature", 0) > 0)) and chosen.get("temperature") != 0
        if not sampling:
            chosen |= GREEDY
        inputs = self._inputs(prompts, limit)
        if stops:
            begin = inputs["input_ids"].shape[1]
            chosen["stopping_criteria"] = StoppingCriteriaList([_Until(stops, self._tokenizer, begin)])
        output = self._generate(inputs, max_new_tokens=limit, do_sample=sampling, **chosen)
        length, lengths = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(1).tolist()
        answers = []
        for row, taken in zip(output[:, length:], lengths, strict=True):
            text = self._tokenizer.decode(row, skip_special_tokens=True)
            for stop in stops:
                text = text.split(stop)[0]
            counts = TokenCounts(input_tokens=taken, output_tokens=int((row != self._tokenizer.pad_token_id).sum()))
            answers.append(GenerationResult(text, counts))
        return answers, sum(lengths)

    def _passed_on(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the generation arguments of a task that are transformers' own; a warning names those that nobody
        knows.
        """
        others = {k: v for k, v in settings.items() if k not in (*_OF_TASKS, *_SAMPLING) and v is not None}
        known = {k: v for k, v in others.items() if hasattr(self.model.generation_config, k) and k not in _FIXED}
        if (unknown := sorted(others.keys() - known.keys())) and not self._warned.issuperset(unknown):
            self._warned.update(unknown)
            logger.warning(f"generation arguments that base=hf does not know change nothing: {', '.join(unknown)}")
        return known

    def _stops(self, prompts: Sequence[Prompt], until: str | Sequence[str]) -> list[str]:
        """Return where an answer ends: at the task's ``until``, and in raw prompts where a next demonstration would
        begin.
        """
        stops = [until] if isinstance(until, str) else list(until)
        if self.config.prompt_style == "raw":
            stops += [prompt.fewshot_delimiter for prompt in prompts]
        return [stop for stop in dict.fromkeys(stops) if stop]

    def _generate(self, inputs: Mapping[str, Any], **settings: Any) -> torch.Tensor:
        generate: Any = self.model.generate
        fixed = {"pad_token_id": self._tokenizer.pad_token_id} | _FIXED
        output: torch.Tensor = generate(**inputs, **fixed, **_NEUTRAL | settings)
        return output

    def _inputs(self, prompts: Sequence[Prompt], new_tokens: int) -> Any:
        texts = [self.rendered(prompt) for prompt in prompts]
        images = [prompt.images() for prompt in prompts]
        # A template that writes the token the tokenizer would put first must not get it twice.
        bos = self._tokenizer.bos_token
        written = bool(bos) and all(text.startswith(bos) for text in texts)
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": not written}
        if any(images):
            try:
                inputs = self._processor(text=texts, images=images, **options)
            except (ValueError, OSError) as error:
                raise DocumentError(
                    f"the processor of {self.name} refuses an image of {', '.join(_sizes(images))}: {one_line(error)}"
                ) from error
        else:
            inputs = self._tokenizer(texts, return_token_type_ids=False, **options)
        found = int(inputs["attention_mask"].sum(1).max())
        if self.context is not None and found + new_tokens > self.context:
            asked = f" and {new_tokens} new ones" if new_tokens else ""
            raise ContextLengthError(
                f"a prompt of {found} tokens{asked} does not fit the {self.context} tokens of {self.name}: "
                f"{_shorter(prompts, found, new_tokens, self.context)}"
            )
        inputs = inputs.to(self.device)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                inputs[name] = value.to(self._weights_dtype)
        return inputs

    def _template(self, messages: list[Message], add_generation_prompt: bool) -> str:
        holder = self._processor if getattr(self._processor, "chat_template", None) else self._tokenizer
        if not getattr(holder, "chat_template", None):
            raise ArgumentError(f"{self.name} has no chat template: pass prompt_style=raw")
        if not self._multimodal:
            joined = ("".join(part["text"] for part in message["content"]) for message in messages)
            messages = [{**message, "content": text} for message, text in zip(messages, joined, strict=True)]
        rendered: str = holder.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return rendered

    @cached_property
    def _placeholder(self) -> str:
        if self.config.image_placeholder is not None:
            return self.config.image_placeholder
        template = self._template if getattr(self._processor, "chat_template", None) else None
        return writing.placeholder(template, getattr(self._processor, "image_token", None))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def one_line(error: Exception, limit: int = 400) -> str:
    return " ".join(str(error).split())[:limit]


def _device(name: str | None) -> torch.device:
    """Return the device ``name``, or the GPU of this process if there is one; each of several processes has its own."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def _processor(source: str, config: HfConfig, options: Mapping[str, Any]) -> Any:
    """Return the processor, with what the configuration says of images.

    Raises :class:`ArgumentError` if it cannot have it.
    """
    given = {name: getattr(config, name) for name in _IMAGE_SETTINGS if getattr(config, name) is not None}
    images = getattr(AutoProcessor.from_pretrained(source, **options), "image_processor", None)
    known = _known_to(images)
    # Not to cut images into crops is what a processor does that cannot.
    settings = {name: value for name, value in given.items() if name in known or value is not False}
    if lacking := sorted(settings.keys() - set(known)):
        raise ArgumentError(
            f"{', '.join(lacking)}: the image processor of {config.pretrained} ({type(images).__name__}) has no such "
            "setting, leave it out"
        )
    return AutoProcessor.from_pretrained(source, **options, **settings)


def _known_to(images: Any) -> Mapping[str, Any]:
    """Return the settings that an image processor knows."""
    known: Mapping[str, Any] = getattr(getattr(images, "valid_kwargs", None), "__annotations__", {})
    return known


def attention_of(model: nn.Module) -> dict[str, str]:
    """Return the attention implementation of a model, unless it is what transformers chooses for it."""
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    chosen = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    return {} if found in (None, chosen) else {"attn_implementation": str(found)}


def padding(tokenizer: Any) -> str:
    """Return what pads a batch where the tokenizer names nothing: any token does, since padding is masked."""
    for name in ("eos_token", "unk_token", "bos_token"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return str(token)
    return str(tokenizer.convert_ids_to_tokens(0))


def _adapted(model: Any, source: str) -> nn.Module:
    """Return the model with an adapter of PEFT.

    Raises :class:`ArgumentError` if it cannot be put on, or is a prompt.
    """
    import peft

    try:
        adapted = peft.PeftModel.from_pretrained(model, source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ArgumentError(f"peft={source} cannot be put on the model: {one_line(error)}") from error
    inner = unwrapped(adapted)
    if inner is adapted:
        raise ArgumentError(f"peft={source} is a learned prompt, whose positions a vector does not know: leave it out")
    return inner


def _shorter(prompts: Sequence[Prompt], found: int, new_tokens: int, context: int) -> str:
    """Return what makes a prompt and its answer fit."""
    if any(prompt.demonstrations for prompt in prompts) and found > context - new_tokens:
        return "pass a smaller shots= (or fit_shots= if this happened while fitting)" + (
            f", or at most {context - found} max_new_tokens with --gen_kwargs" if found < context else ""
        )
    if found < context:
        return f"pass at most {context - found} max_new_tokens with --gen_kwargs, or in the task's generation_kwargs"
    return "its question alone is too long for this model, choose another pretrained= or smaller images"


def _length(answer: GenerationResult) -> int:
    counts = answer.token_counts
    return 0 if counts is None or counts.output_tokens is None else int(counts.output_tokens)


def _with_images_or_without(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """``prompts`` in their order, parted where those with images meet those without: some models take no mixture."""
    return [list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: bool(prompt.images()))]


def _sizes(images: Sequence[Sequence[Any]]) -> list[str]:
    return sorted({f"{image.width} x {image.height}" for row in images for image in row})
