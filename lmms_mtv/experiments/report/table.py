"""A table of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: title of the table.
        header: names of the columns.
        rows: the rows; the first column has the name of the row.
        notes: sentences below the table.
        words: True if the cells are words and not numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = field(default=())
    words: bool = False

    def markdown(self) -> str:
        """Return the table as Markdown, followed by a paragraph of the notes."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        text = text.replace("| --- |", "|---|").replace(" --- |", "---|")
        return "\n\n".join([text, " ".join(self.notes)]) if self.notes else text
