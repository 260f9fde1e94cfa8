"""Pictures within the page: small WebP images as data URIs."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TILE_SIDE = 176
"""Pixels of a picture's longer side."""
MAX_TILES = 160
"""Of more pictures each is made smaller, so that all together take the room of so many."""
QUALITY = 72
"""Of WebP. With the numbers above all pictures of a page take less than 4.7 MB even where they are pure noise."""


def tile_side(tiles: int) -> int:
    """Return the longer side of each of ``tiles`` pictures, in pixels."""
    return round(TILE_SIDE * min(1, math.sqrt(MAX_TILES / max(tiles, 1))))


def data_uri(picture: NDArray[np.uint8], side: int) -> str:
    """Return a picture (H, W, 3), made smaller to ``side``, as the address of itself."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
