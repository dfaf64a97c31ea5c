"""Pictures as a model is shown them: 8-bit RGB, the right way up."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

UNREADABLE = (OSError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises of a picture that is missing, damaged or too large."""


def rgb(picture: Image.Image) -> Image.Image:
    """Return ``picture`` in RGB of 8 bits a channel.

    Of 16-bit grey, as of depth maps and X-rays, the upper 8 bits are kept. Pillow itself would make everything above
    255 white.
    """
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.size and values.max() > 255:
            picture = Image.fromarray((values.clip(0, 65535) // 257).astype(np.uint8))
    return picture.convert("RGB")


def opened(path: object) -> Image.Image:
    """Return the picture in a file, in RGB, turned as its EXIF data say.

    Raises one of :data:`UNREADABLE`.
    """
    picture = Image.open(path)  # type: ignore[arg-type]
    return rgb(ImageOps.exif_transpose(picture) or picture)
