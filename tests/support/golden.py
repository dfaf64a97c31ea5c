"""Texts that may only change on purpose: ``python -m pytest --update-snapshots`` writes them anew."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"
COMMAND = "python -m pytest --update-snapshots tests/integration/test_tasks.py"


def check(name: str, text: str, update: bool) -> None:
    """Compare ``text`` with the stored one, or store it."""
    path = FOLDER / name
    if update:
        FOLDER.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    stored = path.read_text(encoding="utf-8") if path.is_file() else "(nothing stored)"
    assert text == stored, f"{path.name} is not what it was; if that is meant, run: {COMMAND}"
