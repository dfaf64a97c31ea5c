"""The evaluation data of the paper's tasks: from the hub, or from a folder that ``lmms-mtv prepare`` made.

Rows hold text and references to images. An image is opened when a prompt needs it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from PIL import Image

from lmms_mtv.data import episodes, hub, prepared, vqa, words
from lmms_mtv.data.official import Official
from lmms_mtv.data.source import FOLDER, Source, mended_by
from lmms_mtv.errors import DataError, unknown

__all__ = ["FOLDER", "SOURCES", "Official", "documents", "image", "prepare", "source"]

SOURCES: Mapping[str, Source] = {source.task: source for source in (*vqa.SOURCES, *episodes.SOURCES, *words.SOURCES)}

prepare = prepared.prepare


def source(task: str) -> Source:
    """Where the data of a task come from. Raises :class:`ArgumentError` if there is no such task."""
    if task not in SOURCES:
        raise unknown("task with data of its own", task, SOURCES)
    return SOURCES[task]


def documents(task: str, split: str) -> Dataset:
    """The rows of a split: of the folder in ``LMMS_MTV_DATA``, or of the hub if that is not set.

    Raises :class:`DataError` if they cannot be had, or are not as many as they should be.
    """
    known = source(task)
    if root := os.environ.get(FOLDER):
        rows = prepared.rows(known, Path(root).expanduser(), split)
    else:
        rows = known.fetch(split)
        prepared.check_count(known, split, len(rows), "the copy on the hub")
    return Dataset.from_list(rows)


def image(task: str, reference: str) -> Image.Image:
    """The image that a row of ``task`` refers to, in RGB. Raises :class:`DataError` if it is missing or damaged."""
    stored = reference.startswith(hub.PREFIX)
    path = Path(os.environ.get(FOLDER, ""), task, reference).expanduser()
    try:
        return Image.open(io.BytesIO(hub.image(reference)) if stored else path).convert("RGB")
    except (OSError, SyntaxError) as error:
        name = reference if stored else path
        raise DataError(f"image {name} of task {task} does not open ({error}): {mended_by(task)}") from error
