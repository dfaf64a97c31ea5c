"""Training examples without a harness: texts, images and answers from Python."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

from PIL import Image

from lmms_mtv.data.pictures import UNREADABLE, opened, rgb
from lmms_mtv.errors import DataError
from lmms_mtv.fit.examples import Episode
from lmms_mtv.models.prompts import Demonstration, Prompt
from lmms_mtv.models.text import one_line

_LIST: Final = "a list of (text, answer) or (text, images, answer), or the rows of a datasets.Dataset"

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
        image_marks: the texts that stand for an image in a prompt. No example may have one of them, since images are
            put in front of its text.

    Raises:
        DataError: ``rows`` is no list of examples, or is empty.
    """

    rows: Sequence[Any]
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    image_marks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.rows, str | PathLike):
            raise DataError(
                f"examples={str(self.rows)!r}: a path is no list of examples, read the file and pass {_LIST}"
            )
        listed = hasattr(self.rows, "__len__") and hasattr(self.rows, "__getitem__")
        if not listed or isinstance(self.rows, Mapping):
            raise self._unlisted()
        if not len(self):
            raise DataError(f"there are no examples: pass {_LIST}")

    def __len__(self) -> int:
        return len(self.rows)

    def prompt(self, episode: Episode) -> Prompt:
        """Return the prompt of an episode, with the target of its query.

        Raises:
            DataError: an example has an unknown form, an empty answer, or an image that cannot be opened.
        """
        query = self._shown(episode.query)
        shown = [self._shown(index) for index in episode.demonstrations]
        if episode.answers is not None:
            targets = [self._shown(index).target for index in episode.answers]
            shown = [Demonstration(each.messages, target) for each, target in zip(shown, targets, strict=True)]
        return self._prompt(query, shown)

    def digest(self) -> str:
        """Return the SHA-256 of the examples: of their texts, answers and pixels.

        Raises:
            DataError: as :meth:`prompt`, of any example.
        """
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
        try:
            row = self.rows[index]
        except (KeyError, TypeError) as error:
            # A table of pandas has columns at its keys.
            raise self._unlisted() from error
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
        self._check_texts(index, text, answer)
        if images is None:
            images = ()
        elif not isinstance(images, Sequence) or isinstance(images, str | bytes):
            images = (images,)
        content: list[dict[str, Any]] = [{"type": "image", "url": _picture(index, image)} for image in images]
        return Demonstration([{"role": "user", "content": [*content, {"type": "text", "text": text}]}], answer)

    def _check_texts(self, index: int, text: str, answer: str) -> None:
        """Check that an example has an answer, and no text that stands for an image."""
        if not answer.strip():
            raise DataError(
                f"example {index} has an empty answer, from which nothing is learned: give it one, or omit it"
            )
        for name, written in (("text", text), ("answer", answer)):
            for mark in self.image_marks:
                if mark in written:
                    raise DataError(
                        f"example {index}: its {name} already has {mark}: leave it out, images are put in front of the "
                        "text"
                    )

    def _unlisted(self) -> DataError:
        return DataError(f"examples is a {type(self.rows).__name__}, expected {_LIST}")


def _picture(index: int, image: Any) -> Image.Image:
    """Return the image of an example in RGB."""
    if isinstance(image, Image.Image):
        return rgb(image)
    if not isinstance(image, str | PathLike):
        raise DataError(f"example {index}: an image is a Pillow image or a path, found {type(image).__name__}")
    try:
        return opened(image)
    except FileNotFoundError as error:
        raise DataError(f"example {index}: there is no image at {os.fspath(image)}") from error
    except UNREADABLE as error:
        raise DataError(f"example {index}: the image {os.fspath(image)} cannot be read: {one_line(error)}") from error
