"""What the pictures show: things, with names in three languages, category and plural; and countries by their flags."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_FOLDER: Final = Path(__file__).parent


@dataclass(frozen=True)
class Thing:
    """A thing that has a picture.

    Attributes:
        code: the code points of the emoji, hexadecimal and joined by hyphens, which is the name of its file.
        english: the name in English.
        spanish: the name in Spanish.
        german: the name in German.
        category: what kind of thing it is; empty if it is of no kind that the tasks ask about.
        plural: the plural in English; empty for names without a plural, or that are plurals.
    """

    code: str
    english: str
    spanish: str
    german: str
    category: str
    plural: str


@dataclass(frozen=True)
class Country:
    """A country whose flag is a picture.

    Attributes:
        code: the code points of the flag; see :class:`Thing`.
        country: the name.
        capital: its capital.
        currency: its currency, without the name of the country.
    """

    code: str
    country: str
    capital: str
    currency: str


@cache
def things() -> tuple[Thing, ...]:
    """Return all things, sorted by their English names."""
    return tuple(Thing(**row) for row in _rows("pictures.tsv"))


@cache
def countries() -> tuple[Country, ...]:
    """Return all countries, sorted by their names."""
    return tuple(Country(**row) for row in _rows("countries.tsv"))


def codes() -> dict[str, str]:
    """Return the code of each picture and the English name of what it shows."""
    return {each.code: each.english for each in things()} | {each.code: each.country for each in countries()}


def _rows(name: str) -> list[dict[str, str]]:
    with (_FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
