"""Writes of files that are atomic, and the reasons why a write cannot work."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """Write a file atomically, with its folders.

    Args:
        path: path of the file.
        content: content of the file.

    Raises:
        OSError: the file cannot be written. An earlier file at ``path`` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = temporary(path)
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def link(existing: Path, path: Path) -> bool:
    """Give a file a second name, atomically, so that its content is on the disk once. Return whether that worked.

    Args:
        existing: path of the file.
        path: the second path. A file there is replaced.

    Returns:
        False if the file system has no such links, or the paths are on different file systems; nothing has changed
        then.
    """
    partial = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(existing, partial, follow_symlinks=False)
        os.replace(partial, path)
    except OSError:
        return False
    finally:
        # Renaming one name of a file to another name of the same file leaves both.
        partial.unlink(missing_ok=True)
    return True


def temporary(path: Path) -> Path:
    """Return a hidden, unique path beside ``path``, for a file or folder that is renamed to ``path`` when complete."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def obstacle(folder: Path) -> str | None:
    """Return the reason why nothing can be written into ``folder``, in words, or None if writing works.

    A folder is made, and removed, in ``folder`` or in the nearest folder above that exists. The permissions alone do
    not tell.
    """
    try:
        probe = temporary(next(place for place in (folder, *folder.parents) if place.exists()) / "probe")
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return error.strerror or str(error)
    return None
