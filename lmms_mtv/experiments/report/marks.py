"""Tables of results inside other texts, between marks.

``<!-- lmms-mtv report PATH -->`` starts the summary of the results folder PATH, relative to the folder of the text.
``<!-- lmms-mtv report PATH tasks -->`` starts the table by task. ``<!-- /lmms-mtv report -->`` ends a table.
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
    """Return the text with the current tables between the marks of these results. Other marks stay unchanged.

    Args:
        text: the content of a file.
        base: the folder of the file.
        results: the results whose tables are inserted.

    Raises:
        DataError: a mark of these results has no end.
        ArgumentError: a mark asks for an unknown table.
    """
    by_folder = {of_folder.folder.resolve(): of_folder for of_folder in results}
    parts, position = [], 0
    for mark in _BEGIN.finditer(text):
        marked = by_folder.get((base / mark["path"]).resolve())
        if marked is None:
            continue
        end = text.find(_END, mark.end())
        following = _BEGIN.search(text, mark.end())
        if end < 0 or (following and following.start() < end):
            raise DataError(f"{mark[0]} has no end: expected {_END} on a separate line after the mark")
        table = tables.kind(mark["kind"] or "summary")(marked).markdown()
        parts += [text[position : mark.end()], "\n", table, "\n"]
        position = end
    return "".join([*parts, text[position:]])


def count(text: str, base: Path, results: Sequence[Results]) -> int:
    """Return the number of marks of these results in ``text``, a file in the folder ``base``."""
    folders = {of_folder.folder.resolve() for of_folder in results}
    return sum((base / mark["path"]).resolve() in folders for mark in _BEGIN.finditer(text))
