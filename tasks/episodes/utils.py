"""The prompts and the score of 2-way 1-shot episodes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from lmms_mtv import data
from lmms_mtv.data.answers import cut
from lmms_mtv.harness.documents import documents, messages_with_images, text_with_images
from lmms_mtv.harness.lmms.failure import fail_with_status

__all__ = ["documents"]

Doc = dict[str, Any]


@fail_with_status
def visual(doc: Doc) -> list[Image.Image]:
    """Return the image of option A, the image of option B, and the query image."""
    return [data.image(doc["data"], reference) for reference in doc["images"]]


def _parts(doc: Doc, noun: str) -> list[str]:
    """Return the text after each of the three images."""
    question = (
        f"What is the type of {noun} in the image? A.{doc['a']} B.{doc['b']}\n"
        "Answer with the option's letter from the given choice directly. Answer:"
    )
    return [f"{question} A\n", f"{question} B\n", question]


def _text(doc: Doc, noun: str) -> str:
    """Return the prompt as one text, for wrappers that put images at the places of ``<image>``."""
    return text_with_images(_parts(doc, noun))


def _messages(doc: Doc, noun: str) -> list[dict[str, Any]]:
    """Return the prompt as a chat message."""
    return messages_with_images(visual(doc), _parts(doc, noun))


flower_text, bird_text, texture_text = (functools.partial(_text, noun=n) for n in ("flower", "bird", "texture"))
flower_messages, bird_messages, texture_messages = (
    functools.partial(_messages, noun=n) for n in ("flower", "bird", "texture")
)


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return 1 if the answer up to its first full stop or line break is the letter, in upper or lower case, else 0."""
    return {"exact_match": float(cut(results[0]).lower() == doc["answer"].lower())}
