"""Images of a test set with what the network says about them and what its parts look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossx.report.confusion import MutualConfusion, mutual_confusions
from crossx.report.results import RunResults
from crossx.report.thumbnails import data_uri, tile_side

PAIRS = 6
"""Pairs of classes with pictures of both."""
WRONG = 8
"""Wrong predictions with pictures, the most confident ones."""
RIGHT = 8
"""Right predictions with pictures, drawn at random."""
SEED = 0
"""Of that draw."""
TOP = 3
"""Classes named for each image."""


class ShownImages(NamedTuple):
    """Which images of a test set are shown.

    Attributes:
        pairs: A pair, its most confident image taken for the other class, and the most confident right image of that
            other class (None where no image of it is right).
        wrong: The most confident wrong predictions, most confident first.
        right: Right predictions drawn at random, in the order of the images.
    """

    pairs: list[tuple[MutualConfusion, int, int | None]]
    wrong: list[int]
    right: list[int]

    @property
    def images(self) -> list[int]:
        """Every image that is shown, sorted, each once."""
        shown = {image for _, *both in self.pairs for image in both if image is not None}
        return sorted(shown.union(self.wrong, self.right))


def choose_examples(run: RunResults) -> ShownImages:
    """Choose the images to show, at most ``2 * PAIRS + WRONG + RIGHT``; the same on every machine."""
    wrong = np.flatnonzero(~run.correct)
    right = np.flatnonzero(run.correct)
    drawn = np.random.default_rng(SEED).choice(right, min(RIGHT, len(right)), replace=False)
    pairs = []
    for pair in mutual_confusions(run.confusion)[:PAIRS]:
        taken = _most_confident(run, (run.targets == pair.target) & (run.predictions == pair.prediction))
        other = _most_confident(run, run.correct & (run.targets == pair.prediction))
        pairs.append((pair, taken[0], other[0] if other else None))
    return ShownImages(
        pairs,
        wrong[np.argsort(-run.confidences[wrong], kind="stable")][:WRONG].tolist(),
        sorted(drawn.tolist()),
    )


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
    run: RunResults, numbers: Sequence[int], pictures: Mapping[int, Pictures]
) -> dict[int, Example]:
    """Describe images; image number to example.

    Args:
        run: The tested run.
        numbers: Which images.
        pictures: Image number -> its pictures, as far as there are any.
    """
    tiles = sum(1 + sum(map(len, shown.overlays.values())) for shown in pictures.values())
    side = tile_side(tiles)
    return {number: _example(run, number, pictures.get(number), side) for number in numbers}


def _example(run: RunResults, number: int, pictures: Pictures | None, side: int) -> Example:
    probabilities = run.probabilities[number]
    order = np.argsort(-probabilities, kind="stable")[:TOP].tolist()
    stages = pictures.overlays if pictures is not None else {}
    return Example(
        path=str(run.paths[number]),
        target=run.classes[run.targets[number]],
        prediction=run.classes[run.predictions[number]],
        top=[(run.classes[label], float(probabilities[label])) for label in order],
        image=data_uri(pictures.image, side) if pictures is not None else None,
        stages={name: [data_uri(part, side) for part in parts] for name, parts in stages.items()},
    )


def _most_confident(run: RunResults, chosen: NDArray[np.bool_]) -> list[int]:
    """Return the one image of a mask that the network was surest about, the first of equal ones; none of none."""
    images = np.flatnonzero(chosen)
    return [int(images[run.confidences[images].argmax()])] if len(images) else []
