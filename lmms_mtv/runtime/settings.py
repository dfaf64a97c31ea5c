"""Settings that say what they mean."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(default: Any, meaning: str) -> Any:
    """Return a field of a dataclass of settings, with what it means in the metadata under ``help``."""
    return dataclasses.field(default=default, metadata={"help": meaning})
