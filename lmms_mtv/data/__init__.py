"""The data of the paper's tasks, from the hub or from a folder that ``lmms-mtv prepare`` wrote.

Rows have text and references to images. An image is opened when a prompt needs the image.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

from datasets import Dataset
from PIL import Image

from lmms_mtv.data import episodes, hub, pictures, prepared, vqa, words
from lmms_mtv.data.official import Official
from lmms_mtv.data.prepared import prepare
from lmms_mtv.data.source import FOLDER, Source, mended_by
from lmms_mtv.errors import DataError, DocumentError, MtvError, unknown

__all__ = ["FOLDER", "SOURCES", "Official", "documents", "image", "prepare", "source", "sources"]

SOURCES: dict[str, Source] = {source.task: source for source in (*vqa.SOURCES, *episodes.SOURCES, *words.SOURCES)}


GROUPS: dict[str, list[Source]] = {"words": list(words.SOURCES)}
"""Sources of the task groups that ``lmms-mtv prepare`` converts together."""


def sources(name: str) -> list[Source]:
    """Return the data source of a task, or the sources of all tasks of a group.

    Raises:
        ArgumentError: no task or group has this name.
    """
    return GROUPS[name] if name in GROUPS else [source(name)]


def source(task: str) -> Source:
    """Return the data source of a task.

    Raises:
        ArgumentError: no task has this name.
    """
    if task not in SOURCES:
        raise unknown("task with data of its own", task, SOURCES)
    return SOURCES[task]


def documents(task: str, split: str) -> Dataset:
    """Return the rows of a split, from the folder in ``LMMS_MTV_DATA``, or from the hub if the variable is not set.

    Args:
        task: the name of the task.
        split: the name of the split.

    Raises:
        DataError: the data cannot be loaded, or the number of rows is not the official number.
    """
    task_source = source(task)
    if root := os.environ.get(FOLDER):
        rows = prepared.rows(task_source, Path(root).expanduser(), split)
    else:
        try:
            rows = task_source.fetch(split)
        except MtvError:
            raise
        except prepared.FORM_ERRORS as error:
            raise DataError(
                f"the copy of {task} on the hub has changed its form ({error!r}): {mended_by(task)}"
            ) from error
        prepared.check_count(task_source, split, len(rows), "the copy on the hub")
    return Dataset.from_list(rows)


def image(task: str, reference: str) -> Image.Image:
    """Return the image that a row of ``task`` refers to, in RGB.

    Args:
        task: the name of the task.
        reference: a path in the folder of the task, or a reference to an image on the hub.

    Raises:
        DocumentError: the image is missing or damaged.
    """
    on_hub = reference.startswith(hub.PREFIX)
    path = Path(os.environ.get(FOLDER, ""), task, reference).expanduser()
    try:
        return pictures.opened(io.BytesIO(_hub_image(task, reference)) if on_hub else path)
    except pictures.UNREADABLE as error:
        name = reference if on_hub else path
        raise DocumentError(f"image {name} of task {task} does not open ({error}): {mended_by(task)}") from error


def _hub_image(task: str, reference: str) -> bytes:
    """Return the encoded image that a reference to a copy on the hub names."""
    path, split, row = reference.removeprefix(hub.PREFIX).rsplit(":", 2)
    copies = [*vqa.COPIES.values(), *(copy for episode_set in episodes.SETS for copy in episode_set.copies)]
    return hub.image(next(c for c in copies if (c.task, c.path, c.split) == (task, path, split)), int(row))
