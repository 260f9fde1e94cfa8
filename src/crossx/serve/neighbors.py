"""Similar training images in the service's answers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from PIL import Image
from torch import Tensor

from crossx.data.images import ImageError, printable, read_pixels
from crossx.errors import UsageError
from crossx.predict.neighbors import NeighborIndex
from crossx.predict.results import Neighbor
from crossx.serve.schemas import SimilarImage

MAX_NEIGHBORS = 10
"""Similar images per prediction."""
SIDE = 96
"""Longer side of a thumbnail, in pixels; as WebP of quality 70, at most about 6 KB."""
CACHED = 4096
"""Thumbnails kept in memory."""


class SimilarImages:
    """Finds the training images most similar to the images of a request.

    Args:
        index: The training images.
        top: Similar images per prediction.

    Raises:
        UsageError: If there are to be none, or more than ``MAX_NEIGHBORS``.
    """

    def __init__(self, index: NeighborIndex, top: int) -> None:
        check_top(top)
        self._index, self._top = index, top
        self._thumbnail = lru_cache(CACHED)(thumbnail)

    def find(self, images: Sequence[Tensor]) -> list[tuple[Neighbor, ...]]:
        """Return the training images most similar to each prepared image; only for the network's thread."""
        return self._index.nearest(self._index.predictor.features(images).numpy(), self._top)

    def describe(self, neighbors: Sequence[Neighbor]) -> list[SimilarImage]:
        """Return what the answer says about them, with thumbnails of those that can be read."""
        return [
            SimilarImage(
                label=neighbor.label,
                similarity=neighbor.similarity,
                path=printable(_public_name(neighbor.name)),
                webp=self._thumbnail(neighbor.path) if self._index.has_images else None,
            )
            for neighbor in neighbors
        ]


def _public_name(name: str) -> str:
    """Return a path below the training images' folder as it is, and only the file's name of one elsewhere."""
    path = PurePosixPath(name)
    return path.name if path.is_absolute() or ".." in path.parts else name


def check_top(top: int) -> None:
    """Raise ``UsageError`` unless there may be so many similar images per prediction."""
    if not 1 <= top <= MAX_NEIGHBORS:
        raise UsageError(f"neighbors must be from 1 to {MAX_NEIGHBORS}, not {top}.")


def thumbnail(path: Path) -> str | None:
    """Return a small picture, base64-encoded WebP; None if the image cannot be read."""
    try:
        picture = Image.fromarray(read_pixels(path, min_side=SIDE))
    except ImageError:
        return None
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    picture.save(written, "WEBP", quality=70)
    return base64.b64encode(written.getvalue()).decode()
