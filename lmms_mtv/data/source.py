"""What a data set is to the tasks: rows for each split, from the hub or made of the official files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_mtv.data.official import Official

FOLDER = "LMMS_MTV_DATA"
"""Environment variable with the folder that ``lmms-mtv prepare`` wrote. Unset: data come from the hub."""

Row = dict[str, Any]
"""A row of a split: text, and references to images."""


@dataclass(frozen=True)
class Source:
    """The data of one task.

    ``rows`` is the official number of rows of each split. ``fetch`` gives the rows of a split from the hub,
    ``prepare`` those of all splits from official files; images are named by references that
    :func:`lmms_mtv.data.image` opens. ``regenerates``: rows can be drawn from official splits instead of taken from
    the paper's files.
    """

    task: str
    rows: Mapping[str, int]
    fetch: Callable[[str], list[Row]]
    prepare: Callable[[Official], Mapping[str, list[Row]]]
    regenerates: bool = False


def mended_by(task: str) -> str:
    """Return the end of an error about data: the command that mends it."""
    return (
        f"put the official files into a folder, run `lmms-mtv prepare {task} --source FOLDER --output DATA` and set "
        f"{FOLDER}=DATA"
    )
