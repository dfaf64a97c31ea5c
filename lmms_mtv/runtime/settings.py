"""Settings of methods with their descriptions, and the check that all whole numbers among arguments share."""

from __future__ import annotations

import dataclasses
from typing import Any

from lmms_mtv.errors import ArgumentError


def setting(default: Any, meaning: str) -> Any:
    """Return a field for a dataclass of settings.

    Args:
        default: default value of the setting.
        meaning: description of the setting, stored in the field's metadata under ``help``.
    """
    return dataclasses.field(default=default, metadata={"help": meaning})


def check_whole(name: str, value: object, least: int = 0) -> None:
    """Check that an argument is an integer of at least ``least``.

    Args:
        name: the name of the argument, for the message.
        value: the value. A harness makes the number -1.0 of the text ``-1``; the message has the text.
        least: the smallest value that is right.

    Raises:
        ArgumentError: the value is no integer, or too small.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= least:
        return
    shown = int(value) if isinstance(value, float) and value < 0 and value.is_integer() else value
    raise ArgumentError(f"{name}={shown!r}, expected an integer, {least} or more")
