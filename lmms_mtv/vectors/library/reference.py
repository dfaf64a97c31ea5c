"""References, which name vectors on a command line, and the search for the named vector."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lmms_mtv.errors import ArgumentError
from lmms_mtv.vectors.library.differences import differences
from lmms_mtv.vectors.library.entry import Entry
from lmms_mtv.vectors.library.place import FILE

_ID: Final = re.compile(r"[0-9a-f]{4,16}")
_TELLING: Final = ("model", "task", "method", "shots", "seed")
_LISTED: Final = 20

PREFIX: Final = "hub:"
"""Beginning of a reference to a vector on the hub: ``hub:<owner>/<name>`` or ``hub:<owner>/<name>@<revision>``."""

FORMS: Final = "a path, four or more digits of an id, task/method, or hub:owner/name"


def file(wanted: str) -> Path | None:
    """Return the vector's file if a reference is the path of the file or of its folder, None for other references.

    A reference that ends in ``.safetensors``, or that begins like a path, is a path even if there is no file.
    """
    path = Path(os.path.expanduser(wanted) if wanted.startswith("~/") else wanted)
    # os.path and not Path: os.path answers False for texts that cannot be a path (too long, a zero byte).
    if os.path.isfile(path) or wanted.endswith(".safetensors"):
        return path
    if os.path.lexists(path / FILE) or wanted.startswith(("/", "./", "../", "~/")):
        return path / FILE
    return None


def chosen(
    wanted: str,
    entries: Sequence[Entry],
    criteria: Mapping[str, str | int | None],
    root: Path,
    *,
    latest: bool = False,
) -> Entry:
    """Return the entry that an id prefix or ``task/method`` names.

    If several entries match, the criteria select among them one after the other. Then entries without parents go before
    entries with parents, and with ``latest`` the newest entry before the others.

    Args:
        wanted: four or more first digits of an id, or ``task/method``.
        entries: the entries of the library.
        criteria: values of the card by field; None selects nothing.
        root: the library's root, for messages.
        latest: True takes the newest of several entries.

    Raises:
        ArgumentError: no entry matches, a criterion leaves no entry, or several entries are left.
    """
    matches = [entry for entry in entries if _named(wanted, entry)]
    if not matches:
        raise ArgumentError(
            f"no vector {wanted!r} in the library {root}.{_near(wanted, entries)} A vector is named by {FORMS}; "
            "`lmms-mtv library ls` lists them all."
        )
    for name, value in criteria.items():
        if value is None or len(matches) < 2:
            continue
        narrowed = [entry for entry in matches if getattr(entry.card, name) == value]
        if not narrowed:
            raise ArgumentError(
                f"{wanted!r} is {len(matches)} vectors, none of them with {name} {value!r}: name one by its id.\n"
                f"{_list(matches)}"
            )
        matches = narrowed
    if len(matches) > 1 and (fitted := [entry for entry in matches if not entry.card.parents]):
        # A vector that was made of other vectors has to be named by its id.
        matches = fitted
    if latest:
        return max(matches, key=lambda entry: entry.modified)
    if len(matches) > 1:
        telling = [name for name in _TELLING if len({getattr(entry.card, name) for entry in matches}) > 1]
        told = f"They differ in {', '.join(telling)}" if telling else "They differ in settings alone"
        raise ArgumentError(
            f"{wanted!r} is {len(matches)} vectors. {told}: give {' or '.join((*telling, 'an id'))} "
            f"(`lmms-mtv library` takes the newest with --latest).\n{_list(matches)}"
        )
    return matches[0]


def _named(wanted: str, entry: Entry) -> bool:
    by_id = _ID.fullmatch(wanted.lower()) is not None and entry.id.startswith(wanted.lower())
    return by_id or wanted == f"{entry.card.task}/{entry.card.method}"


def _near(wanted: str, entries: Sequence[Entry]) -> str:
    known = {f"{entry.card.task}/{entry.card.method}" for entry in entries} | {entry.id for entry in entries}
    tasks: dict[str, list[str]] = {}
    for entry in entries:
        tasks.setdefault(entry.card.task, []).append(f"{entry.card.task}/{entry.card.method}")
    near = dict.fromkeys((*tasks.get(wanted, ()), *difflib.get_close_matches(wanted, sorted(known), n=3, cutoff=0.5)))
    return f" Near it: {', '.join(near)}." if near else ""


def _list(entries: Sequence[Entry]) -> str:
    settings = differences(entries)
    lines = [
        f"  {entry.id}: model {entry.card.model}, task {entry.card.task}, method {entry.card.method}, shots "
        f"{entry.card.shots}, seed {entry.card.seed}, {entry.date}{told and f', {told}'}"
        for entry in entries[:_LISTED]
        for told in (settings[entry.path],)
    ]
    if len(entries) > _LISTED:
        lines.append(f"  and {len(entries) - _LISTED} more")
    return "\n".join(lines)
