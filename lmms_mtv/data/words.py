"""Word pairs: English-Spanish and antonyms, from the function vectors repository (arXiv 2310.15213)."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence

from lmms_mtv.data import hub
from lmms_mtv.data.official import File, Official, parsed
from lmms_mtv.data.source import Row, Source

_COMMIT = "fb9eac7b6dc707ea1475a717379916007fe448d5"
_URL = f"https://raw.githubusercontent.com/ericwtodd/function_vectors/{_COMMIT}/dataset_files/abstractive/"
SEED = 0
"""Seed of the split that the tasks use."""


def split(pairs: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Train, validation and test, in the proportions of the authors' code: 70 %, and 30 % and 70 % of the rest.

    A pair and its reverse stay on one side, so that no pair of the test split is seen backwards in training.
    """
    groups: dict[frozenset[str], list[Row]] = {}
    for pair in pairs:
        groups.setdefault(frozenset(pair[side].strip().lower() for side in ("input", "output")), []).append(pair)
    drawn = list(groups.values())
    random.Random(seed).shuffle(drawn)
    train = len(pairs) * 7 // 10
    limits = {"train": train, "validation": (len(pairs) - train) * 3 // 10, "test": len(pairs)}
    made: dict[str, list[Row]] = {}
    for name, limit in limits.items():
        made[name] = []
        while drawn and len(made[name]) < limit:
            made[name] += drawn.pop()
    return made


def _fetch(task: str, file: File, name: str) -> list[Row]:
    path = hub.downloaded(file, task)
    return split(parsed(path.read_bytes(), path), SEED)[name]


def _prepare(file: File, official: Official) -> Mapping[str, list[Row]]:
    if official.seed != SEED:
        official.remarks.append(f"split with seed {official.seed}, the task's own is {SEED}")
    return split(official.json(file), official.seed)


_FILES: Mapping[str, File] = {
    "english_spanish": File(
        "english-spanish.json",
        f"{_URL}english-spanish.json",
        sha256="d79388dd79b2871ce31caa5ab162900f888285bde80f626d9dd3be494ab63bf4",
    ),
    "antonyms": File(
        "antonym.json",
        f"{_URL}antonym.json",
        sha256="ba66e8e399944b557251b11a37b11f9ba7a50f0a57286f7021a8a7b26b469e8d",
    ),
}
_ROWS: Mapping[str, Mapping[str, int]] = {
    "english_spanish": {"train": 3_639, "validation": 468, "test": 1_092},
    "antonyms": {"train": 1_678, "validation": 216, "test": 504},
}

SOURCES: Sequence[Source] = tuple(
    Source(task, _ROWS[task], functools.partial(_fetch, task, file), functools.partial(_prepare, file))
    for task, file in _FILES.items()
)
