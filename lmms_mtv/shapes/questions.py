"""The tasks of the shapes benchmark: what is asked of a scene, and what is answered.

The question names nothing, so that only demonstrations or a task vector tell which attribute and language is wanted.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from lmms_mtv.shapes import words
from lmms_mtv.shapes.scenes import Scene

QUESTION: Final = "What is it? Answer:"
"""The question of every task."""

Answer = Callable[[Scene], str]


def named_question(attribute: str, language: str) -> str:
    """Return a question that says what it wants. Only the tiny model's training asks it, to learn to see."""
    return f"What is the {attribute} in {words.LANGUAGES[language]}? Answer:"


def _attribute(attribute: str, language: str) -> Answer:
    return lambda scene: words.name(attribute, getattr(scene, attribute), language)


TASKS: Final[Mapping[str, Answer]] = MappingProxyType(
    {f"{a}_{lang}": _attribute(a, lang) for a in words.ATTRIBUTES for lang in words.LANGUAGES}
    | {"phrase_en": lambda scene: f"{scene.color} {scene.shape}"}
)
"""Answer of each of the nine tasks, by the task's name without ``shapes_``."""


def labels(attribute: str, permutation: tuple[int, ...] | None = None) -> Answer:
    """Return answers of the hard task of ``attribute``: the made-up word that ``permutation`` binds to the scene's
    value.

    ``permutation[i]`` is the index, in :data:`words.LABELS`, of the word for the ``i``-th value. The default is the
    benchmark's own binding, drawn once with a fixed seed.
    """
    vocabulary, values = words.LABELS[attribute], words.values(attribute)
    if permutation is None:
        permutation = shuffled(attribute, random.Random(f"shapes_labels_{attribute}"))
    bound = {value: vocabulary[index] for value, index in zip(values, permutation, strict=True)}
    return lambda scene: bound[getattr(scene, attribute)]


def shuffled(attribute: str, rng: random.Random) -> tuple[int, ...]:
    """Return a random permutation for :func:`labels`."""
    order = list(range(len(words.LABELS[attribute])))
    rng.shuffle(order)
    return tuple(order)
