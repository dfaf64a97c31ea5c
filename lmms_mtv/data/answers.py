"""The answer in a generated text."""

from __future__ import annotations


def cut(text: str) -> str:
    """Return ``text`` up to the first full stop or line break, as in the evaluation of the MTV authors."""
    return text.split(".")[0].split("\n")[0].strip()
