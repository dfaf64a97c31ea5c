"""How VizWiz and OK-VQA show a question, and how their answers are scored."""

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
"""The authors' instruction, before the first image of a prompt. The task file has it too, as its description."""


@fail_with_status
def visual(doc: Doc) -> list[Image.Image]:
    return [data.image(doc["data"], doc["image"])]


def question(doc: Doc) -> str:
    return f"{doc['question']} Answer:"


def vizwiz_messages(doc: Doc) -> list[dict[str, Any]]:
    (image,) = visual(doc)
    content = [
        {"type": "text", "text": VIZWIZ},
        {"type": "image", "url": image},
        {"type": "text", "text": question(doc)},
    ]
    return [{"role": "user", "content": content}]


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """VQA accuracy (arXiv 1505.00468), in [0, 1].

    Mean over each choice of all annotators but one of min(1, number of them who gave ``answer`` / 3), after the
    normalisation of the EvalAI server: lower case, no punctuation or articles, digits for number words.
    """
    normalised = EvalAIAnswerProcessor()
    given = normalised(answer)
    agree = [normalised(other) == given for other in annotators]
    return sum(min(1.0, (sum(agree) - own) / 3) for own in agree) / len(agree)


def score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    return {"vqa_accuracy": vqa_accuracy(cut(results[0]), doc["answers"])}


def scores(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    answer = cut(results[0])
    return {
        "vqa_accuracy_raw": vqa_accuracy(answer, doc["answers"]),
        "vqa_accuracy_stemmed": vqa_accuracy(answer, doc["answers_stemmed"]),
    }
