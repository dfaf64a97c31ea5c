"""A model of transformers with its processor: it runs prompts, encodes targets and answers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from lmms_mtv.errors import ArgumentError, ContextLengthError, DocumentError, unknown
from lmms_mtv.hooks import Sites, find_sites, logits_unread
from lmms_mtv.models import prompts as writing
from lmms_mtv.models.generation import GREEDY, attention_of, samples
from lmms_mtv.models.prompts import STYLES, Message, Prompt, Reply
from lmms_mtv.models.text import one_line
from lmms_mtv.runtime.attention import check_attention
from lmms_mtv.runtime.batches import BatchSize

# The settings of a task count, not the checkpoint's generation configuration.
_NEUTRAL: Final = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0}
SAMPLING: Final = (*_NEUTRAL, *GREEDY)
"""Generation settings of a task that go to transformers as they are."""

# Without a cache the edit of earlier answer tokens would be lost at each new token. A static cache, which some
# checkpoints ask for, hides the padding from the hooks.
FIXED: Final = {"use_cache": True, "cache_implementation": None}
"""Generation settings that never change."""


class GeneratedAnswer(NamedTuple):
    """An answer, with the numbers of tokens of its prompt and of the answer itself."""

    text: str
    input_tokens: int
    output_tokens: int


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


class PromptRunner:
    """A model of transformers with its processor, which runs batches of :class:`Prompt` with padding on the left.

    ``sites`` are the hook points of the model. ``context`` is the length of the longest prompt in tokens, or None if
    the model has no such limit.

    Args:
        model: the model, on its device and in evaluation mode.
        processor: the processor of a multimodal model, or the tokenizer of a text model. Its padding is set to the
            left, and a padding token is added if there is none.
        name: the name of the model in messages.
        prompt_style: ``raw`` writes the texts alone; ``chat`` uses the chat template.
        fewshot_as_multiturn: True writes demonstrations of a chat as separate turns; False writes them in the turn of
            the query, in the form of a raw prompt.
        image_placeholder: the text for an image in a raw prompt, if the processor does not show this text.
        batch_size: rows of a forward.
        decoder: see :func:`~lmms_mtv.hooks.find_sites`.

    Raises:
        ArgumentError: the style of prompts is unknown.
        DiscoveryError: the attention heads of the model are not found.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        name: str,
        *,
        prompt_style: str = "raw",
        fewshot_as_multiturn: bool = True,
        image_placeholder: str | None = None,
        batch_size: BatchSize | int = 1,
        decoder: str | None = None,
    ) -> None:
        if prompt_style not in STYLES:
            raise unknown("prompt_style", str(prompt_style), STYLES)
        loaded: Any = model
        self.model: nn.Module = model
        check_attention(model)
        self.name = name
        self._weights_dtype: torch.dtype = loaded.dtype
        self.batch_size = BatchSize(batch_size) if isinstance(batch_size, int) else batch_size
        self.device: torch.device = loaded.device
        self.dtype = str(loaded.dtype).removeprefix("torch.")
        limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = limit if isinstance(limit, int) else None
        self.sites: Sites = find_sites(model, decoder)
        self._chat = prompt_style == "chat"
        self._multiturn = fewshot_as_multiturn
        self._image_placeholder = image_placeholder
        self._multimodal = getattr(processor, "image_processor", None) is not None
        self._processor = processor
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = padding_token(self._tokenizer)

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings that differ from the default and change the results for the same text."""
        return attention_of(self.model)

    def rendered(self, prompt: Prompt) -> str:
        """Return the prompt as the text that goes to the processor."""
        pictured = bool(prompt.images())
        if pictured and not self._multimodal:
            raise self._imageless()
        if self._chat:
            return self._template(self._conversation(prompt).chat(), True)
        return prompt.raw(self._placeholder if pictured else "")

    def _imageless(self) -> ArgumentError:
        """Return the error for prompts with images if the processor has no part for images."""
        config: Any = self.model.config
        if config.get_text_config() is config:
            mend = "choose a model that takes images (in a harness, another pretrained=)"
            return ArgumentError(f"{self.name} is a text model, but the task has images: {mend}")
        found = f"but the processor is a {type(self._processor).__name__}, which takes none"
        return ArgumentError(f"the task has images, {found}: pass the processor of {self.name}, not its tokenizer")

    def _conversation(self, prompt: Prompt) -> Prompt:
        return prompt if self._multiturn else prompt.inline()

    def text_parts(self, prompt: Prompt) -> list[str]:
        """Return the prompt as text, and the texts before, in and after its target."""
        return [self.rendered(prompt), prompt.target_delimiter, prompt.target, prompt.fewshot_delimiter]

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Run the first forward of a generation over the prompts, so that positions are the same as in the evaluation.

        Prompts with images and prompts without images have separate forwards, in their order. The token that is
        generated has no meaning, since its logits are not computed.
        """
        self.prepared(prompts)()

    def prepared(self, prompts: Sequence[Prompt]) -> Callable[[], None]:
        """Preprocess prompts on the CPU, and return the function that runs them as :meth:`run` does.

        The processor keeps settings of its last call. So no two threads may preprocess at once.
        """
        return partial(self._run, [self._inputs(group, 0) for group in _with_images_or_without(prompts)])

    @torch.no_grad()
    def _run(self, groups: Sequence[Any]) -> None:
        with logits_unread(self.model):
            for inputs in groups:
                self._generate(self._on_device(inputs), max_new_tokens=1, do_sample=False, **GREEDY)

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
        if self._chat:
            text = writing.continuation(self._conversation(prompt), self._template)
            text = prompt.target if text is None else text.rstrip()
        else:
            text = prompt.target_delimiter + prompt.target + prompt.fewshot_delimiter
        return writing.following_ids(before, text, self._ids)

    def greedy_replies(self, prompts: Sequence[Prompt], new_tokens: int, edited: bool) -> list[Reply]:
        """Return greedy answers of at most ``new_tokens`` tokens; see :class:`Reply`. Nothing depends on ``edited``."""
        answers = self.answers(prompts, {"max_new_tokens": new_tokens, "do_sample": False})
        return [Reply(answer.text, answer.output_tokens < new_tokens) for answer in answers]

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], more: Mapping[str, Any] | None = None
    ) -> list[GeneratedAnswer]:
        """Return the answers to a batch of prompts.

        Args:
            prompts: the batch.
            settings: the generation settings of a task, among them ``until``.
            more: settings that go to transformers as they are.
        """
        groups = (self._answers(group, settings, more or {}) for group in _with_images_or_without(prompts))
        return [answer for answers in groups for answer in answers]

    def _answers(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], more: Mapping[str, Any]
    ) -> list[GeneratedAnswer]:
        stops = self._stops(prompts, settings.get("until") or ())
        limit = int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or 256)
        chosen = {name: settings[name] for name in SAMPLING if settings.get(name) is not None} | dict(more)
        sampling = samples(settings)
        if not sampling:
            chosen |= GREEDY
        inputs = self._on_device(self._inputs(prompts, limit))
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
            answers.append(GeneratedAnswer(text, taken, int((row != self._tokenizer.pad_token_id).sum())))
        return answers

    def _stops(self, prompts: Sequence[Prompt], until: str | Sequence[str]) -> list[str]:
        """Return the texts that end an answer: the task's ``until``, and for raw prompts the few-shot delimiter."""
        stops = [until] if isinstance(until, str) else list(until)
        if not self._chat:
            stops += [prompt.fewshot_delimiter for prompt in prompts]
        return [stop for stop in dict.fromkeys(stops) if stop]

    def _generate(self, inputs: Mapping[str, Any], **settings: Any) -> torch.Tensor:
        generate: Any = self.model.generate
        fixed = {"pad_token_id": self._tokenizer.pad_token_id} | FIXED
        output: torch.Tensor = generate(**inputs, **fixed, **_NEUTRAL | settings)
        return output

    def _inputs(self, prompts: Sequence[Prompt], new_tokens: int) -> Any:
        """Return the inputs of a batch, on the CPU.

        Raises:
            DocumentError: the processor refuses an image.
            ContextLengthError: a prompt and ``new_tokens`` new tokens are longer than the model's context.
        """
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
        return inputs

    def _on_device(self, inputs: Any) -> Any:
        """Return the inputs on the device of the model, with its precision."""
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
        if self._image_placeholder is not None:
            return self._image_placeholder
        template = self._template if getattr(self._processor, "chat_template", None) else None
        return writing.placeholder(template, getattr(self._processor, "image_token", None))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def padding_token(tokenizer: Any) -> str:
    """Return a padding token for a tokenizer without such a token. Padding is masked, so any token serves."""
    for name in ("eos_token", "unk_token", "bos_token"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return str(token)
    return str(tokenizer.convert_ids_to_tokens(0))


def _remedy(prompts: Sequence[Prompt], tokens: int, new_tokens: int, context: int) -> str:
    """Return advice that makes a prompt of ``tokens`` tokens and its answer fit."""
    if any(prompt.demonstrations for prompt in prompts) and tokens > context - new_tokens:
        return "pass a smaller shots= (or fit_shots= if this happened while fitting)" + (
            f", or at most {context - tokens} max_new_tokens with --gen_kwargs" if tokens < context else ""
        )
    if tokens < context:
        return f"pass at most {context - tokens} max_new_tokens with --gen_kwargs, or in the task's generation_kwargs"
    return "its question alone is too long for this model, choose another pretrained= or smaller images"


def _with_images_or_without(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Return ``prompts`` in their order, in groups with images and without images: some models take no mixture."""
    return [list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: bool(prompt.images()))]


def _sizes(images: Sequence[Sequence[Any]]) -> list[str]:
    return sorted({f"{image.width} x {image.height}" for row in images for image in row})
