"""The settings that tell the vectors of one model, task and method apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from lmms_mtv.vectors import VectorCard
from lmms_mtv.vectors.library.entry import Entry

_FIELDS: Final = ("revision", "dtype", "split", "examples", "prompt", "parents")
"""Fields of the recipe besides the settings, shots and seed."""

_LONGEST: Final = 16


def differences(entries: Sequence[Entry]) -> dict[Path, str]:
    """Return for each entry, by its path, the settings that differ from those of other entries.

    Entries with the same model, task and method are compared. The text is ``name=value, name=value``, empty if nothing
    differs. It has settings of the method and other fields of the recipe, without shots and seed; digests and long
    values are cut.
    """
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.card.model, entry.card.task, entry.card.method), []).append(entry)
    return {entry.path: text for group in groups.values() for entry, text in _told_apart(group)}


def _told_apart(group: Sequence[Entry]) -> list[tuple[Entry, str]]:
    recipes = [_recipe(entry.card) for entry in group]
    names = sorted({name for recipe in recipes for name in recipe}, key=lambda name: (name in _FIELDS, name))
    telling = [name for name in names if len({recipe.get(name) for recipe in recipes}) > 1]
    texts = [", ".join(f"{name}={recipe[name]}" for name in telling if name in recipe) for recipe in recipes]
    return list(zip(group, texts, strict=True))


def _recipe(card: VectorCard) -> dict[str, str]:
    """Return the settings and fields as short texts. Settings that are None do not count, as in an id."""
    parents = " + ".join(f"{weight:g} * {parent[:4]}" for parent, weight in card.parents.items())
    fields = {name: getattr(card, name) for name in _FIELDS} | {"parents": parents}
    values = dict(card.config) | {name: value for name, value in fields.items() if value}
    return {name: _short(value) for name, value in values.items() if value is not None}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}\u2026"
