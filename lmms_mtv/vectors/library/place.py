"""The location of a library, and the names of its files and folders."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Final

VARIABLE: Final = "LMMS_MTV_LIBRARY"
"""Name of the environment variable with the root of the library."""

FILE: Final = "vector.safetensors"
PAGE: Final = "README.md"

_LONGEST: Final = 96
_PLAIN: Final = re.compile(r"\w(?:[\w.-]*\w)?(?:/\w(?:[\w.-]*\w)?)*", re.ASCII)
_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{16}", re.DOTALL)


def default_root() -> Path:
    """Return the folder in ``LMMS_MTV_LIBRARY``, else ``lmms-mtv/library`` in the user's cache."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else user_cache() / "library"


def user_cache() -> Path:
    """Return the folder of this package in the user's cache, without expanding ``~``."""
    if sys.platform == "darwin":
        cache = Path("~/Library/Caches")
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache / "lmms-mtv"


def folder_name(name: str) -> str:
    """Return a folder name for any ``name``, of at most 96 ASCII characters. Different names get different folders.

    ``owner/model`` becomes ``owner--model``. A name that cannot be written this way becomes its readable characters, a
    ``~`` and a digest of the whole name.
    """
    written = name.replace("/", "--")
    if _PLAIN.fullmatch(name) and "--" not in name and ".." not in name and len(written) <= _LONGEST:
        return written
    readable = re.sub(r"\W+", "-", name, flags=re.ASCII).strip("-")[:64]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable}~{digest}"


def is_temporary(name: str) -> bool:
    """Return whether ``name`` is the temporary name of an unfinished write, which may be running or interrupted."""
    return _TEMPORARY.fullmatch(name) is not None
