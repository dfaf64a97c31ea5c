"""What of a generated text is the answer."""

from __future__ import annotations


def cut(text: str) -> str:
    """``text`` up to its first full stop or line break, as the MTV authors' evaluation cuts it."""
    return text.split(".")[0].split("\n")[0].strip()
