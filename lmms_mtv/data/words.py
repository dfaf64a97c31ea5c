"""Word pairs: the twenty abstractive tasks of the function vectors repository (arXiv 2310.15213)."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from lmms_mtv.data import hub
from lmms_mtv.data.official import File, Official, parsed
from lmms_mtv.data.source import Row, Source

_COMMIT = "fb9eac7b6dc707ea1475a717379916007fe448d5"
_URL = f"https://raw.githubusercontent.com/ericwtodd/function_vectors/{_COMMIT}/dataset_files/abstractive/"
SEED = 0
"""Seed of the split of the tasks."""


def split(pairs: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Return the train, validation and test splits: 70 % of the pairs, and 30 % and 70 % of the rest.

    The proportions are those of the authors' code. A pair and its reverse stay in one split, so that the training split
    has no reversed pair of the test split.

    Args:
        pairs: the word pairs, each with ``input`` and ``output``.
        seed: the seed of the order of the pairs.
    """
    groups: dict[frozenset[str], list[Row]] = {}
    for pair in pairs:
        groups.setdefault(frozenset(pair[side].strip().lower() for side in ("input", "output")), []).append(pair)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    train = len(pairs) * 7 // 10
    limits = {"train": train, "validation": (len(pairs) - train) * 3 // 10, "test": len(pairs)}
    splits: dict[str, list[Row]] = {}
    for name, limit in limits.items():
        splits[name] = []
        while shuffled and len(splits[name]) < limit:
            splits[name] += shuffled.pop()
    return splits


def _fetch(task: str, file: File, name: str) -> list[Row]:
    path = hub.downloaded(file, task)
    return split(parsed(path.read_bytes(), path), SEED)[name]


def _prepare(file: File, official: Official) -> Mapping[str, list[Row]]:
    if official.seed != SEED:
        official.remarks.append(f"split with seed {official.seed}, the seed of the task is {SEED}")
    return split(official.json(file), official.seed)


class _Pairs(NamedTuple):
    """A file of word pairs: task, file name, numbers of rows of train, validation and test, and SHA-256."""

    task: str
    file: str
    rows: tuple[int, int, int]
    sha256: str


_TABLE: Final = (
    _Pairs(
        "antonyms", "antonym.json", (1678, 216, 504), "ba66e8e399944b557251b11a37b11f9ba7a50f0a57286f7021a8a7b26b469e8d"
    ),
    _Pairs(
        "words_capitalize",
        "capitalize.json",
        (569, 73, 171),
        "9aad849c761de2f0c6195eb73496a0cfe7e600751b0d61a3c82709b1a3dcd53f",
    ),
    _Pairs(
        "words_capitalize_first_letter",
        "capitalize_first_letter.json",
        (569, 73, 171),
        "147c3a091f000c21b2512ab8461029881ef05600414a0633078b460da7b9f5b3",
    ),
    _Pairs(
        "words_country_capital",
        "country-capital.json",
        (137, 18, 42),
        "5748cbfb789c2d671f8a88bf8eaa8a800ead77299e34e1d0cafae11b0409782b",
    ),
    _Pairs(
        "words_country_currency",
        "country-currency.json",
        (137, 18, 42),
        "cd66bf2650b432cbe4a8a33222bdbc3628b1c667acf7c34537aeafbeff8e32a0",
    ),
    _Pairs(
        "words_english_french",
        "english-french.json",
        (3288, 423, 987),
        "766fa28cc696f37b1009f36372372797be03444045c58bc554759f3e177638cc",
    ),
    _Pairs(
        "words_english_german",
        "english-german.json",
        (3601, 463, 1081),
        "9111e1ee296059761eeb0f8f43dc25f84983c2f14ce1081bc96f5698de4b98cd",
    ),
    _Pairs(
        "english_spanish",
        "english-spanish.json",
        (3_639, 468, 1092),
        "d79388dd79b2871ce31caa5ab162900f888285bde80f626d9dd3be494ab63bf4",
    ),
    _Pairs(
        "words_landmark_country",
        "landmark-country.json",
        (585, 75, 176),
        "c96fb4514a4b93426150ec499064bcc5988ac11b440af88bde2196a7b474e240",
    ),
    _Pairs(
        "words_next_item",
        "next_item.json",
        (157, 21, 47),
        "fbef21cf40e1c6f4b12100812b09daa8e079f79b84ea3fea0e99637ea70f8873",
    ),
    _Pairs(
        "words_park_country",
        "park-country.json",
        (524, 67, 158),
        "2f64b436d38376614087b345ad764b279d5fa1b72c22cc8db18ecd96042c6df7",
    ),
    _Pairs(
        "words_person_instrument",
        "person-instrument.json",
        (357, 45, 108),
        "4fff080310e723dc85cca5c10c0c11eebf30df230e8fc102448a4adb0f5da49c",
    ),
    _Pairs(
        "words_person_occupation",
        "person-occupation.json",
        (574, 74, 173),
        "2c2fac0d4ba5a0aec033005c92ea170c6254f1d30a9b063c9ae5be0ff5d093d7",
    ),
    _Pairs(
        "words_person_sport",
        "person-sport.json",
        (222, 28, 68),
        "4c9bef3f97a77a05171070a09132f7104768affe4a39d17fd4ca338f89dcca6f",
    ),
    _Pairs(
        "words_present_past",
        "present-past.json",
        (205, 26, 62),
        "bd6f7d484a967646aa5854740c70803568225f47a5630e1555c39e827ba9c78b",
    ),
    _Pairs(
        "words_prev_item",
        "prev_item.json",
        (157, 21, 47),
        "ca59f4f8c82695903f7266c5ded68f731e52739e991ccf0f5389c36c950cb179",
    ),
    _Pairs(
        "words_product_company",
        "product-company.json",
        (365, 47, 110),
        "196cc243053ff6de7daf36f2d51b495ff504eeeec0fa74bc02ad646d19807f33",
    ),
    _Pairs(
        "words_sentiment",
        "sentiment.json",
        (816, 105, 246),
        "e63f927bf5920c3acf01dcbdc628bc07118731a77916de4bf0f6e3e443f75413",
    ),
    _Pairs(
        "words_singular_plural",
        "singular-plural.json",
        (143, 18, 44),
        "beac51d02481a63115f0f7879e0dfc8d70244aeaea4d0a8d5193a5b2dfc07b9b",
    ),
    _Pairs(
        "words_synonym",
        "synonym.json",
        (2016, 259, 605),
        "dc0c79f94b70999236ec962465b21ab416074ea2969a980eafa85e9cb2702685",
    ),
)

_FILES: Mapping[str, File] = {
    pairs.task: File(pairs.file, f"{_URL}{pairs.file}", sha256=pairs.sha256) for pairs in _TABLE
}

SOURCES: Sequence[Source] = tuple(
    Source(
        pairs.task,
        dict(zip(("train", "validation", "test"), pairs.rows, strict=True)),
        functools.partial(_fetch, pairs.task, _FILES[pairs.task]),
        functools.partial(_prepare, _FILES[pairs.task]),
    )
    for pairs in _TABLE
)
