"""The parts of a request of lmms-eval: its task, its document and its generation settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task

from lmms_mtv.errors import DataError
from lmms_mtv.models.generation import samples


def task_of(request: Instance) -> Any:
    """Return the harness's task of a request: the owner of its bound ``doc_to_messages`` or ``doc_to_visual``.

    Raises:
        DataError: the request is not a request of ``generate_until``.
    """
    for argument in request.args[1:3]:
        if isinstance(task := getattr(argument, "__self__", None), Task):
            return task
    raise only_generation([request])


def settings_of(request: Instance) -> dict[str, Any]:
    """Return the generation settings of a request.

    The settings stand before the images for a simple model, and after the messages for a chat model.
    """
    settings: dict[str, Any] = next(argument for argument in request.args[1:3] if isinstance(argument, dict))
    return settings


def document_of(request: Instance) -> tuple[int, str]:
    """Return the number and the split of the document of a request."""
    return request.args[3], request.args[5]


def show_prompts(requests: Sequence[Instance], texts: Mapping[int, str]) -> None:
    """Put the text of the whole prompt into each request, so that the harness's samples have this text as ``input``.

    Args:
        requests: the requests of the harness.
        texts: the text of a prompt, by the number of the document.
    """
    for request in requests:
        if (text := texts.get(document_of(request)[0])) is not None:
            request.arguments = (text, *request.arguments[1:])


def groups_of_equal_settings(requests: Sequence[Instance]) -> list[list[int]]:
    """Return the positions of requests, in groups with the same generation settings, as a batch needs them."""
    groups: dict[str, list[int]] = {}
    for position, request in enumerate(requests):
        groups.setdefault(json.dumps(settings_of(request), sort_keys=True, default=str), []).append(position)
    return list(groups.values())


def batch_order(requests: Sequence[Instance], group: Sequence[int]) -> list[int]:
    """Return the positions of a group of requests with equal settings, in the order in which batches take them.

    The longest texts come first, so that a batch has little padding, and a prompt that does not fit is found at once.
    Images do not count, since a document's images have to be opened to be counted.
    Answers that are drawn at random keep their order, since they depend on it.
    """
    if samples(settings_of(requests[group[0]])):
        return list(group)
    return sorted(group, key=lambda position: -len(requests[position].args[0]))


def only_generation(requests: Sequence[Instance]) -> DataError:
    """Return the error for requests that ``mtv`` cannot answer."""
    kinds = sorted({f"{request.task_name} ({request.request_type})" for request in requests})
    return DataError(f"mtv runs tasks with output_type generate_until in lmms-eval, found {', '.join(kinds)}")
