"""The evaluation data of the paper's tasks: from the hub, or from a folder that ``lmms-mtv prepare`` made.

Rows hold text and references to images. An image is opened when a prompt needs it.
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
"""Tasks that are prepared together."""


def sources(name: str) -> list[Source]:
    """Return where the data of a task come from, or of all tasks of a group.

    Raises :class:`ArgumentError` if there is no such task or group.
    """
    return GROUPS[name] if name in GROUPS else [source(name)]


def source(task: str) -> Source:
    """Return where the data of a task come from. Raises :class:`ArgumentError` if there is no such task."""
    if task not in SOURCES:
        raise unknown("task with data of its own", task, SOURCES)
    return SOURCES[task]


def documents(task: str, split: str) -> Dataset:
    """Return the rows of a split: of the folder in ``LMMS_MTV_DATA``, or of the hub if that is not set.

    Raises :class:`DataError` if they cannot be had, or are not as many as they should be.
    """
    known = source(task)
    if root := os.environ.get(FOLDER):
        rows = prepared.rows(known, Path(root).expanduser(), split)
    else:
        try:
            rows = known.fetch(split)
        except MtvError:
            raise
        except prepared.FORM_ERRORS as error:
            raise DataError(
                f"the copy of {task} on the hub is not what it was ({error!r}): {mended_by(task)}"
            ) from error
        prepared.check_count(known, split, len(rows), "the copy on the hub")
    return Dataset.from_list(rows)


def image(task: str, reference: str) -> Image.Image:
    """Return the image that a row of ``task`` refers to, in RGB.

    Raises :class:`DocumentError` if it is missing or damaged.
    """
    stored = reference.startswith(hub.PREFIX)
    path = Path(os.environ.get(FOLDER, ""), task, reference).expanduser()
    try:
        return pictures.opened(io.BytesIO(_stored(task, reference)) if stored else path)
    except pictures.UNREADABLE as error:
        name = reference if stored else path
        raise DocumentError(f"image {name} of task {task} does not open ({error}): {mended_by(task)}") from error


def _stored(task: str, reference: str) -> bytes:
    """Return the encoded image that a reference into a copy on the hub names."""
    path, split, row = reference.removeprefix(hub.PREFIX).rsplit(":", 2)
    copies = [*vqa.COPIES.values(), *(copy for known in episodes.SETS for copy in known.copies)]
    return hub.image(next(c for c in copies if (c.task, c.path, c.split) == (task, path, split)), int(row))
