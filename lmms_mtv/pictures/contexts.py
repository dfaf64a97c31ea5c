"""Texts in which pictures stand for words: what the eyes learn from.

A context is read twice: by the language model alone, with the names of the pictures, and with the pictures in their
places. Some contexts are lists of pairs whose answers follow from the names, by relations that no task of the benchmark
has; others are sentences.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple


class Part(NamedTuple):
    """A part of a context.

    Attributes:
        text: the text; of a picture, the name that it stands for.
        picture: the index of the picture; None for text alone.
        counts: whether what the model expects to read here, and after it, is compared.
    """

    text: str
    picture: int | None = None
    counts: bool = False


@dataclass(frozen=True)
class Shown:
    """What a picture shows.

    Attributes:
        name: its name in English.
        others: further words for it, by relation.
    """

    name: str
    others: Mapping[str, str]


LISTS: Final = (
    ("", "\nAnswer:", "\n\n"),
    ("", "\nAnswer:", "\n\n"),
    ("Q:", "\nA:", "\n\n"),
    ("", " =", "\n"),
    ("", " ->", "\n"),
    ("", ":", "\n"),
    ("Input:", "\nOutput:", "\n\n"),
    ("Picture:", "\nWord:", "\n\n"),
)
"""Forms of a list: the texts before a picture, before its answer, and after its answer."""

SENTENCES: Final = (
    "Yesterday I saw a {}, and it was",
    "The {} in this picture is very",
    "I have never seen such a {} before. I think that it",
    "What do you know about the {}? The",
    "They talked about the {} all day, because",
    "A {} and a {} are both",
    "She showed me first the {} and then the {}. I liked",
    "{} is a word that I use when",
    "When I think of {}, I remember",
    "My friend likes {}, but I like {} more, because",
    "Once upon a time there was a {} that",
    "There is {}. There is also {}. The difference is that",
)
"""Sentences with a gap for each picture."""

_ITSELF: Final = "itself"


def relations(shown: Sequence[Shown]) -> dict[str, Callable[[Shown], str | None]]:
    """Return the relations of lists: functions that return the answer for a picture, or None if it has none."""
    written: dict[str, Callable[[Shown], str | None]] = {
        _ITSELF: lambda each: each.name,
        "capital letters": lambda each: each.name.upper(),
        "first letter": lambda each: each.name[0],
        "title": lambda each: each.name.title(),
        "with article": lambda each: f"the {each.name}",
    }
    named = sorted({relation for each in shown for relation in each.others})
    return written | {relation: (lambda each, r=relation: each.others.get(r)) for relation in named}


def random_context(shown: Sequence[Shown], most_pictures: int, rng: random.Random) -> list[Part]:
    """Return a context about random pictures.

    Args:
        shown: what each picture shows.
        most_pictures: pairs in the longest list.
        rng: the source of all choices.
    """
    if rng.random() < 0.25:
        return _sentence(shown, rng)
    known = relations(shown)
    relation = known[rng.choice(list(known))] if rng.random() < 0.7 else known[_ITSELF]
    answers = {index: answer for index, each in enumerate(shown) if (answer := relation(each)) is not None}
    before, between, after = rng.choice(LISTS)
    context: list[Part] = []
    for index in rng.sample(sorted(answers), rng.randint(1, most_pictures)):
        name = shown[index].name
        context += [Part(before)] if before else []
        context += [Part(f" {name}" if before else name, index), Part(between)]
        context += [Part(f" {answers[index]}", counts=True), Part(after)]
    return context


def _sentence(shown: Sequence[Shown], rng: random.Random) -> list[Part]:
    first, *others = rng.choice(SENTENCES).split("{}")
    context = [Part(first.rstrip(" "))] if first else []
    for index, text in zip(rng.sample(range(len(shown)), len(others)), others, strict=True):
        context.append(Part(f" {shown[index].name}" if context else shown[index].name, index))
        context.append(Part(text.rstrip(" "), counts=True))
    return context
