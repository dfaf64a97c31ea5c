"""A synthetic task of lmms-eval: prompts of this package as requests that any wrapper understands."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image

from lmms_mtv.models.prompts import Message

_TASK: Final = "lmms_mtv"
_SPLIT: Final = "prompts"


class Document(NamedTuple):
    """A prompt as a document: text and images for a simple wrapper, messages for a chat wrapper."""

    text: str
    images: list[Image.Image]
    messages: list[Message]


@contextmanager
def requests_for(
    wrapper: lmms, documents: Sequence[Document], settings: Mapping[str, Any], simple: bool
) -> Iterator[list[Instance]]:
    """Yield requests over documents, which the wrapper finds in its ``task_dict`` inside the block.

    Args:
        wrapper: the wrapper that answers.
        documents: the documents, one for each request.
        settings: the generation settings; each request gets a copy.
        simple: True if the wrapper takes text and images, not messages.
    """
    wrapper.task_dict[_TASK] = {_SPLIT: list(documents)}
    requests = []
    for index, document in enumerate(documents):
        own = copy.deepcopy(dict(settings))
        where = (index, _TASK, _SPLIT)
        args = (document.text, own, _images, *where) if simple else (document.text, _messages, own, *where)
        metadata = {"task": _TASK, "doc_id": index, "repeats": 1, "split": _SPLIT}
        requests.append(Instance("generate_until", args, 0, metadata))
    try:
        yield requests
    finally:
        wrapper.task_dict.pop(_TASK, None)


def _images(document: Document) -> list[Image.Image]:
    return list(document.images)


def _messages(document: Document) -> list[Message]:
    # Wrappers may extend the list that they get.
    return [{"role": turn["role"], "content": [dict(part) for part in turn["content"]]} for turn in document.messages]
