"""The training examples of a task of either harness: their split and their documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import datasets
import PIL.Image
from datasets import Dataset

from lmms_mtv.errors import ArgumentError, DataError, LeakageError

_PART: Final = 1 << 16
"""Bytes at the beginning, in the middle and at the end of a picture or film that identify the picture or film."""

_MEDIA: Final = (datasets.Image, datasets.Audio, datasets.Video)


class Training:
    """The training examples of one task.

    Nothing is loaded before it is needed.

    Args:
        task: the task of a harness.
        demonstrations: a split of the task's dataset, or ``path:split`` of another dataset with the same columns. None
            takes the split that the task declares, or ``fewshot_split``, or the training split.
        fewshot_split: the split from which the harness itself draws demonstrations.
        process: the harness's function for the documents of a split.
    """

    def __init__(
        self,
        task: Any,
        demonstrations: str | None,
        fewshot_split: str | None,
        process: Callable[[Any], Any] | None = None,
    ) -> None:
        self._task = task
        self.name: str = task.config.task
        self.evaluated: str = task.config.test_split or task.config.validation_split
        self._source = demonstrations
        self._fewshot_split = fewshot_split
        self._process = process
        self._documents: Dataset | list[Any] | None = None

    @property
    def declared(self) -> dict[str, Any]:
        """The entries of the task under ``metadata: mtv:``."""
        metadata = self._task.config.metadata
        return dict(metadata.get("mtv", {})) if isinstance(metadata, Mapping) else {}

    def settings(self, known: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return the settings that the task declares, by the name of their method.

        Raises:
            ArgumentError: a name is none of the methods in ``known``.
        """
        declared = {name: value for name, value in self.declared.items() if name != "demonstrations"}
        for name, value in declared.items():
            if name not in known or not isinstance(value, Mapping):
                raise ArgumentError(
                    f"task {self.name} declares {name}: {value} under metadata: mtv:, expected a method and its "
                    f"settings, such as mtv: {{fit_shots: 16}} (methods: {', '.join(known)})"
                )
        return {name: dict(value) for name, value in declared.items()}

    @property
    def stops(self) -> list[str]:
        """The texts that end an answer (``until``)."""
        until = (getattr(self._task.config, "generation_kwargs", None) or {}).get("until") or ()
        return [until] if isinstance(until, str) else [str(stop) for stop in until]

    @property
    def split(self) -> str:
        """The split that demonstrations come from.

        Raises:
            DataError: the task has no such split.
            LeakageError: the split is the evaluated split.
        """
        config = self._task.config
        declared = self.declared.get("demonstrations")
        source = self._source or declared or self._fewshot_split or config.training_split
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

    @property
    def documents(self) -> Any:
        """The examples, a ``Dataset`` or a list.

        Raises:
            DataError: there is no such split or dataset.
        """
        if self._documents is None:
            path, _, split = self.split.rpartition(":")
            splits = self._task.dataset if not path else _load(path)
            if split not in splits:
                raise DataError(f"demonstrations={self.split}: there is no split {split!r}, only {', '.join(splits)}")
            self._documents = self._process(splits[split]) if self._process is not None else splits[split]
        return self._documents

    def digest(self) -> str:
        """Return the SHA-256 of the examples' contents. Media count by their encoded bytes, anywhere in a column.

        Media of more than 192 KiB count by their size, beginning, middle and end. A path does not count.
        """
        bare, digest = self.documents, hashlib.sha256()
        if isinstance(bare, Dataset):
            media = [name for name, kind in bare.features.items() if _has_media(kind)]
            for name in media:
                _add_media(digest, bare.select_columns([name]), bare.features[name])
            bare = bare.remove_columns(media)
        for doc in bare:
            digest.update(json.dumps(doc, sort_keys=True, default=_plain).encode())
        return digest.hexdigest()

    def target(self, doc: Mapping[str, Any]) -> str:
        """Return the answer to a document, the first answer if there are several.

        Raises:
            DataError: the task's ``doc_to_target`` is a plain name that is no column, or the document has no answer.
        """
        named = self._task.config.doc_to_target
        if isinstance(named, str) and named not in doc and "{" not in named:
            # The harness renders such a name as itself, and every demonstration would answer with this word.
            raise DataError(
                f"doc_to_target of task {self.name} is {named!r}, which is no column of its training examples "
                f"({', '.join(doc)}): correct it in the task file"
            )
        target = self._task.doc_to_target(doc)
        if target is None or (target == "None" and isinstance(named, str) and None in doc.values()):
            # As text the answer would be the word None, and a model would learn this word.
            raise DataError(
                f"a training example of task {self.name} has no answer (null): leave such examples out with "
                "process_docs in the task file, or choose another split with demonstrations="
            )
        if isinstance(target, int) and self._task.config.doc_to_choice is not None:
            target = self._task.doc_to_choice(doc)[target]
        if isinstance(target, list):
            target = target[0] if target else ""
        return str(target)


def _load(path: str) -> Any:
    try:
        return datasets.load_dataset(path)
    except (OSError, ValueError, ConnectionError) as error:
        raise DataError(f"demonstrations={path}:... cannot be loaded: {error}") from error


def _add_media(digest: Any, column: Dataset, kind: Any) -> None:
    """Add a column that contains media to ``digest``, without decoding the media."""
    for table in column.with_format("arrow").iter(batch_size=1000):
        for value in table.column(0).to_pylist():
            _add_value(digest, value, kind)


def _add_value(digest: Any, value: Any, kind: Any) -> None:
    """Add a stored value to ``digest``, with marks that distinguish lists, structs and media."""
    if isinstance(kind, _MEDIA) and isinstance(value, Mapping):
        content = value.get("bytes")
        if content is None and value.get("path"):
            content = _file(str(value["path"]))
        content = content or b""
        middle = len(content) // 2
        short = len(content) <= 3 * _PART
        parts = (content,) if short else (content[:_PART], content[middle : middle + _PART], content[-_PART:])
        digest.update(f"media {len(content)} ".encode() + b"".join(parts))
    elif isinstance(value, list):
        digest.update(f"list {len(value)} ".encode())
        inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
        for item in value:
            _add_value(digest, item, inner)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(f"{name} ".encode())
            _add_value(digest, value[name], kind.get(name) if isinstance(kind, Mapping) else None)
    else:
        digest.update(json.dumps(value, default=_plain).encode())


def _file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _plain(value: Any) -> str:
    """Return a value that JSON cannot hold as text that is the same in every process."""
    if isinstance(value, PIL.Image.Image):
        return f"image {value.mode} {value.size} {hashlib.sha256(value.tobytes()).hexdigest()}"
    return str(value)


def _has_media(kind: Any) -> bool:
    """Return whether a feature of a dataset contains images, sounds or films."""
    if isinstance(kind, Mapping):
        return any(_has_media(inner) for inner in kind.values())
    if isinstance(kind, list):
        return any(_has_media(inner) for inner in kind)
    return isinstance(kind, _MEDIA) or (hasattr(kind, "feature") and _has_media(kind.feature))
