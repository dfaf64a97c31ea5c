"""The prompts and the scores of VizWiz and OK-VQA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from PIL import Image

from lmms_mtv import data
from lmms_mtv.data.answers import cut
from lmms_mtv.harness.documents import documents
from lmms_mtv.harness.lmms.failure import fail_with_status

__all__ = ["documents"]

Doc = dict[str, Any]

VIZWIZ = (
    "First carefully understand the given examples. \n"
    "Then use the given image and answer the question in the same way as the examples. \n"
    "If the question can not be answered, respond unanswerable. "
)
"""The instruction of the authors before the first image of a prompt; the task file has the same description."""


@fail_with_status
def visual(doc: Doc) -> list[Image.Image]:
    """Return the image of the question."""
    return [data.image(doc["data"], doc["image"])]


def question(doc: Doc) -> str:
    """Return the text of the prompt."""
    return f"{doc['question']} Answer:"


def vizwiz_messages(doc: Doc) -> list[dict[str, Any]]:
    """Return the prompt of VizWiz as a chat message."""
    (image,) = visual(doc)
    content = [
        {"type": "text", "text": VIZWIZ},
        {"type": "image", "url": image},
        {"type": "text", "text": question(doc)},
    ]
    return [{"role": "user", "content": content}]


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Return the VQA accuracy (arXiv 1505.00468) of an answer, in [0, 1].

    The accuracy is min(1, n / 3), where n annotators gave ``answer``, averaged over all choices of all annotators but
    one. The EvalAI server normalises the answers: lower case, no punctuation or articles, digits for number words.
    """
    normalise = EvalAIAnswerProcessor()
    normalised = normalise(answer)
    agreements = [normalise(annotation) == normalised for annotation in annotators]
    return sum(min(1.0, (sum(agreements) - left_out) / 3) for left_out in agreements) / len(agreements)


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return the VQA accuracy of the answer up to its first full stop or line break."""
    return {"vqa_accuracy": vqa_accuracy(cut(results[0]), doc["answers"])}


def scores(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Return the VQA accuracy of the answer against the raw and against the stemmed answers."""
    answer = cut(results[0])
    return {
        "vqa_accuracy_raw": vqa_accuracy(answer, doc["answers"]),
        "vqa_accuracy_stemmed": vqa_accuracy(answer, doc["answers_stemmed"]),
    }
