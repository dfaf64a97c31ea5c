"""The data source of a task: rows of each split, from the hub or from the official files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_mtv.data.official import Official

FOLDER = "LMMS_MTV_DATA"
"""Environment variable with the folder that ``lmms-mtv prepare`` wrote; if unset, data come from the hub."""

Row = dict[str, Any]
"""A row of a split: text, and references to images."""


@dataclass(frozen=True)
class Source:
    """The data source of a task.

    Attributes:
        task: name of the task.
        rows: official number of rows of each split.
        fetch: function that returns the rows of a split from the hub. :func:`lmms_mtv.data.image` opens the images.
        prepare: function that returns the rows of all splits from the official files.
        regenerates: True if rows can be drawn from the official splits instead of read from the files of the paper.
    """

    task: str
    rows: Mapping[str, int]
    fetch: Callable[[str], list[Row]]
    prepare: Callable[[Official], Mapping[str, list[Row]]]
    regenerates: bool = False


def mended_by(task: str) -> str:
    """Return the end of an error message about data: the commands that solve the problem."""
    return (
        f"put the official files into a folder, run `lmms-mtv prepare {task} --source FOLDER --output DATA` and set "
        f"{FOLDER}=DATA"
    )
