"""Copies of data sets on the hub, and single files from the web.

Only the needed columns are loaded, and images stay encoded.
"""

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
    """A split of a data set on the hub.

    Attributes:
        task: name of the task that uses the split.
        path: name of the repository on the hub.
        split: name of the split.
        columns: columns that the task needs, among them ``image``.
        revision: commit of the repository; empty for the newest commit.
    """

    task: str
    path: str
    split: str
    columns: tuple[str, ...]
    revision: str = ""


@functools.cache
def table(copy: Copy) -> Dataset:
    """Return the split with encoded images.

    Raises:
        DataError: the split cannot be loaded.
    """
    copy = dataclasses.replace(copy, revision=copy.revision or _newest(copy.path))
    where = f"{copy.path} on the hub (split {copy.split}, revision {copy.revision or 'newest'})"
    try:
        split = datasets.load_dataset(
            copy.path, split=copy.split, revision=copy.revision or None, columns=list(copy.columns)
        )
        if missing := [name for name in copy.columns if name not in split.column_names]:
            raise ValueError(f"it has no column {', '.join(missing)}")
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        raise DataError(f"{where} cannot be loaded: {_reason(error)}; {mended_by(copy.task)}") from error
    for name, kind in split.features.items():
        if isinstance(kind, datasets.Image):
            split = split.cast_column(name, datasets.Image(decode=False))
    return split


def texts(copy: Copy) -> Dataset:
    """Return the split without the images."""
    return table(copy).remove_columns("image")


def _newest(path: str) -> str:
    """Return the newest commit, so that a run records its data; empty if the hub does not give the commit."""
    try:
        commit = str(HfApi().dataset_info(path).sha)
    except (OSError, ValueError, HfHubHTTPError):
        return ""
    logger.warning("%s is not pinned to a revision: its newest commit is %s", path, commit)
    return commit


def _reason(error: BaseException) -> str:
    """Return the message of an error, or of its cause if the message is only a name."""
    cause = error if error.__cause__ is None or " " in str(error).strip() else error.__cause__
    return f"{type(cause).__name__}: " + " ".join(str(cause).split())[:300]


def reference(copy: Copy, row: int) -> str:
    """Return the reference to the image of a row."""
    return f"{PREFIX}{copy.path}:{copy.split}:{row}"


def image(copy: Copy, row: int) -> bytes:
    """Return the encoded image of a row."""
    content = table(copy)[row]["image"]
    encoded: bytes = content["bytes"] if content["bytes"] is not None else Path(content["path"]).read_bytes()
    return encoded


def names(copy: Copy) -> list[str | None]:
    """Return the file names of the images of a split, None for an image without a name."""
    names: list[str | None] = pc.struct_field(table(copy).data.column("image"), "path").to_pylist()
    return names


def downloaded(file: File, task: str) -> Path:
    """Return the path of a file from the web in the cache of the datasets library, after a check of its SHA-256.

    Args:
        file: the file.
        task: the name of the task, for error messages.

    Raises:
        DataError: the file cannot be downloaded, or has another SHA-256.
    """
    try:
        # Without the request for an ETag, a cached file needs no network.
        options = datasets.DownloadConfig(use_etag=False)
        path = Path(datasets.DownloadManager(download_config=options).download(file.url))
    except (OSError, ValueError, ConnectionError, DatasetsError) as error:
        raise DataError(f"{file.url} cannot be downloaded: {_reason(error)}; {mended_by(task)}") from error
    if file.sha256 and (digest := checksum(path, "sha256")) != file.sha256:
        raise DataError(f"{file.url} has sha256 {digest}, expected {file.sha256}; {mended_by(task)}")
    return path
