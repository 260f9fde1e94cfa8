"""Single images with what the network says about them and what its parts look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossx.report.results import Tested
from crossx.report.thumbnails import data_uri, tile_side

TOP = 3
"""Classes named for each image."""


@dataclass(frozen=True)
class Pictures:
    """What is to be seen of one image.

    Attributes:
        image: uint8 (H, W, 3), what the network sees.
        overlays: Stage name -> for each part the image under its activation map, uint8 (H, W, 3).
        has_boxes: Whether numbered regions are drawn on ``image``.
    """

    image: NDArray[np.uint8]
    overlays: Mapping[str, Sequence[NDArray[np.uint8]]]
    has_boxes: bool = False


class Example(NamedTuple):
    """One image with its prediction.

    Attributes:
        path: Its path below the root of the data.
        target: The true class.
        prediction: The class predicted.
        top: The most probable classes with their probabilities, best first.
        image: The image as a data URI; None where it cannot be shown.
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
    tested: Tested, numbers: Sequence[int], pictures: Mapping[int, Pictures]
) -> dict[int, Example]:
    """Describe images; image number to example.

    Args:
        tested: The run.
        numbers: Which images.
        pictures: Image number -> its pictures, as far as there are any.
    """
    tiles = sum(1 + sum(map(len, shown.overlays.values())) for shown in pictures.values())
    side = tile_side(tiles)
    return {number: _example(tested, number, pictures.get(number), side) for number in numbers}


def _example(tested: Tested, number: int, pictures: Pictures | None, side: int) -> Example:
    probabilities = tested.probabilities[number]
    order = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
    stages = pictures.overlays if pictures is not None else {}
    return Example(
        path=str(tested.paths[number]),
        target=tested.classes[tested.targets[number]],
        prediction=tested.classes[tested.predictions[number]],
        top=[(tested.classes[label], float(probabilities[label])) for label in order],
        image=data_uri(pictures.image, side) if pictures is not None else None,
        stages={name: [data_uri(part, side) for part in parts] for name, parts in stages.items()},
    )
