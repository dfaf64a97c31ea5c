"""A base that is a model of lmms-eval. Prompts of this package go through the model's own preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import CacheHook

from lmms_mtv.harness.lmms.bases.harness_model import HarnessModel, WrappedConfig
from lmms_mtv.harness.lmms.bases.side_effects import quiet, unmeasured
from lmms_mtv.harness.lmms.bases.synthetic_task import Document, requests_for
from lmms_mtv.harness.lmms.bases.templates import QUESTION, Template, templates_of, tokenizer_of
from lmms_mtv.harness.lmms.bases.wrapper_class import parameters, wrapper_class
from lmms_mtv.hooks import Sites, capture
from lmms_mtv.models import prompts as writing
from lmms_mtv.models.prompts import Prompt, Reply
from lmms_mtv.runtime.batches import BatchSize

OWN: Final = ("force_simple", "fewshot_as_multiturn", "image_placeholder")
"""Arguments of a wrapped base that are not arguments of its wrapper."""

# Arguments of a wrapper that change no result, or that a card has elsewhere.
_NOT_IN_RECIPE: Final = ("pretrained", "revision", "dtype", "torch_dtype", "device", "device_map", "batch_size")
_ONE_TOKEN: Final = {"until": ["\n"], "max_new_tokens": 1, "do_sample": False, "temperature": 0, "num_beams": 1}
_DEFAULT_PLACEHOLDER: Final = "<image>"
_NUMBERED_PLACEHOLDER: Final = "<image {n}>"


def known(name: str, force_simple: bool = False) -> tuple[str, ...]:
    """Return the names of all arguments that the base ``name`` takes."""
    return (*OWN, *parameters(wrapper_class(name, force_simple)))


class WrapperBase:
    """A base around a loaded model of lmms-eval.

    Args:
        harness_model: the loaded model.
    """

    def __init__(self, harness_model: HarnessModel) -> None:
        self.harness_model = harness_model
        self.config: WrappedConfig = harness_model.config
        self.model = harness_model.model
        self.sites: Sites = harness_model.sites
        self.name, self.revision, self._text_files = harness_model.identity
        parameter = next(self.model.parameters())
        self.dtype = str(getattr(self.model, "dtype", parameter.dtype)).removeprefix("torch.")
        self.device: torch.device = parameter.device
        self.batch_size = BatchSize(harness_model.batch_size)
        # The template of the wrapper's prompts, none or one; None before the search.
        self._templates: tuple[Template, ...] | None = None

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The base, the arguments of its wrapper, and the files of a local checkpoint."""
        arguments = {key: value for key, value in self.config.arguments.items() if key not in _NOT_IN_RECIPE}
        files = {} if self._text_files is None else {"files": self._text_files}
        return {"base": self.config.name, **arguments, **files}

    def rendered(self, prompt: Prompt) -> str:
        """Return the texts of the prompt one after the other; only the wrapper knows the tokens between them."""
        return prompt.raw(_DEFAULT_PLACEHOLDER)

    def text_parts(self, prompt: Prompt) -> list[str]:
        """Return the tokens that the wrapper makes of the prompt, and the texts before, in and after its target."""
        kind = "simple" if self.harness_model.is_simple else "chat"
        ids = json.dumps(self._prompt_ids(prompt))
        return [kind, ids, prompt.target_delimiter, prompt.target, prompt.fewshot_delimiter]

    def run(self, prompts: Sequence[Prompt]) -> None:
        """Run the forwards of the prompts, each the first forward of a generation of one token.

        Raises:
            HookError: the model failed, or did not run once for every prompt.
        """
        with quiet(), unmeasured(), self._requests(prompts, _ONE_TOKEN) as requests:
            self.harness_model.run(requests)

    def lead_ids(self, prompt: Prompt) -> list[int]:
        """Return the ids of the blank tokens between the prompt and :meth:`target_ids`."""
        ids = self._answer_ids(prompt)
        return ids[: writing.blanks(ids, self._decode)]

    def target_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of the target and of the end of an answer, as the ids follow :meth:`lead_ids`.

        If the wrapper's prompts end in the text that its chat template writes before an answer, the tokens are those
        that the template writes for the target, up to the end of the turn. Otherwise the tokens are those of the target
        between the delimiters of the task.
        """
        ids = self._answer_ids(prompt)
        return ids[writing.blanks(ids, self._decode) :]

    def generate(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any], edited: bool
    ) -> tuple[list[GenerationResult], int]:
        """Return answers to prompts; see :meth:`HarnessModel.answers` for the answers to requests."""
        with quiet(), self._requests(prompts, settings) as requests:
            return self.harness_model.answers(requests, CacheHook(None), edited)

    def greedy_replies(self, prompts: Sequence[Prompt], new_tokens: int, edited: bool) -> list[Reply]:
        """Return greedy answers of at most ``new_tokens`` tokens; see :class:`~lmms_mtv.models.prompts.Reply`."""
        with unmeasured():
            answers, _ = self.generate(prompts, _ONE_TOKEN | {"until": [], "max_new_tokens": new_tokens}, edited)
        replies = []
        for answer, prompt in zip(answers, prompts, strict=True):
            ids = self._ids(answer.text)
            text = answer.text.split(prompt.fewshot_delimiter)[0] if prompt.fewshot_delimiter else answer.text
            replies.append(Reply(text, len(ids) < new_tokens - 1 or text != answer.text))
        return replies

    def document(self, prompt: Prompt) -> Document:
        """Return a prompt as a document of the synthetic task, in the form that the wrapper takes."""
        if not self.harness_model.is_simple:
            messages = (prompt if self.config.fewshot_as_multiturn else prompt.inline()).chat_with_images()
            return Document(prompt.raw(""), [], messages)
        images = prompt.images()
        if prompt.images_come_first():
            return Document(prompt.raw(""), images, [])
        mark = self._placeholder
        pieces = prompt.raw("\0").split("\0")
        text = pieces[0] + "".join(mark.replace("{n}", str(n)) + piece for n, piece in enumerate(pieces[1:], 1))
        return Document(text, images, [])

    def chat_template(self, prompt: Prompt) -> Template | None:
        """Return the chat template of the wrapper's prompts, or None if no template writes ``prompt``."""
        if self._templates is None:
            ids = self._prompt_ids(prompt)
            # Some wrappers set their template in the first generation.
            matching = (each for each in templates_of(self.harness_model.wrapper) if self._ends_in_turn(each, ids))
            self._templates = tuple(matching)[:1]
        return self._templates[0] if self._templates else None

    def _requests(
        self, prompts: Sequence[Prompt], settings: Mapping[str, Any]
    ) -> AbstractContextManager[list[Instance]]:
        documents = [self.document(prompt) for prompt in prompts]
        return requests_for(self.harness_model.wrapper, documents, settings, self.harness_model.is_simple)

    @property
    def _placeholder(self) -> str:
        if self.config.image_placeholder is not None:
            return self.config.image_placeholder
        # Several wrappers read numbered places if their interleave setting is on, and else put all images first.
        interleaved = getattr(self.harness_model.wrapper, "interleave_visuals", False)
        return _NUMBERED_PLACEHOLDER if interleaved else _DEFAULT_PLACEHOLDER

    def _answer_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids between the prompt and the end of the answered prompt."""
        template = self.chat_template(prompt)
        question = Prompt(QUESTION, target=prompt.target)
        text = None if template is None else writing.continuation(question, template)
        if template is not None and text is not None:
            before, text = template(question.chat(), True), text.rstrip()
        else:
            before, text = "", prompt.target_delimiter + prompt.target + prompt.fewshot_delimiter
        return writing.following_ids(before, text, self._ids)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids that the wrapper makes of a prompt."""
        with capture(self.model, self.sites) as captured:
            self.run([prompt])
        ids: list[int] = captured.prefill().inputs["input_ids"][0].tolist()
        return ids

    def _ends_in_turn(self, template: Template, ids: list[int]) -> bool:
        """Return whether ``ids`` end in the text that the template writes between a question and its answer."""
        text = template(QUESTION, True)
        question = text[: text.rindex("?") + 1]
        turn = self._ids(text)[len(self._ids(question)) :]
        return bool(turn) and ids[-len(turn) :] == turn

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids)
        return text

    @property
    def _tokenizer(self) -> Any:
        # Some wrappers have a tokenizer only after the first generation.
        return tokenizer_of(self.harness_model.wrapper, self.config.name)
