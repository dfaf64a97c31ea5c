"""A task of the harness as a source of prompts, with its queries and its training examples for demonstrations."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.utils import apply_template
from PIL import Image

from lmms_mtv.data.pictures import UNREADABLE, opened, rgb
from lmms_mtv.errors import DataError, DocumentError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.harness.lmms.requests import document_of
from lmms_mtv.harness.training import Training
from lmms_mtv.models.prompts import Demonstration, Message, Prompt

Doc = Mapping[str, Any]


class TaskPrompts:
    """The prompts of one task of lmms-eval. Nothing is loaded before it is needed.

    Args:
        task: the task of the harness.
        demonstrations: the split of the training examples, see :class:`~lmms_mtv.harness.training.Training`.
        as_sent: True leaves the description where the harness puts it for its own models; by default every prompt
            begins with the description.
        wrong: the share of training examples that show another example's answer when they are demonstrations. A query
            keeps its own answer.
        seed: the seed that draws the examples with wrong answers.
    """

    def __init__(
        self, task: Any, demonstrations: str | None, as_sent: bool = False, wrong: float = 0.0, seed: int = 0
    ) -> None:
        self._task = task
        self._as_sent = as_sent
        self._wrong, self._seed = wrong, seed
        self.training = Training(task, demonstrations, task.config.fewshot_split, self._processed)
        self.name = self.training.name

    def _processed(self, documents: Dataset) -> Dataset:
        """Return documents after the task's ``process_docs``; the harness itself processes the splits of a task."""
        config = self._task.config
        processed_splits = (config.training_split, config.validation_split, config.test_split, config.fewshot_split)
        if config.process_docs is None or any(documents is self._task.dataset.get(split) for split in processed_splits):
            return documents
        return config.process_docs(documents)

    def __len__(self) -> int:
        return len(self.training.documents)

    def digest(self) -> str:
        """Return the SHA-256 of the training examples, and of the choice of examples with a wrong answer."""
        digest = self.training.digest()
        if not self._wrong:
            return digest
        return hashlib.sha256(f"{digest} {self._wrong} {self._seed}".encode()).hexdigest()

    def prompt(self, episode: Episode) -> Prompt:
        """Return the prompt of a training query, with its target."""
        query = self._demonstration("training", self.training.documents, episode.query)
        description = self._description(self.training.documents[episode.query])
        prompt = self._prompt(query.messages, description, episode.demonstrations, query.target)
        if episode.answers is None:
            return prompt
        targets = [self.training.target(self.training.documents[index]) for index in episode.answers]
        shown = [Demonstration(d.messages, target) for d, target in zip(prompt.demonstrations, targets, strict=True)]
        return dataclasses.replace(prompt, demonstrations=tuple(shown))

    def evaluation(self, doc_id: int, split: str, shots: int, seed: int) -> Prompt:
        """Return the prompt of an evaluated document.

        The demonstrations depend only on the seed, the task and the document: not on batches, other requests or
        processes.

        Args:
            doc_id: the number of the document.
            split: the split of the document.
            shots: the number of demonstrations.
            seed: the seed of the demonstrations.

        Raises:
            DataError: the task has fewer training examples than ``shots``.
            DocumentError: an image of the prompt does not open.
        """
        chosen: Sequence[int] = ()
        if shots:
            total = len(self.training.documents)
            if total < shots:
                raise DataError(
                    f"task {self.name} has {total} training examples, fewer than shots={shots}: pass a smaller shots="
                )
            chosen = random.Random(f"{seed}/{self.name}/{doc_id}").sample(range(total), shots)
        documents = self._task.dataset[split]
        messages = self._messages(f"{split} document {doc_id}", documents, doc_id)
        return self._prompt(messages, self._description(documents[doc_id]), chosen, "")

    def _prompt(self, query: Sequence[Message], description: str, demonstrations: Sequence[int], target: str) -> Prompt:
        config = self._task.config
        shown = tuple(self._shown(index) for index in demonstrations)
        return Prompt(
            query,
            shown,
            target,
            description,
            config.target_delimiter or "",
            config.fewshot_delimiter or "",
        )

    def _shown(self, index: int) -> Demonstration:
        """Return a training example as a demonstration, with a wrong answer if the draw says so."""
        own = self._demonstration("training", self.training.documents, index)
        rng = random.Random(f"{self._seed}/{self.name}/wrong/{index}")
        if rng.random() >= self._wrong:
            return own
        documents = self.training.documents
        for other in rng.sample(range(len(documents)), len(documents)):
            if (target := self.training.target(documents[other])) != own.target:
                return Demonstration(own.messages, target)
        raise DataError(f"wrong={self._wrong}: all training examples of task {self.name} have the same answer")

    def _demonstration(self, kind: str, documents: Dataset, index: int) -> Demonstration:
        messages = self._messages(f"{kind} example {index}", documents, index)
        return Demonstration(messages, self.training.target(documents[index]))

    def _messages(self, label: str, documents: Dataset, index: int) -> list[Message]:
        """Return the question of a document in the form of the task, with its images opened and converted to RGB."""
        try:
            doc = documents[index]
            if self._writes_messages:
                messages = self._task.doc_to_messages(doc)
            else:
                # The task's own doc_to_messages would add other demonstrations to a text.
                visuals = self._task.doc_to_visual(doc) if self._task.config.doc_to_visual is not None else ()
                content = [{"type": "image", "url": visual} for visual in visuals or ()]
                content.append({"type": "text", "text": self._task.doc_to_text(doc)})
                messages = [{"role": "user", "content": content}]
            # A prompt has the description once, at its beginning.
            return _without(self._task_description(doc), [_opened(message) for message in messages])
        except (*UNREADABLE, DocumentError, SystemExit) as error:
            if isinstance(error, SystemExit) and not isinstance(error.__cause__, DocumentError):
                raise
            # A task of this package ends a command with every model. This model can go on.
            reason = error.__cause__ if isinstance(error, SystemExit) else error
            raise DocumentError(f"an image of {label} of task {self.name} does not open: {reason}") from error

    @property
    def _writes_messages(self) -> bool:
        """True if the task makes messages with its own function, for a chat model."""
        return isinstance(self._task, ConfigurableMessagesTask) and callable(self._task.config.doc_to_messages)

    def _task_description(self, doc: Doc) -> str:
        """Return the description of the task, as the harness writes the description."""
        return str(apply_template(self._task.config.description or "", doc))

    def _description(self, doc: Doc) -> str:
        """Return the description that the prompt begins with."""
        description = self._task_description(doc)
        if not self._as_sent or not isinstance(self._task, ConfigurableMessagesTask):
            return description
        if self._writes_messages:
            # The harness's messages have the description only if the task's own function adds it.
            content = self._task.doc_to_messages(doc)[0]["content"]
            return description if content and content[0] == {"type": "text", "text": description} else ""
        return description if self._task.config.doc_to_visual is None else ""


def task_for_model(task: Any, model: str) -> Any:
    """Return the task with the prompts and settings that the task file has for ``--model`` ``model``.

    Args:
        task: the task of the harness.
        model: the name of the model in lmms-eval.
    """
    prompts = task.config.lmms_eval_specific_kwargs or {}
    settings = task.config.model_specific_generation_kwargs or {}
    if model not in prompts and model not in settings:
        return task
    own = copy.copy(task)
    if model in prompts:
        own.lmms_eval_specific_kwargs = prompts[model]
    if model in settings:
        own._config = copy.copy(task.config)
        own._config.generation_kwargs = {**task.config.generation_kwargs, **settings[model]}
    return own


def task_requests(task: Any, requests: Sequence[Instance]) -> list[Instance]:
    """Return the requests that ``task`` makes of the documents of ``requests``, without demonstrations."""
    remade = []
    for request in requests:
        number, split = document_of(request)
        context = task.fewshot_context(task.dataset[split][number], 0)
        remade.append(task.construct_requests(doc_id=number, ctx=context, metadata=request.metadata))
    return remade


def _opened(message: Message) -> Message:
    def part_opened(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        image = part.get("url")
        if part["type"] == "image" and isinstance(image, str):
            return {**part, "url": opened(image)}
        if part["type"] != "image" or not isinstance(image, Image.Image):
            raise DataError(
                f"found a part of type {part['type']!r} ({type(image).__name__}) in a message, expected images and "
                "text: demonstrations, and every prompt of base=hf, are of images and text only"
            )
        return {**part, "url": rgb(image)}

    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": message["role"], "content": [part_opened(part) for part in parts]}


def _without(description: str, messages: list[Message]) -> list[Message]:
    """Return ``messages`` without the text part ``description``, if they begin with it."""
    first, *parts = messages[0]["content"]
    if not parts or first != {"type": "text", "text": description}:
        return messages
    return [{**messages[0], "content": parts}, *messages[1:]]
