"""The text of error messages."""

from __future__ import annotations


def one_line(error: Exception, limit: int = 400) -> str:
    """Return the message of an exception on one line of at most ``limit`` characters."""
    return " ".join(str(error).split())[:limit]
