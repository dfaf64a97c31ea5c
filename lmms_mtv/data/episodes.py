"""Flowers-102, CUB-200-2011 and DTD as 2-way 1-shot episodes, from the files of the paper or drawn from the splits.

An episode has an image of a positive class, an image of a negative class, and a query image of the positive class.
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

    Attributes:
        task: name of the task.
        files: files of the paper with the episodes of each split.
        counts: numbers of episodes, positive classes and negative classes of each split.
        archive: archive of the official images.
        copies: copies of the images on the hub.
        classes: function that reads the official train and test splits from the archive.
        fitted: number of classes, the first in the official order, that make the drawn training episodes; the other
            classes make the test episodes.
        repeats: number of drawn episodes for each query image of a split.
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
    """Return the row of an episode: images and options in their order, and the letter of the query's class.

    The code of the authors draws the order of the options; here the names of the images determine the order.

    Args:
        episode: the names of the images ``pos``, ``neg`` and ``query``, and the labels ``pos_label`` and ``neg_label``.
        references: the references to the images, by file name.
    """
    names = {key: PurePosixPath(episode[key]).name for key in ("pos", "neg", "query")}
    swapped = hashlib.sha256("/".join(names.values()).encode()).digest()[0] % 2
    first, second = ("neg", "pos") if swapped else ("pos", "neg")
    return {
        "images": [references[names[key]] for key in (first, second, "query")],
        "a": episode[f"{first}_label"],
        "b": episode[f"{second}_label"],
        "answer": "B" if swapped else "A",
    }


def validated(content: Any, data: EpisodeSet, split: str, where: str, counted: bool = True) -> list[dict[str, str]]:
    """Return the episodes of the paper in ``content``.

    Args:
        content: the parsed file.
        data: the data set.
        split: name of the split.
        where: the file, for error messages.
        counted: True compares the numbers of episodes and classes with the official numbers.

    Raises:
        DataError: the form or a number is not as expected.
    """
    if not isinstance(content, list) or any(
        not isinstance(e, dict) or any(not isinstance(e.get(k), str) for k in _KEYS) for e in content
    ):
        raise DataError(f"{where} is not a list of episodes with {', '.join(_KEYS)}: {mended_by(data.task)}")
    counts = (len(content), *(len({e[key] for e in content}) for key in ("pos_label", "neg_label")))
    if counted and counts != data.counts[split]:
        named = "episodes, positive and negative classes"
        raise DataError(
            f"{where} has {counts} {named}, expected {data.counts[split]}: {mended_by(data.task)} (with --partial to "
            "work on a part of the data)"
        )
    return content


def regenerated(classes: Classes, repeats: int, seed: int) -> list[dict[str, str]]:
    """Return episodes drawn from the images of ``classes``, with each image as the query of ``repeats`` episodes.

    The positive image is another image of the query's class; the negative image is from a random other class.

    Args:
        classes: names of the images of each class.
        repeats: number of episodes for each query image.
        seed: seed of the draw.

    Raises:
        DataError: a class has fewer than two images, or there is no second class.
    """
    rng = random.Random(seed)
    episodes = []
    for label, images in classes.items():
        others = [name for name in classes if name != label]
        if len(images) < 2 or not others:
            raise DataError(
                f"episodes need two images of class {label!r} and a second class, found {len(images)} images"
            )
        for query in [image for image in images for _ in range(repeats)]:
            negative = rng.choice(others)
            episodes.append(
                {
                    "pos": rng.choice([image for image in images if image != query]),
                    "neg": rng.choice(classes[negative]),
                    "query": query,
                    "pos_label": label,
                    "neg_label": negative,
                }
            )
    return episodes


def _fetch(data: EpisodeSet, split: str) -> list[Row]:
    """Return the rows of a split with the images of the hub copies."""
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
    """Return the references to the images of hub copies, by the names of the official files."""
    return {
        Path(name).name: hub.reference(copy, index)
        for copy in copies
        for index, name in enumerate(hub.names(copy))
        if name
    }


def _prepare(data: EpisodeSet, official: Official) -> Mapping[str, list[Row]]:
    """Return the rows of all splits with the images of the official archive."""
    if official.regenerate:
        official.remarks.append(f"episodes drawn from the official splits with seed {official.seed}, not the paper's")
        splits = data.classes(official, data.archive)
        names = list(splits["train"])
        classes = {"train": names[: data.fitted], "test": names[data.fitted :]}
        episodes = {
            split: regenerated(
                {name: splits[split][name] for name in split_classes}, data.repeats[split], official.seed
            )
            for split, split_classes in classes.items()
        }
    else:
        episodes = {split: _published(data, split, official) for split in data.files}
    images = {
        PurePosixPath(episode[key]).name
        for split_episodes in episodes.values()
        for episode in split_episodes
        for key in ("pos", "neg", "query")
    }
    paths = official.images(data.archive, images)
    return {split: [row(episode, paths) for episode in split_episodes] for split, split_episodes in episodes.items()}


def _published(data: EpisodeSet, split: str, official: Official) -> list[dict[str, str]]:
    """Return the episodes of the paper, from the source folder or else from the web."""
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
    texts = official.texts(archive, lists)
    images, training = (dict(line.split() for line in texts[name].splitlines()) for name in lists)
    classes: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for number, path in images.items():
        label = path.split("/")[0].partition(".")[2].replace("_", " ")
        for split, flag in (("train", "1"), ("test", "0")):
            names = classes[split].setdefault(label, [])
            if training[number] == flag:
                names.append(PurePosixPath(path).name)
    return classes


def _dtd_classes(official: Official, archive: File) -> dict[str, dict[str, list[str]]]:
    lists = {"train": "train1.txt", "test": "test1.txt"}
    texts = official.texts(archive, lists.values())
    classes: dict[str, dict[str, list[str]]] = {}
    for split, name in lists.items():
        classes[split] = {}
        for line in sorted(texts[name].split()):
            classes[split].setdefault(line.split("/")[0], []).append(PurePosixPath(line).name)
    return classes


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
