"""Example images of a test set, with their predictions and activation maps."""

from __future__ import annotations

import base64
import contextlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossx.data.images import ImageError, read_pixels
from crossx.evaluation.examples import PAIRS as PAIRS
from crossx.evaluation.examples import RIGHT as RIGHT
from crossx.evaluation.examples import SEED as SEED
from crossx.evaluation.examples import WRONG as WRONG
from crossx.evaluation.examples import ShownImages as ShownImages
from crossx.evaluation.examples import choose_examples as choose_examples
from crossx.report.results import RunResults

TOP = 3
"""Classes listed for each image."""

TILE_SIDE = 176
"""Longer side of a picture, in pixels."""
SIMILAR_SIDE = 104
"""Longer side of a similar training image, in pixels."""
MAX_TILES = 160
"""More pictures are made smaller, so that together they take the space of this many."""
QUALITY = 72
"""WebP quality. With the two limits above, all pictures of a page take less than 4.7 MB, even of pure noise."""


class Pictures(NamedTuple):
    """Pictures of one image.

    Attributes:
        image: uint8 (H, W, 3), as the network sees it.
        overlays: Stage name -> for each part the image under its activation map, uint8 (H, W, 3).
        has_boxes: Whether numbered regions are drawn on ``image``.
    """

    image: NDArray[np.uint8]
    overlays: Mapping[str, Sequence[NDArray[np.uint8]]]
    has_boxes: bool = False


class Similar(NamedTuple):
    """A training image that is similar to an image.

    Attributes:
        label: Its class.
        similarity: Cosine of the features.
        path: Its file; None if it is no longer there.
    """

    label: str
    similarity: float
    path: Path | None


FindSimilar = Callable[[Sequence[Path]], Sequence[Sequence[Similar]]]
"""Maps image files to the training images that are most similar to each, most similar first."""


class SimilarTile(NamedTuple):
    """A similar training image as the page shows it.

    Attributes:
        label: Name of its class as people read it.
        similarity: Cosine of the features.
        image: Data URI; None if it cannot be read.
    """

    label: str
    similarity: float
    image: str | None


class Example(NamedTuple):
    """One image with its prediction.

    Attributes:
        path: Its path below the root of the data.
        target: The true class.
        prediction: The predicted class.
        top: The most probable classes with their probabilities, best first.
        image: The image as a data URI; None if it cannot be shown.
        stages: Stage name -> for each part the overlay as a data URI.
    """

    path: str
    target: str
    prediction: str
    top: list[tuple[str, float]]
    image: str | None
    stages: dict[str, list[str]]

    @property
    def right(self) -> bool:
        """Whether the prediction is the true class."""
        return self.target == self.prediction


def make_examples(
    run: RunResults, numbers: Sequence[int], pictures: Mapping[int, Pictures]
) -> dict[int, Example]:
    """Describe images: image number -> example.

    Args:
        run: The tested run.
        numbers: The images.
        pictures: Image number -> its pictures, for the images that have any.
    """
    side = tile_side(sum(1 + sum(map(len, shown.overlays.values())) for shown in pictures.values()))
    examples = {}
    for number in numbers:
        probabilities = run.probabilities[number]
        shown = pictures.get(number)
        examples[number] = Example(
            path=str(run.paths[number]),
            target=run.names[run.targets[number]],
            prediction=run.names[run.predictions[number]],
            top=[
                (run.names[label], float(probabilities[label]))
                for label in np.argsort(-probabilities, kind="stable")[:TOP]
            ],
            image=data_uri(shown.image, side) if shown else None,
            stages={
                stage: [data_uri(part, side) for part in parts]
                for stage, parts in (shown.overlays if shown else {}).items()
            },
        )
    return examples


def similar_tiles(found: Sequence[Similar], names: Mapping[str, str]) -> list[SimilarTile]:
    """Return training images as small pictures; ``names`` are those of the classes as people read them."""
    tiles = []
    for similar in found:
        image = None
        if similar.path is not None:
            with contextlib.suppress(ImageError):
                image = data_uri(read_pixels(similar.path, min_side=SIMILAR_SIDE), SIMILAR_SIDE)
        tiles.append(SimilarTile(names[similar.label], similar.similarity, image))
    return tiles


def tile_side(tiles: int) -> int:
    """Return the longer side of each of ``tiles`` pictures, in pixels."""
    return round(TILE_SIDE * min(1, math.sqrt(MAX_TILES / max(tiles, 1))))


def data_uri(picture: NDArray[np.uint8], side: int) -> str:
    """Return a picture (H, W, 3), shrunk to fit ``side``, as the data URI of a WebP image."""
    image = Image.fromarray(picture)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
