"""Flowers-102, CUB-200-2011 and DTD as 2-way 1-shot episodes: the paper's own files, or drawn from official splits.

An episode has one image of each of two classes and a query of the first, the positive one.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lmms_mtv.data import hub
from lmms_mtv.data.official import File, Official, checksum, parsed
from lmms_mtv.data.source import Row, Source, mended_by
from lmms_mtv.errors import DataError

_COMMIT = "b2698c4ee5c32a369fe8fdfd7d19d0bd17227c44"
_URL = f"https://raw.githubusercontent.com/Brandon3964/MultiModal-Task-Vector/{_COMMIT}/MTV/data/"
_KEYS = ("pos", "neg", "query", "pos_label", "neg_label")

Classes = Mapping[str, Sequence[str]]
"""Names of the images of each class, in the official order of the classes."""


@dataclass(frozen=True)
class EpisodeSet:
    """One of the three data sets.

    ``files`` are the paper's episodes, ``counts`` their number of episodes, of positive and of negative classes.
    ``classes`` reads the official train and test splits out of an archive. ``fitted`` classes, the first of the
    official order, make training episodes and the others test episodes, each image as a query ``repeats`` times.
    """

    task: str
    files: Mapping[str, File]
    counts: Mapping[str, tuple[int, int, int]]
    archive: File
    copies: Sequence[hub.Copy]
    classes: Callable[[Official, File], Mapping[str, Classes]]
    fitted: int
    repeats: Mapping[str, int]


def row(episode: Mapping[str, str], references: Mapping[str, str]) -> Row:
    """Return an episode as the task shows it: images in the order shown, option texts, and the letter of the query's
    class.

    The authors' code draws the order of the options; here the names of the images fix it.
    """
    names = {key: PurePosixPath(episode[key]).name for key in ("pos", "neg", "query")}
    drawn = hashlib.sha256("/".join(names.values()).encode()).digest()[0] % 2
    first, second = ("neg", "pos") if drawn else ("pos", "neg")
    return {
        "images": [references[names[key]] for key in (first, second, "query")],
        "a": episode[f"{first}_label"],
        "b": episode[f"{second}_label"],
        "answer": "B" if drawn else "A",
    }


def validated(content: Any, data: EpisodeSet, split: str, where: str, counted: bool = True) -> list[dict[str, str]]:
    """Return the paper's episodes of a split.

    Raises :class:`DataError` if their form, or a count where ``counted``, is another than expected.
    """
    if not isinstance(content, list) or any(
        not isinstance(e, dict) or any(not isinstance(e.get(k), str) for k in _KEYS) for e in content
    ):
        raise DataError(f"{where} is no list of episodes with {', '.join(_KEYS)}: {mended_by(data.task)}")
    found = (len(content), *(len({e[key] for e in content}) for key in ("pos_label", "neg_label")))
    if counted and found != data.counts[split]:
        named = "episodes, positive and negative classes"
        raise DataError(
            f"{where} has {found} {named}, expected {data.counts[split]}: {mended_by(data.task)} (with --partial to "
            "work on a part of the data)"
        )
    return content


def regenerated(classes: Classes, repeats: int, seed: int) -> list[dict[str, str]]:
    """Episodes drawn from the images of ``classes``: each image is ``repeats`` times the query.

    Its own class gives another image as the positive one, a class drawn at random the negative one.
    """
    drawn = random.Random(seed)
    made = []
    for label, images in classes.items():
        others = [name for name in classes if name != label]
        if len(images) < 2 or not others:
            raise DataError(
                f"episodes need two images of class {label!r} and a second class, found {len(images)} images"
            )
        for query in [image for image in images for _ in range(repeats)]:
            negative = drawn.choice(others)
            made.append(
                {
                    "pos": drawn.choice([image for image in images if image != query]),
                    "neg": drawn.choice(classes[negative]),
                    "query": query,
                    "pos_label": label,
                    "neg_label": negative,
                }
            )
    return made


def _fetch(data: EpisodeSet, split: str) -> list[Row]:
    path = hub.downloaded(data.files[split], data.task)
    episodes = validated(parsed(path.read_bytes(), path), data, split, data.files[split].url)
    references = _references(data.copies)
    needed = {PurePosixPath(episode[key]).name for episode in episodes for key in ("pos", "neg", "query")}
    if missing := sorted(needed - references.keys()):
        raise DataError(
            f"{data.copies[0].path} on the hub lacks {len(missing)} of the {len(needed)} images by their official "
            f"names, such as {missing[0]}: {mended_by(data.task)}"
        )
    return [row(episode, references) for episode in episodes]


def _references(copies: Sequence[hub.Copy]) -> dict[str, str]:
    """References to the images of hub copies, by the names of the official files."""
    return {
        Path(name).name: hub.reference(copy, index)
        for copy in copies
        for index, name in enumerate(hub.names(copy))
        if name
    }


def _prepare(data: EpisodeSet, official: Official) -> Mapping[str, list[Row]]:
    if official.regenerate:
        official.remarks.append(f"episodes drawn from the official splits with seed {official.seed}, not the paper's")
        splits = data.classes(official, data.archive)
        every = list(splits["train"])
        chosen = {"train": every[: data.fitted], "test": every[data.fitted :]}
        episodes = {
            split: regenerated({c: splits[split][c] for c in names}, data.repeats[split], official.seed)
            for split, names in chosen.items()
        }
    else:
        episodes = {split: _given(data, split, official) for split in data.files}
    names = {PurePosixPath(e[k]).name for found in episodes.values() for e in found for k in ("pos", "neg", "query")}
    paths = official.images(data.archive, names)
    return {split: [row(episode, paths) for episode in found] for split, found in episodes.items()}


def _given(data: EpisodeSet, split: str, official: Official) -> list[dict[str, str]]:
    """Return the paper's episodes: from the source folder, else from the web."""
    file = data.files[split]
    if official.has(file):
        path = official.find(file)
    else:
        try:
            path = hub.downloaded(file, data.task)
            official.used[file.url] = f"sha256:{checksum(path, 'sha256')}"
        except DataError as error:
            raise DataError(
                f"{official.source} has no {file.name}, and {error.__cause__}: put {file.url} there, or pass "
                "--regenerate to draw episodes from the official splits instead (their scores compare with each "
                "other, not with the paper's)"
            ) from error
    return validated(parsed(path.read_bytes(), path), data, split, str(path), counted=not official.partial)


def _flowers_classes(official: Official, _: File) -> dict[str, dict[str, list[str]]]:
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    labels = loadmat(official.find(FLOWERS_LABELS), squeeze_me=True)["labels"].tolist()
    splits = loadmat(official.find(FLOWERS_SPLITS), squeeze_me=True)
    names = Flowers102.classes
    return {
        split: {
            names[number - 1]: [f"image_{image:05d}.jpg" for image in ids if labels[image - 1] == number]
            for number in range(1, len(names) + 1)
            if number in labels
        }
        for split, ids in (("train", splits["trnid"].tolist()), ("test", splits["tstid"].tolist()))
    }


def _cub_classes(official: Official, archive: File) -> dict[str, dict[str, list[str]]]:
    lists = ("images.txt", "train_test_split.txt")
    found = official.texts(archive, lists)
    images, training = (dict(line.split() for line in found[name].splitlines()) for name in lists)
    made: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for number, path in images.items():
        label = path.split("/")[0].partition(".")[2].replace("_", " ")
        for split, flag in (("train", "1"), ("test", "0")):
            here = made[split].setdefault(label, [])
            if training[number] == flag:
                here.append(PurePosixPath(path).name)
    return made


def _dtd_classes(official: Official, archive: File) -> dict[str, dict[str, list[str]]]:
    lists = {"train": "train1.txt", "test": "test1.txt"}
    found = official.texts(archive, lists.values())
    made: dict[str, dict[str, list[str]]] = {}
    for split, name in lists.items():
        made[split] = {}
        for line in sorted(found[name].split()):
            made[split].setdefault(line.split("/")[0], []).append(PurePosixPath(line).name)
    return made


_FLOWERS = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"
FLOWERS_LABELS = File("imagelabels.mat", f"{_FLOWERS}imagelabels.mat", md5="e0620be6f572b9609742df49c70aed4d")
FLOWERS_SPLITS = File("setid.mat", f"{_FLOWERS}setid.mat", md5="a5357ecc9cb78c4bef273ce3793fc85c")
_FLOWERS_COPY = ("flowers", "Donghyun99/Oxford-Flower-102")

SETS: Sequence[EpisodeSet] = (
    EpisodeSet(
        "flowers",
        {s: File(f"flower_{s}.json", f"{_URL}flower/flower_{s}.json") for s in ("train", "test")},
        {"train": (290, 29, 97), "test": (5_076, 73, 102)},
        File("102flowers.tgz", f"{_FLOWERS}102flowers.tgz", "jpg", md5="52808999861908f626f3c1f4e79d11fa"),
        [
            hub.Copy(*_FLOWERS_COPY, split, ("image",), "7e43fe37eeb9278138ab0bd2d0abb10d0f703d09")
            for split in ("train", "validation", "test")
        ],
        _flowers_classes,
        fitted=29,
        repeats={"train": 1, "test": 1},
    ),
    EpisodeSet(
        "cub",
        {s: File(f"cub_{s}.json", f"{_URL}cub/cub_{s}.json") for s in ("train", "test")},
        {"train": (870, 29, 29), "test": (5_023, 171, 171)},
        File(
            "CUB_200_2011.tgz",
            "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "CUB_200_2011",
            md5="97eceeb196236b17998738112f37df78",
        ),
        [hub.Copy("cub", "bentrevett/caltech-ucsd-birds-200-2011", split, ("image",)) for split in ("train", "test")],
        _cub_classes,
        fitted=29,
        repeats={"train": 1, "test": 1},
    ),
    EpisodeSet(
        "dtd",
        {s: File(f"dtd_{s}.json", f"{_URL}dtd/{s}.json", f"dtd/{s}.json") for s in ("train", "test")},
        {"train": (4_000, 10, 10), "test": (3_000, 37, 37)},
        File(
            "dtd-r1.0.1.tar.gz",
            "https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
            "dtd",
            md5="fff73e5086ae6bdbea199a49dfb8a4c1",
        ),
        [hub.Copy("dtd", "bitmind/dtd", "train", ("image",))],
        _dtd_classes,
        fitted=10,
        repeats={"train": 10, "test": 2},
    ),
)

SOURCES: Sequence[Source] = tuple(
    Source(
        data.task,
        {split: counts[0] for split, counts in data.counts.items()},
        functools.partial(_fetch, data),
        functools.partial(_prepare, data),
        regenerates=True,
    )
    for data in SETS
)
