"""Write the documents of the tasks: ``python -m lmms_mtv.pictures.documents tasks/pictures/data``.

A document names an emoji and the seed of its look. Half of the things and half of the countries are for training, the
others for evaluation, in every task.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from lmms_mtv.pictures import names

_LOOKS: Final = 5
"""Documents of each emoji in a split."""

_EPISODES: Final = {"train": 400, "test": 200}

LABELS: Final = (
    "dax", "wug", "blick", "toma", "fep", "gorp", "zib", "kiv", "mib", "lorp", "nef", "pim", "sut", "tiz", "vab", "yod",
)  # fmt: skip
"""Made-up words, each a label in some episodes."""

Document = dict[str, Any]


def files() -> Iterator[tuple[str, list[Document]]]:
    """Return the name of each file and its documents."""
    for group, codes in (
        ("things", [each.code for each in names.things()]),
        ("flags", [each.code for each in names.countries()]),
    ):
        for split, part in _halves(codes, group).items():
            yield f"{group}_{split}", _looks(part, f"{group} {split}")
            if group == "things":
                yield f"episodes_{split}", _episodes(part, split)


def _halves(codes: Sequence[str], group: str) -> dict[str, list[str]]:
    shuffled = random.Random(group).sample(codes, len(codes))
    return {"train": shuffled[::2], "test": shuffled[1::2]}


def _looks(codes: Sequence[str], key: str) -> list[Document]:
    """Return the documents: each emoji once before the second look of any emoji, so that the first ones differ."""
    rng = random.Random(key)
    return [{"code": code, "seed": look} for look in range(_LOOKS) for code in rng.sample(codes, len(codes))]


def _episodes(codes: Sequence[str], split: str) -> list[Document]:
    """Return episodes: two things with made-up labels, then one of them in another look."""
    rng = random.Random(f"episodes {split}")
    episodes = []
    for number in range(_EPISODES[split]):
        shown, labels = rng.sample(codes, 2), rng.sample(LABELS, 2)
        asked = number % 2
        pictures = [{"code": code, "seed": rng.randrange(1000)} for code in (*shown, shown[asked])]
        episodes.append({"pictures": pictures, "labels": labels, "answer": labels[asked]})
    rng.shuffle(episodes)
    return episodes


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path, help="folder of the files")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, documents in files():
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
