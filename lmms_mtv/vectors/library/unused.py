"""Vectors of a library that no stored result names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from lmms_mtv.errors import ArgumentError
from lmms_mtv.vectors.library.entry import Entry

_ID: Final = re.compile(rb"(?<![0-9a-f])[0-9a-f]{16}(?![0-9a-f])")

_RESULTS: Final = (".json", ".jsonl", ".yaml", ".yml")
"""Endings of files in which the harnesses and this package name vectors: results, samples, records, cells, plans."""


def unused(entries: Sequence[Entry], folders: Sequence[Path]) -> list[Entry]:
    """Return the entries that no result in ``folders`` names, in their order.

    A vector is named if its whole id is anywhere in a JSON or YAML file. Vectors that a named vector was made of
    (``parents`` of its card) count as named too.

    Args:
        entries: the entries of a library.
        folders: folders of results.

    Raises:
        ArgumentError: a folder does not exist, or the results name no entry at all: then the folders, or the library,
            are probably not the right ones.
    """
    ids = {entry.id for entry in entries}
    named = ids & {name for folder in folders for name in _names(folder)}
    if entries and not named:
        raise ArgumentError(
            f"no result in {', '.join(map(str, folders))} names a vector of this library, so nothing is removed: check "
            "the folders and --library"
        )
    parents = {entry.id: set(entry.card.parents) for entry in entries}
    waiting = list(named)
    while waiting:
        new = parents.get(waiting.pop(), set()) - named
        named |= new
        waiting += new
    return [entry for entry in entries if entry.id not in named]


def _names(folder: Path) -> Iterator[str]:
    """Yield everything in the results of a folder that could be the id of a vector."""
    if not folder.is_dir():
        raise ArgumentError(f"there is no folder {folder}: pass folders of results")
    for path in folder.rglob("*"):
        if path.suffix in _RESULTS and path.is_file():
            for match in _ID.finditer(path.read_bytes()):
                yield match[0].decode()
