"""Conversion of pictures for models: 8-bit RGB, with the orientation of the EXIF data applied."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)
"""The exceptions of Pillow for a picture that is missing, damaged or too large."""


def rgb(picture: Image.Image) -> Image.Image:
    """Return ``picture`` in RGB with 8 bits for each channel.

    A 16-bit grey picture, such as a depth map or an X-ray, keeps its upper 8 bits. Pillow would turn all values above
    255 into white.
    """
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.size and values.max() > 255:
            picture = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    return picture.convert("RGB")


def opened(path: object) -> Image.Image:
    """Return the picture in a file in RGB, rotated according to its EXIF data.

    Raises:
        OSError, SyntaxError, DecompressionBombError: the picture is unreadable, see :data:`UNREADABLE`.
    """
    picture = Image.open(path)  # type: ignore[arg-type]
    return rgb(ImageOps.exif_transpose(picture) or picture)
