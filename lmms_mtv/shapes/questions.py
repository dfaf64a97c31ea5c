"""The tasks of the shapes benchmark: the question about a scene, and the answers.

The question does not name the attribute or the language, so only demonstrations or a task vector show the task.
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
    """Return a question that names the attribute and the language; only the training of the tiny model uses it."""
    return f"What is the {attribute} in {words.LANGUAGES[language]}? Answer:"


def _attribute(attribute: str, language: str) -> Answer:
    """Return the function that names the value of ``attribute`` in ``language``."""
    return lambda scene: words.name(attribute, getattr(scene, attribute), language)


TASKS: Final[Mapping[str, Answer]] = MappingProxyType(
    {f"{a}_{lang}": _attribute(a, lang) for a in words.ATTRIBUTES for lang in words.LANGUAGES}
    | {"phrase_en": lambda scene: f"{scene.color} {scene.shape}"}
)
"""Answer of each of the nine tasks, by the task's name without ``shapes_``."""


def labels(attribute: str, permutation: tuple[int, ...] | None = None) -> Answer:
    """Return the answers of the hard task of ``attribute``: a made-up word for each value of the attribute.

    Args:
        attribute: the attribute of the scene.
        permutation: ``permutation[i]`` is the index, in :data:`words.LABELS`, of the word for the ``i``-th value. The
            default is the binding of the benchmark, drawn once with a fixed seed.
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
