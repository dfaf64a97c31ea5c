"""Copies of data sets on the hub, and single files from the web: only the needed columns, images unread."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import datasets
import pyarrow.compute as pc
from datasets import Dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from lmms_mtv.data.official import File, checksum
from lmms_mtv.data.source import mended_by
from lmms_mtv.errors import DataError

logger = logging.getLogger(__name__)

PREFIX: Final = "hub:"
"""A reference to an image in a copy on the hub is ``hub:<path>:<split>:<row>``."""


@dataclass(frozen=True)
class Copy:
    """A split of a data set on the hub, and the columns that ``task`` needs of it, ``image`` among them.

    No ``revision``: the newest.
    """

    task: str
    path: str
    split: str
    columns: tuple[str, ...]
    revision: str = ""


@functools.cache
def table(copy: Copy) -> Dataset:
    """Return the split, with its images left undecoded. Raises :class:`DataError` if it cannot be had."""
    copy = dataclasses.replace(copy, revision=copy.revision or _newest(copy.path))
    where = f"{copy.path} on the hub (split {copy.split}, revision {copy.revision or 'newest'})"
    try:
        found = datasets.load_dataset(
            copy.path, split=copy.split, revision=copy.revision or None, columns=list(copy.columns)
        )
        if lacking := [name for name in copy.columns if name not in found.column_names]:
            raise ValueError(f"it has no column {', '.join(lacking)}")
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        raise DataError(f"{where} cannot be loaded: {_reason(error)}; {mended_by(copy.task)}") from error
    for name, kind in found.features.items():
        if isinstance(kind, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return found


def texts(copy: Copy) -> Dataset:
    """Return the split without its images."""
    return table(copy).remove_columns("image")


def _newest(path: str) -> str:
    """Return the commit that is newest now, so that what a run used can be told; empty where the hub cannot say."""
    try:
        found = str(HfApi().dataset_info(path).sha)
    except (OSError, ValueError, HfHubHTTPError):
        return ""
    logger.warning("%s is not pinned to a revision: its newest commit is %s", path, found)
    return found


def _reason(error: BaseException) -> str:
    """Return what an error says, or its cause where it says no more than a name."""
    said = error if error.__cause__ is None or " " in str(error).strip() else error.__cause__
    return f"{type(said).__name__}: " + " ".join(str(said).split())[:300]


def reference(copy: Copy, row: int) -> str:
    """Return the reference to the image of a row."""
    return f"{PREFIX}{copy.path}:{copy.split}:{row}"


def image(copy: Copy, row: int) -> bytes:
    """Return the encoded image of a row."""
    content = table(copy)[row]["image"]
    found: bytes = content["bytes"] if content["bytes"] is not None else Path(content["path"]).read_bytes()
    return found


def names(copy: Copy) -> list[str | None]:
    """Return the names that the images of a split were uploaded with."""
    found: list[str | None] = pc.struct_field(table(copy).data.column("image"), "path").to_pylist()
    return found


def downloaded(file: File, task: str) -> Path:
    """Return a single file from the web, kept in the cache of the library datasets, and checked."""
    try:
        # No ETag is asked for: what is in the cache is used without network.
        options = datasets.DownloadConfig(use_etag=False)
        path = Path(datasets.DownloadManager(download_config=options).download(file.url))
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        raise DataError(f"{file.url} cannot be downloaded: {_reason(error)}; {mended_by(task)}") from error
    if file.sha256 and (found := checksum(path, "sha256")) != file.sha256:
        raise DataError(f"{file.url} has sha256 {found}, expected {file.sha256}; {mended_by(task)}")
    return path
