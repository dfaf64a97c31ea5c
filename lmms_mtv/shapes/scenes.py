"""Scenes with one object on a background, described by a few words and drawn on demand.

``python -m lmms_mtv.shapes.scenes FOLDER`` writes the splits of the benchmark, ``train.jsonl`` and ``test.jsonl``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw

from lmms_mtv.shapes import words

SIDE: Final = 128
"""Width and height of a drawn scene, in pixels."""

SPLITS: Final = {"train": 400, "test": 200}
"""Number of scenes of each split of the benchmark. The splits have no common scene."""

SPLIT_SEED: Final = 2406

_RADII: Final = (20, 22, 24)
_JITTER: Final = range(-4, 5)

_RGB: Final = {
    "red": (220, 30, 30),
    "green": (30, 160, 40),
    "blue": (40, 60, 220),
    "yellow": (250, 220, 30),
    "purple": (130, 40, 170),
    "orange": (250, 140, 20),
    "black": (10, 10, 10),
    "white": (248, 248, 248),
    "gray": (135, 135, 135),
    "brown": (110, 70, 40),
    "pink": (250, 175, 205),
    "teal": (20, 165, 165),
}

_CENTRE: Final = {"left": (28, 64), "right": (100, 64), "top": (64, 28), "bottom": (64, 100), "center": (64, 64)}


@dataclass(frozen=True)
class Scene:
    """One object on a plain background.

    Attributes:
        color: English name of the color of the object, see :mod:`lmms_mtv.shapes.words`.
        shape: English name of the shape of the object.
        background: English name of the color of the background.
        position: English name of the position of the object.
        dx: horizontal offset of the object from the centre of its position, in pixels of a :data:`SIDE`-pixel square.
        dy: vertical offset of the object, in pixels.
        radius: radius of the object, in pixels.
    """

    color: str
    shape: str
    background: str
    position: str
    dx: int
    dy: int
    radius: int


def sample(rng: random.Random) -> Scene:
    """Return a random scene; every field is drawn independently and uniformly."""
    attributes = {attribute: rng.choice(words.values(attribute)) for attribute in words.ATTRIBUTES}
    return Scene(**attributes, dx=rng.choice(_JITTER), dy=rng.choice(_JITTER), radius=rng.choice(_RADII))


def distinct(rng: random.Random, exclude: Iterable[Scene] = ()) -> Iterator[Scene]:
    """Yield different scenes that are not in ``exclude``, without end."""
    previous = set(exclude)
    while True:
        scene = sample(rng)
        if scene not in previous:
            previous.add(scene)
            yield scene


def splits() -> dict[str, list[Scene]]:
    """Return the scenes of the splits of the benchmark, always the same scenes; the splits are disjoint."""
    stream = distinct(random.Random(SPLIT_SEED))
    return {split: [next(stream) for _ in range(count)] for split, count in SPLITS.items()}


def from_mapping(fields: Mapping[str, Any]) -> Scene:
    """Return the scene in a line of a split or in a row of a data set; other keys are ignored."""
    return Scene(**{field.name: fields[field.name] for field in dataclasses.fields(Scene)})


def draw(scene: Scene) -> Image.Image:
    """Return ``scene`` as an RGB image, :data:`SIDE` pixels wide and high."""
    image = Image.new("RGB", (SIDE, SIDE), _RGB[scene.background])
    pen = ImageDraw.Draw(image)
    ink, r = _RGB[scene.color], scene.radius
    x, y = (centre + offset for centre, offset in zip(_CENTRE[scene.position], (scene.dx, scene.dy), strict=True))
    box = (x - r, y - r, x + r, y + r)
    match scene.shape:
        case "circle":
            pen.ellipse(box, fill=ink)
        case "square":
            pen.rectangle((x - r + 2, y - r + 2, x + r - 2, y + r - 2), fill=ink)
        case "triangle":
            pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=ink)
        case "cross":
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill=ink)
            pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill=ink)
        case "ring":
            pen.ellipse(box, outline=ink, width=r // 3)
        case "diamond":
            pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=ink)
        case other:
            raise ValueError(f"unknown shape {other!r}, expected one of {', '.join(words.values('shape'))}")
    return image


def write_splits(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` into ``folder``: one line for each scene, with an ``id``."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, scenes in splits().items():
        lines = (json.dumps({"id": f"{split}-{i:03d}", **dataclasses.asdict(scene)}) for i, scene in enumerate(scenes))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the splits of the shapes benchmark.")
    parser.add_argument("folder", type=Path, help="output folder")
    write_splits(parser.parse_args().folder)
