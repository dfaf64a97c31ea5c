"""Tables of results inside other texts, between marks.

``<!-- lmms-mtv report PATH -->`` begins a place for a summary of the results folder PATH (relative to the text's
folder), ``<!-- lmms-mtv report PATH tasks -->`` one for a table by task; ``<!-- /lmms-mtv report -->`` ends either.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from lmms_mtv.errors import DataError
from lmms_mtv.experiments.report import tables
from lmms_mtv.experiments.report.results import Results

_BEGIN: Final = re.compile(r"^<!-- lmms-mtv report (?P<path>\S+)(?: (?P<kind>\S+))? -->$", re.MULTILINE)
_END: Final = "<!-- /lmms-mtv report -->"


def inserted(text: str, base: Path, results: Sequence[Results]) -> str:
    """``text``, a file in the folder ``base``, with the table of each mark whose PATH is of ``results``.

    Other marks stay as they are. DataError for a mark of these without an end, ArgumentError for an unknown kind.
    """
    known = {found.folder.resolve(): found for found in results}
    parts, position = [], 0
    for mark in _BEGIN.finditer(text):
        found = known.get((base / mark["path"]).resolve())
        if found is None:
            continue
        end = text.find(_END, mark.end())
        following = _BEGIN.search(text, mark.end())
        if end < 0 or (following and following.start() < end):
            raise DataError(f"{mark[0]} has no end: expected {_END} after it, on a line of its own")
        table = tables.kind(mark["kind"] or "summary")(found).markdown()
        parts += [text[position : mark.end()], "\n", table, "\n"]
        position = end
    return "".join([*parts, text[position:]])


def count(text: str, base: Path, results: Sequence[Results]) -> int:
    """Return how many marks in ``text`` are of these results."""
    known = {found.folder.resolve() for found in results}
    return sum((base / mark["path"]).resolve() in known for mark in _BEGIN.finditer(text))
