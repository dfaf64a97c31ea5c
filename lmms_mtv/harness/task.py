"""A task of the harness as a source of prompts: its queries, and the training examples for demonstrations."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
from datasets import Dataset
from lmms_eval.utils import apply_template
from PIL import Image

from lmms_mtv.errors import ArgumentError, DataError, LeakageError
from lmms_mtv.fitting import Episode
from lmms_mtv.harness.prompts import Demonstration, Message, Prompt

Doc = Mapping[str, Any]


class TaskPrompts:
    """The prompts of one task of lmms-eval.

    ``demonstrations`` is a split of the task's dataset, or ``path:split`` of another dataset with the same columns;
    the default is what the task declares, or its few-shot or training split. Nothing is loaded before it is needed.
    """

    def __init__(self, task: Any, demonstrations: str | None) -> None:
        self._task = task
        self.name: str = task.config.task
        self.evaluated: str = task.config.test_split or task.config.validation_split
        self._source = demonstrations
        self._documents: Dataset | None = None

    @property
    def declared(self) -> dict[str, Any]:
        """What the task says under ``metadata: mtv:``."""
        metadata = self._task.config.metadata
        found = metadata.get("mtv", {}) if isinstance(metadata, Mapping) else {}
        return dict(found)

    @property
    def split(self) -> str:
        """The split that demonstrations come from.

        Raises :class:`DataError` if the task has none, :class:`LeakageError` if it is the one that is evaluated.
        """
        config = self._task.config
        source = self._source or self.declared.get("demonstrations") or config.fewshot_split or config.training_split
        if source is None:
            raise DataError(
                f"task {self.name} has no training split to take demonstrations from: pass demonstrations=SPLIT "
                f"(splits: {', '.join(self._task.dataset)}) or demonstrations=PATH:SPLIT of another dataset"
            )
        path, _, split = str(source).rpartition(":")
        if split == self.evaluated and path in ("", config.dataset_path):
            raise LeakageError(
                f"demonstrations={source} is the split on which task {self.name} is evaluated: choose another split"
            )
        return str(source)

    def __len__(self) -> int:
        return len(self._training)

    def prompt(self, episode: Episode) -> Prompt:
        """The prompt of a training query, with its target."""
        query = self._demonstration("training", self._training, episode.query)
        description = self._description(self._training[episode.query])
        return self._made(query.messages, description, episode.demonstrations, query.target)

    def evaluation(self, doc_id: int, split: str, shots: int, seed: int) -> Prompt:
        """The prompt of an evaluated document after ``shots`` demonstrations.

        They depend on the seed, the task and the document alone: not on batches, on other requests or on processes.
        """
        chosen: Sequence[int] = ()
        if shots:
            total = len(self._training)
            if total < shots:
                raise DataError(
                    f"task {self.name} has {total} training examples, fewer than shots={shots}: pass a smaller shots="
                )
            chosen = random.Random(f"{seed}/{self.name}/{doc_id}").sample(range(total), shots)
        documents = self._task.dataset[split]
        messages = self._messages(f"{split} document {doc_id}", documents, doc_id)
        return self._made(messages, self._description(documents[doc_id]), chosen, "")

    def examples_digest(self) -> str:
        """SHA-256 of the training examples' contents, media left out."""
        bare = self._training
        media = [name for name, kind in bare.features.items() if _is_media(kind)]
        digest = hashlib.sha256()
        for doc in bare.remove_columns(media):
            digest.update(json.dumps(doc, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @property
    def _training(self) -> Dataset:
        if self._documents is None:
            path, _, split = self.split.rpartition(":")
            config = self._task.config
            found = self._task.dataset if not path else _load(path)
            if split not in found:
                raise DataError(f"demonstrations={self.split}: there is no split {split!r}, only {', '.join(found)}")
            self._documents = found[split]
            # The harness has done this for the splits that the task names, and for no other.
            done = (config.training_split, config.validation_split, config.test_split, config.fewshot_split)
            if config.process_docs is not None and (path or split not in done):
                self._documents = config.process_docs(self._documents)
        return self._documents

    def _made(self, query: Sequence[Message], description: str, demonstrations: Sequence[int], target: str) -> Prompt:
        config = self._task.config
        shown = tuple(self._demonstration("training", self._training, index) for index in demonstrations)
        return Prompt(
            query,
            shown,
            target,
            description,
            config.target_delimiter or "",
            config.fewshot_delimiter or "",
        )

    def _demonstration(self, kind: str, documents: Dataset, index: int) -> Demonstration:
        messages = self._messages(f"{kind} example {index}", documents, index)
        named = self._task.config.doc_to_target
        if isinstance(named, str) and named not in documents.column_names and "{" not in named:
            # The harness renders such a name as itself, and every demonstration would answer with that word.
            raise DataError(
                f"doc_to_target of task {self.name} is {named!r}, which is no column of its training examples "
                f"({', '.join(documents.column_names)}): correct it in the task file"
            )
        target = self._task.doc_to_target(documents[index])
        if isinstance(target, int) and self._task.config.doc_to_choice is not None:
            target = self._task.doc_to_choice(documents[index])[target]
        if isinstance(target, list):
            target = target[0] if target else ""
        return Demonstration(messages, str(target))

    def _messages(self, called: str, documents: Dataset, index: int) -> list[Message]:
        """The question of a document as the task puts it, its images opened and converted to RGB."""
        try:
            doc = documents[index]
            if callable(self._task.config.doc_to_messages):
                messages = self._task.doc_to_messages(doc)
            else:
                # Not the task's own doc_to_messages: for text it would add demonstrations of its own choice.
                visuals = self._task.doc_to_visual(doc) if self._task.config.doc_to_visual is not None else ()
                content = [{"type": "image", "url": visual} for visual in visuals or ()]
                content.append({"type": "text", "text": self._task.doc_to_text(doc)})
                messages = [{"role": "user", "content": content}]
            # A prompt has the description once, at its beginning.
            return _without(self._description(doc), [_opened(message) for message in messages])
        except (OSError, SyntaxError) as error:
            raise DataError(f"an image of {called} of task {self.name} does not open: {error}") from error

    def _description(self, doc: Doc) -> str:
        """What the task says before everything else, written as the harness writes it."""
        return str(apply_template(self._task.config.description or "", doc))


def declared_settings(task: TaskPrompts, known: Sequence[str]) -> dict[str, Any]:
    """The method settings a task declares. Raises :class:`ArgumentError` if one is unknown to every method."""
    declared = {name: value for name, value in task.declared.items() if name != "demonstrations"}
    if other := sorted(declared.keys() - set(known)):
        raise ArgumentError(f"task {task.name} declares {', '.join(other)} under metadata: mtv: which no method knows")
    return declared


def _opened(message: Message) -> Message:
    def part_opened(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        image = part.get("url")
        if part["type"] == "image" and isinstance(image, str):
            image = Image.open(image)
        if part["type"] != "image" or not isinstance(image, Image.Image):
            raise DataError(
                f"found a part of type {part['type']!r} ({type(image).__name__}) in a message, expected images and "
                "text: base=hf runs tasks of images and text only"
            )
        return {**part, "url": image.convert("RGB")}

    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": message["role"], "content": [part_opened(part) for part in parts]}


def _without(description: str, messages: list[Message]) -> list[Message]:
    """``messages`` without the text part ``description`` at their beginning, if it is there."""
    first, *parts = messages[0]["content"]
    if not parts or first != {"type": "text", "text": description}:
        return messages
    return [{**messages[0], "content": parts}, *messages[1:]]


def _load(path: str) -> Any:
    try:
        return datasets.load_dataset(path)
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(f"demonstrations={path}:... cannot be loaded: {error}") from error


def _is_media(kind: Any) -> bool:
    inner = getattr(kind, "feature", kind)
    return isinstance(inner, datasets.Image | datasets.Audio | datasets.Video)
