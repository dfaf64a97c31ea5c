"""How a 2-way 1-shot episode is shown, and how its answer is scored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from PIL import Image

from lmms_mtv import data
from lmms_mtv.data.answers import cut
from lmms_mtv.harness.documents import documents
from lmms_mtv.harness.lmms.failure import fail_with_status

__all__ = ["documents"]

Doc = dict[str, Any]


@fail_with_status
def visual(doc: Doc) -> list[Image.Image]:
    """The image of option A, that of option B, and the query."""
    return [data.image(doc["data"], reference) for reference in doc["images"]]


def _parts(doc: Doc, noun: str) -> list[str]:
    """The text after each of the three images."""
    asked = (
        f"What is the type of {noun} in the image? A.{doc['a']} B.{doc['b']}\n"
        "Answer with the option's letter from the given choice directly. Answer:"
    )
    return [f"{asked} A\n", f"{asked} B\n", asked]


def _text(doc: Doc, noun: str) -> str:
    """The prompt in one piece, for models whose wrappers put images where ``<image>`` stands."""
    return "".join(f"<image>{part}" for part in _parts(doc, noun))


def _messages(doc: Doc, noun: str) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for image, part in zip(visual(doc), _parts(doc, noun), strict=True):
        content += [{"type": "image", "url": image}, {"type": "text", "text": part}]
    return [{"role": "user", "content": content}]


flower_text, bird_text, texture_text = (functools.partial(_text, noun=n) for n in ("flower", "bird", "texture"))
flower_messages, bird_messages, texture_messages = (
    functools.partial(_messages, noun=n) for n in ("flower", "bird", "texture")
)


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer up to its first full stop or line break is the letter, in either case."""
    return {"exact_match": float(cut(results[0]).lower() == doc["answer"].lower())}
