"""The pictures, the answers and the episodes of the tasks of pictures."""

from __future__ import annotations

import functools
from typing import Any, Final

from datasets import Dataset
from PIL import Image

from lmms_mtv.harness.documents import messages_with_images, text_with_images
from lmms_mtv.harness.lmms.failure import fail_with_status
from lmms_mtv.pictures import drawings, names

Doc = dict[str, Any]

_DOCUMENTS: Final = 200
"""Documents of a task in a split at most."""

_TEXT: Final = "\nAnswer:"


@fail_with_status
def picture(doc: Doc) -> list[Image.Image]:
    """Return the picture of a document."""
    return [drawings.draw(doc["code"], doc["seed"])]


def _with(documents: Dataset, field: str) -> Dataset:
    """Return the first documents whose emoji has an answer, with the answer."""
    shown = {each.code: each for each in (*names.things(), *names.countries())}
    answers = [getattr(shown[code], field) for code in documents["code"]]
    chosen = [index for index, answer in enumerate(answers) if answer][:_DOCUMENTS]
    return documents.select(chosen).add_column(field, [answers[index] for index in chosen])


with_english = functools.partial(_with, field="english")
with_spanish = functools.partial(_with, field="spanish")
with_german = functools.partial(_with, field="german")
with_category = functools.partial(_with, field="category")
with_plural = functools.partial(_with, field="plural")
with_country = functools.partial(_with, field="country")
with_capital = functools.partial(_with, field="capital")
with_currency = functools.partial(_with, field="currency")


@fail_with_status
def episode_pictures(doc: Doc) -> list[Image.Image]:
    """Return the two labelled pictures of an episode, and the query."""
    return [drawings.draw(each["code"], each["seed"]) for each in doc["pictures"]]


def _episode_parts(doc: Doc) -> list[str]:
    """Return the text after each of the three pictures."""
    return [*(f"{_TEXT} {label}\n\n" for label in doc["labels"]), _TEXT]


def episode_text(doc: Doc) -> str:
    """Return an episode as one text, for wrappers that put images at the places of ``<image>``."""
    return text_with_images(_episode_parts(doc))


def episode_messages(doc: Doc) -> list[dict[str, Any]]:
    """Return an episode as a chat message."""
    return messages_with_images(episode_pictures(doc), _episode_parts(doc))
