"""Copies of data sets on the hub, and single files from the web: pinned, only the needed columns, images unread."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import datasets
from datasets import Dataset
from datasets.exceptions import DatasetsError

from lmms_mtv.data.official import File, checksum
from lmms_mtv.data.source import mended_by
from lmms_mtv.errors import DataError

logger = logging.getLogger(__name__)

PREFIX: Final = "hub:"
"""A reference to an image in a copy on the hub is ``hub:<task>:<path>:<revision>:<split>:<row>``."""


@dataclass(frozen=True)
class Copy:
    """A split of a data set on the hub, and the columns that ``task`` needs of it. No ``revision``: the newest."""

    task: str
    path: str
    split: str
    columns: tuple[str, ...]
    revision: str = ""


@functools.lru_cache(maxsize=8)
def table(copy: Copy) -> Dataset:
    """The split, with its images left undecoded. Raises :class:`DataError` if it cannot be had."""
    where = f"{copy.path} on the hub (split {copy.split}, revision {copy.revision or 'newest'})"
    try:
        found = datasets.load_dataset(
            copy.path, split=copy.split, revision=copy.revision or None, columns=list(copy.columns)
        )
        if lacking := [name for name in copy.columns if name not in found.column_names]:
            raise ValueError(f"it has no column {', '.join(lacking)}")
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{where} cannot be loaded: {reason}; {mended_by(copy.task)}") from error
    if not copy.revision:
        logger.warning("%s has no pinned revision: compare counts, and pin what you report", where)
    for name, kind in found.features.items():
        if isinstance(kind, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return found


def reference(copy: Copy, row: int) -> str:
    """The reference to the image of a row."""
    return f"{PREFIX}{copy.task}:{copy.path}:{copy.revision}:{copy.split}:{row}"


def image(reference: str) -> bytes:
    """The encoded image that a reference names."""
    task, path, revision, split, row = reference.removeprefix(PREFIX).split(":")
    content = _images(task, path, revision, split)[int(row)]["image"]
    found: bytes = content["bytes"] if content["bytes"] is not None else Path(content["path"]).read_bytes()
    return found


@functools.lru_cache(maxsize=8)
def _images(task: str, path: str, revision: str, split: str) -> Dataset:
    return table(Copy(task, path, split, ("image",), revision))


def downloaded(file: File, task: str) -> Path:
    """A single file from the web, kept in the cache of the library datasets, and checked."""
    try:
        path = Path(datasets.DownloadManager().download(file.url))
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{file.url} cannot be downloaded: {reason}; {mended_by(task)}") from error
    if file.sha256 and (found := checksum(path, "sha256")) != file.sha256:
        raise DataError(f"{file.url} has sha256 {found}, expected {file.sha256}; {mended_by(task)}")
    return path
