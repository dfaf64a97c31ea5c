"""Entries of a library, and problems with its files."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_mtv.vectors import VectorCard


@dataclass(frozen=True)
class Entry:
    """A vector's file, whose tensors are not read yet.

    Attributes:
        path: path of the file.
        card: the card in the file.
        bytes: size of the file in bytes.
        modified: time when the file was written, in seconds since 1970.
    """

    path: Path
    card: VectorCard
    bytes: int
    modified: float = 0.0

    @property
    def id(self) -> str:
        """Id of the recipe: :attr:`VectorCard.id`."""
        return self.card.id

    @property
    def date(self) -> str:
        """Date and time when the file was written, in the zone of this machine."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.modified))

    @property
    def order(self) -> tuple[Any, ...]:
        """Sort key of entries: model, task, method, shots, seed, id and path."""
        card = self.card
        return (card.model, card.task, card.method, card.shots, card.seed, self.id, str(self.path))


@dataclass(frozen=True)
class Problem:
    """A problem with a file or folder of a library.

    Attributes:
        path: path of the file or folder.
        what: description of the problem, and of its remedy.
    """

    path: Path
    what: str
