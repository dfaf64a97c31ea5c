"""Where a library is, and the names of what is in it."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Final

VARIABLE: Final = "LMMS_MTV_LIBRARY"
"""Environment variable with the root of the library."""

FILE: Final = "vector.safetensors"
PAGE: Final = "README.md"

_LONGEST: Final = 96
_PLAIN: Final = re.compile(r"\w(?:[\w.-]*\w)?(?:/\w(?:[\w.-]*\w)?)*", re.ASCII)
_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{16}", re.DOTALL)


def default_root() -> Path:
    """Return the folder that ``LMMS_MTV_LIBRARY`` names, else ``lmms-mtv/library`` in the user's cache."""
    given = os.environ.get(VARIABLE)
    return Path(given) if given else user_cache() / "library"


def user_cache() -> Path:
    """Return the folder of this package in the user's cache, where ``~`` is not yet expanded."""
    if sys.platform == "darwin":
        cache = Path("~/Library/Caches")
    elif sys.platform == "win32":
        cache = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return cache / "lmms-mtv"


def folder_name(name: str) -> str:
    """Return one component of a path for any ``name``, of at most 96 ASCII characters; no two names share one.

    ``owner/model`` is ``owner--model``. A name that cannot be written like that keeps what is readable of it, and the
    digest of the whole after a ``~``.
    """
    written = name.replace("/", "--")
    if _PLAIN.fullmatch(name) and "--" not in name and ".." not in name and len(written) <= _LONGEST:
        return written
    readable = re.sub(r"\W+", "-", name, flags=re.ASCII).strip("-")[:64]
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{readable}~{digest}"


def is_temporary(name: str) -> bool:
    """Return whether something of this name is on its way to its real one, or was left there by a process that was
    killed.
    """
    return _TEMPORARY.fullmatch(name) is not None
