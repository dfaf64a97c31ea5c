"""Training examples without a harness: texts, images and answers from Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

from PIL import Image

from lmms_mtv.data.pictures import opened, rgb
from lmms_mtv.errors import DataError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.models.prompts import Demonstration, Prompt

_FORMS: Final = (
    "expected (text, answer), (text, images, answer), or a mapping with text, answer and, for pictures, image or images"
)


@dataclass(frozen=True)
class ExampleList:
    """Training examples as prompts: the images of an example, its text, and its answer.

    Attributes:
        rows: a sequence of ``(text, answer)`` or ``(text, images, answer)``, or of mappings with ``text``, ``answer``
            and, for pictures, ``image`` or ``images``, as the rows of a ``datasets.Dataset``. An image is a picture of
            Pillow or a path. A text may be empty.
        description: the text at the beginning of each prompt.
        target_delimiter: the text between a question and its answer, in raw prompts.
        fewshot_delimiter: the text between two examples, in raw prompts.
    """

    rows: Sequence[Any]
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, episode: Episode) -> Prompt:
        """Return the prompt of an episode, with the target of its query.

        Raises:
            DataError: an example has an unknown form.
        """
        query = self._shown(episode.query)
        shown = [self._shown(index) for index in episode.demonstrations]
        if episode.answers is not None:
            targets = [self._shown(index).target for index in episode.answers]
            shown = [Demonstration(each.messages, target) for each, target in zip(shown, targets, strict=True)]
        return self._prompt(query, shown)

    def digest(self) -> str:
        """Return the SHA-256 of the examples: of their texts, answers and pixels."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            shown = self._shown(index)
            prompt = self._prompt(shown, ())
            digest.update(json.dumps([prompt.raw("\0"), shown.target]).encode())
            for image in prompt.images():
                digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()

    def _prompt(self, query: Demonstration, shown: Sequence[Demonstration]) -> Prompt:
        return Prompt(
            query.messages, shown, query.target, self.description, self.target_delimiter, self.fewshot_delimiter
        )

    def _shown(self, index: int) -> Demonstration:
        row = self.rows[index]
        if isinstance(row, Mapping):
            if not {"text", "answer"} <= row.keys():
                raise DataError(f"example {index} has {', '.join(map(str, row))}: {_FORMS}")
            text, images, answer = row["text"], row.get("images", row.get("image")), row["answer"]
        elif isinstance(row, Sequence) and not isinstance(row, str) and len(row) in (2, 3):
            (text, answer), images = (row[0], row[-1]), row[1] if len(row) == 3 else ()
        else:
            raise DataError(f"example {index} is {type(row).__name__}: {_FORMS}")
        if not isinstance(text, str) or not isinstance(answer, str):
            found = f"text {type(text).__name__} and answer {type(answer).__name__}"
            raise DataError(f"example {index} has {found}: expected two texts")
        return _demonstration(text, images, answer)


def _demonstration(text: str, images: Any, answer: str) -> Demonstration:
    if images is None:
        images = ()
    elif isinstance(images, Image.Image | str | PathLike):
        images = (images,)
    content: list[dict[str, Any]] = [
        {"type": "image", "url": rgb(image) if isinstance(image, Image.Image) else opened(image)} for image in images
    ]
    return Demonstration([{"role": "user", "content": [*content, {"type": "text", "text": text}]}], answer)
