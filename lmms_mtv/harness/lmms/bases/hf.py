"""The base ``hf``: any image-text or text model that the Auto classes of transformers load."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from loguru import logger
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from lmms_mtv.errors import ArgumentError, ContextLengthError, DocumentError
from lmms_mtv.harness import prompts as writing
from lmms_mtv.harness.generation import GREEDY, attention_of
from lmms_mtv.harness.hf_config import HfConfig
from lmms_mtv.harness.lmms.bases.hf_checkpoint import IMAGE_SETTINGS, image_settings_of, load, padding_token
from lmms_mtv.harness.prompts import Message, Prompt, Reply
from lmms_mtv.harness.text import one_line
from lmms_mtv.hooks import Sites, find_sites
from lmms_mtv.runtime.attention import check_attention
from lmms_mtv.runtime.batches import AUTO, BatchSize

# The settings of a task count, not the checkpoint's generation configuration.
_NEUTRAL: Final = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0}
_SAMPLING: Final = (*_NEUTRAL, *GREEDY)
# Without a cache the edit of earlier answer tokens would be lost at each new token. A static cache, which some
# checkpoints ask for, hides the padding from the hooks.
_FIXED: Final = {"use_cache": True, "cache_implementation": None}
# Generation settings of tasks that are not settings of transformers.
_OF_TASKS: Final = ("until", "max_new_tokens", "max_gen_toks", "do_sample", "image_aspect_ratio")


class _Until(StoppingCriteria):  # type: ignore[misc]
    """A criterion that stops a row once its new text contains a stop string.

    transformers' own ``stop_strings`` needs a vocabulary of pieces of text, and fails on a vocabulary of whole words.
    """

    def __init__(self, stops: Sequence[str], tokenizer: Any, begin: int) -> None:
        self._stops, self._tokenizer, self._begin = stops, tokenizer, begin

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._begin :], skip_special_tokens=True)
        stopped = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(stopped, device=input_ids.device)  # type: ignore[return-value]


class HfBase:
    """A loaded model with its processor, which runs batches of :class:`Prompt` with padding on the left.

    ``context`` is the length of the longest prompt in tokens, or None if the model has no such limit.

    Args:
        config: the arguments of the base.
        decoder: see :func:`~lmms_mtv.hooks.find_sites`.
    """

    harness_model: Final = None

    def __init__(self, config: HfConfig, decoder: str | None = None) -> None:
        self.config = config
        automatic = config.batch_size == "auto"
        self.batch_size = BatchSize(AUTO if automatic else int(config.batch_size), automatic)
        checkpoint = load(config)
        self.model: nn.Module = checkpoint.model
        check_attention(self.model)
        self.device = checkpoint.device
        self.context = checkpoint.context
        self.name, self.revision, self._text_files = checkpoint.identity
        self.dtype = str(checkpoint.dtype).removeprefix("torch.")
        self.sites: Sites = find_sites(self.model, decoder)
        self._adapter = checkpoint.adapter
        self._weights_dtype = checkpoint.dtype
        self._multimodal = checkpoint.multimodal
        self._processor = checkpoint.processor
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = padding_token(self._tokenizer)
        self._warned: set[str] = set()

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings that differ from the default and change the tokens of a text, or the results for these tokens.

        The weights, the precision and the text of a prompt are elsewhere on a card.
        """
        known = image_settings_of(getattr(self._processor, "image_processor", None))
        settings = {name: getattr(self.config, name) for name in IMAGE_SETTINGS if name in known}
        changes: dict[str, Any] = {name: value for name, value in settings.items() if value != getattr(HfConfig, name)}
        changes |= attention_of(self.model)
        if self._adapter is not None:
            changes["peft"] = self._adapter
        if type(self.model).__module__.startswith("transformers_modules"):
            changes["code"] = type(self.model).__name__
        if self._text_files is not None:
            changes["files"] = self._text_files
        return changes

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
        """Return the prompt as text, and the texts before, in and after its target."""
        return [self.rendered(prompt), prompt.target_delimiter, prompt.target, prompt.fewshot_delimiter]

    @torch.no_grad()
    def run(self, prompts: Sequence[Prompt]) -> None:
        """Run the first forward of a generation over the prompts, so that positions are the same as in the evaluation.

        Prompts with images and prompts without images have separate forwards, in their order.
        """
        for group in _with_images_or_without(prompts):
            self._generate(self._inputs(group, 0), max_new_tokens=1, do_sample=False, **GREEDY)

    def lead_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of the blank tokens between the prompt and :meth:`target_ids`."""
        ids = self._answer_ids(prompt)
        return ids[: writing.blanks(ids, self._tokenizer.decode)]

    def target_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of the target and of the end of an answer, as the ids follow :meth:`lead_ids`.

        An answer ends with the delimiter between demonstrations in a raw prompt, and with the end of a turn in a chat.
        """
        ids = self._answer_ids(prompt)
        return ids[writing.blanks(ids, self._tokenizer.decode) :]

    def _answer_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids between the prompt and the end of the answered prompt."""
        before = self.rendered(prompt)
        if self.config.prompt_style == "chat":
            text = writing.continuation(self._conversation(prompt), self._template)
            text = prompt.target if text is None else text.rstrip()
        else:
            text = prompt.target_delimiter + prompt.target + prompt.fewshot_delimiter
        return writing.following_ids(before, text, self._ids)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], edited: bool = False
    ) -> tuple[list[GenerationResult], int]:
        """Return the answers to a batch of prompts, and the number of tokens in the prompts.

        Args:
            prompts: the batch.
            settings: the harness's generation settings, among them ``until``.
            edited: True if an edit is applied; nothing here depends on it.
        """
        groups = [self._answers(group, settings) for group in _with_images_or_without(prompts)]
        return [answer for answers, _ in groups for answer in answers], sum(tokens for _, tokens in groups)

    def greedy_replies(self, prompts: Sequence[Prompt], new_tokens: int, edited: bool) -> list[Reply]:
        """Return greedy answers of at most ``new_tokens`` tokens; see :class:`Reply`."""
        answers, _ = self.generate(prompts, {"max_new_tokens": new_tokens, "do_sample": False}, edited)
        return [Reply(answer.text, _length(answer) < new_tokens) for answer in answers]

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
        """Return the generation arguments of a task that belong to transformers, and warn of unknown arguments."""
        others = {k: v for k, v in settings.items() if k not in (*_OF_TASKS, *_SAMPLING) and v is not None}
        known = {k: v for k, v in others.items() if hasattr(self.model.generation_config, k) and k not in _FIXED}
        if (unknown := sorted(others.keys() - known.keys())) and not self._warned.issuperset(unknown):
            self._warned |= set(unknown)
            logger.warning(f"generation arguments that base=hf does not know change nothing: {', '.join(unknown)}")
        return known

    def _stops(self, prompts: Sequence[Prompt], until: str | Sequence[str]) -> list[str]:
        """Return the texts that end an answer: the task's ``until``, and for raw prompts the few-shot delimiter."""
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
        # A template may write the first token that the tokenizer would add. The text must not have this token twice.
        bos = self._tokenizer.bos_token
        has_bos = bool(bos) and all(text.startswith(bos) for text in texts)
        options = {"padding": True, "return_tensors": "pt", "add_special_tokens": not has_bos}
        if any(images):
            try:
                inputs = self._processor(text=texts, images=images, **options)
            except (ValueError, OSError) as error:
                raise DocumentError(
                    f"the processor of {self.name} refuses an image of {', '.join(_sizes(images))}: {one_line(error)}"
                ) from error
        else:
            inputs = self._tokenizer(texts, return_token_type_ids=False, **options)
        longest = int(inputs["attention_mask"].sum(1).max())
        if self.context is not None and longest + new_tokens > self.context:
            more = f" and {new_tokens} new ones" if new_tokens else ""
            raise ContextLengthError(
                f"a prompt of {longest} tokens{more} does not fit the {self.context} tokens of {self.name}: "
                f"{_remedy(prompts, longest, new_tokens, self.context)}"
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


def _remedy(prompts: Sequence[Prompt], tokens: int, new_tokens: int, context: int) -> str:
    """Return advice that makes a prompt of ``tokens`` tokens and its answer fit."""
    if any(prompt.demonstrations for prompt in prompts) and tokens > context - new_tokens:
        return "pass a smaller shots= (or fit_shots= if this happened while fitting)" + (
            f", or at most {context - tokens} max_new_tokens with --gen_kwargs" if tokens < context else ""
        )
    if tokens < context:
        return f"pass at most {context - tokens} max_new_tokens with --gen_kwargs, or in the task's generation_kwargs"
    return "its question alone is too long for this model, choose another pretrained= or smaller images"


def _length(answer: GenerationResult) -> int:
    counts = answer.token_counts
    return 0 if counts is None or counts.output_tokens is None else int(counts.output_tokens)


def _with_images_or_without(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Return ``prompts`` in their order, in groups with images and without images: some models take no mixture."""
    return [list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: bool(prompt.images()))]


def _sizes(images: Sequence[Sequence[Any]]) -> list[str]:
    return sorted({f"{image.width} x {image.height}" for row in images for image in row})
