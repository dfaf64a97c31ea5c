"""Settings of methods with their descriptions."""

from __future__ import annotations

import dataclasses
from typing import Any


def setting(default: Any, meaning: str) -> Any:
    """Return a field for a dataclass of settings.

    Args:
        default: default value of the setting.
        meaning: description of the setting, stored in the field's metadata under ``help``.
    """
    return dataclasses.field(default=default, metadata={"help": meaning})
