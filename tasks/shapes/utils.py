"""The images, the question and the answers of the shapes tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image

from lmms_mtv.shapes import questions, scenes
from lmms_mtv.shapes.questions import Answer

Doc = dict[str, Any]


def draw(doc: Doc) -> list[Image.Image]:
    """Return the image of a scene."""
    return [scenes.draw(scenes.from_mapping(doc))]


def question(doc: Doc) -> str:
    """Return the question, which is the same for every scene."""
    return questions.QUESTION


def _of_document(answer: Answer) -> Callable[[Doc], str]:
    """Return the function of a document that answers for the scene of the document."""
    return lambda doc: answer(scenes.from_mapping(doc))


color_en = _of_document(questions.TASKS["color_en"])
color_es = _of_document(questions.TASKS["color_es"])
shape_en = _of_document(questions.TASKS["shape_en"])
shape_es = _of_document(questions.TASKS["shape_es"])
background_en = _of_document(questions.TASKS["background_en"])
background_es = _of_document(questions.TASKS["background_es"])
position_en = _of_document(questions.TASKS["position_en"])
position_es = _of_document(questions.TASKS["position_es"])
phrase_en = _of_document(questions.TASKS["phrase_en"])
labels_position = _of_document(questions.labels("position"))
labels_shape = _of_document(questions.labels("shape"))
