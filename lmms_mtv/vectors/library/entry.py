"""One vector of a library, and what can be wrong with a file in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_mtv.vectors import VectorCard


@dataclass(frozen=True)
class Entry:
    """The file of a vector, what its card says, and its size in bytes. The tensors are not read yet."""

    path: Path
    card: VectorCard
    bytes: int

    @property
    def id(self) -> str:
        return self.card.id

    @property
    def order(self) -> tuple[Any, ...]:
        """What entries are sorted by."""
        card = self.card
        return (card.model, card.task, card.method, card.shots, card.seed, self.id, str(self.path))


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file or folder of a library, and what mends it."""

    path: Path
    what: str
