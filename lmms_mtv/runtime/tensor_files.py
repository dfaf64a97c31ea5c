"""Files of tensors, in safetensors format only, with JSON in the header. Reads are limited."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parsed
from safetensors.torch import save as serialized
from torch import Tensor

from lmms_mtv.errors import VectorFileError

LIMIT: Final = 2**30
"""Largest size of a file that is read, in bytes. A vector of 80 layers of 64 heads of size 128 takes 3 MB."""

HEADER_LIMIT: Final = 2**24
"""Largest size of a header that is read, in bytes. A card with 600 losses takes 20 kB."""


def read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the float32 tensors of a file.

    Raises:
        VectorFileError: the file is not an intact regular safetensors file of float32 tensors within :data:`LIMIT` and
            :data:`HEADER_LIMIT`.
    """
    with _opened(path) as (file, size):
        metadata = _metadata(path, file, size)
        file.seek(0)
        try:
            # From the open file and not from the path, so that the checked file is the parsed file.
            tensors = parsed(file.read(size))
        except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
            raise _damaged(path, str(error)) from None
    if other := sorted(name for name, tensor in tensors.items() if tensor.dtype != torch.float32):
        raise VectorFileError(
            f"{path} has tensors that are not float32 ({', '.join(other)[:200]}): fit the vector again"
        )
    return metadata, tensors


def metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a file, without reading the tensors.

    Raises:
        VectorFileError: the file is not a regular file within the limits, or its header is damaged.
    """
    with _opened(path) as (file, size):
        return _metadata(path, file, size)


def safetensors_bytes(tensors: Mapping[str, Tensor], described: Mapping[str, str]) -> bytes:
    """Return the content of a safetensors file with the given tensors and with ``described`` as its metadata."""
    content: bytes = serialized(dict(tensors), dict(described))
    return content


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a regular file that is no link, and yield the file and its size in bytes."""
    # os.path and not Path: os.path answers False for texts that cannot be a path (too long, a zero byte).
    if os.path.islink(path):
        raise VectorFileError(f"{path} is a link, and links are not followed: name the file itself")
    if not os.path.isfile(path):
        raise VectorFileError(f"no vector file at {path}: check the path (in a harness, vector=), or fit a vector")
    try:
        with open(path, "rb", opener=_unfollowed) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise VectorFileError(f"{path} is no regular file")
            if found.st_size > LIMIT:
                raise VectorFileError(f"{path} has {found.st_size:,} bytes, a vector has at most {LIMIT:,}: not read")
            yield file, found.st_size
    except OSError as error:
        raise VectorFileError(f"{path} cannot be read ({error.strerror or error})") from error


def _unfollowed(path: str, flags: int) -> int:
    """Open ``path`` without following a link, and without waiting for a pipe, that has replaced the file."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _metadata(path: Path, file: BinaryIO, size: int) -> dict[str, str]:
    claim = int.from_bytes(file.read(8), "little")
    if size < 8 or claim > size - 8:
        raise _damaged(path, f"a header of {claim:,} bytes in a file of {size:,}")
    if claim > HEADER_LIMIT:
        raise VectorFileError(f"{path} has a header of {claim:,} bytes, a vector's has at most {HEADER_LIMIT:,}")
    try:
        header = json.loads(file.read(claim))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from None
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its header has no metadata of texts")
    return metadata


def _damaged(path: Path, reason: str) -> VectorFileError:
    return VectorFileError(f"{path} is damaged or no safetensors file ({reason}): fit the vector again")
