"""Parameters of the test matrix: representatives run by default, all members run in CI."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def members(values: Iterable[Any], *representatives: Any, label: Callable[[Any], str] | None = None) -> list[Any]:
    """Return test parameters for ``values``; all but the ``representatives`` have the marker ``slow``.

    Args:
        values: All members of one axis of the matrix.
        representatives: The members that the default selection runs.
        label: Gives the id of a member; without ``label`` pytest writes the id.

    Raises:
        ValueError: A representative is no member.
    """
    values = list(values)
    if strangers := [value for value in representatives if value not in values]:
        raise ValueError(f"representatives {strangers} are not among {values}")
    return [
        pytest.param(
            value,
            id=label(value) if label is not None else None,
            marks=() if value in representatives else pytest.mark.slow,
        )
        for value in values
    ]


def name(function: Callable[..., Any]) -> str:
    """Return the name of a function, as the id of a test parameter."""
    return function.__name__
