"""Image quality by cleanvision, and images that are unlike all others."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from crossx.data.images import read_pixels
from crossx.predict.search import nearest_vectors

ISSUES = ("dark", "light", "blurry", "low_information", "odd_aspect_ratio", "odd_size", "grayscale")
"""Names of cleanvision, at its default thresholds."""
NEIGHBOURS = 10
DEVIATIONS = 3.5
"""How far the distance of an outlier is above the median, in robust standard deviations of its logarithm: the limit
that Iglewicz and Hoaglin (1993) recommend for the modified z-score."""
LEAST_IMAGES = 30
"""Images below which no outlier is reported."""
LEAST_DISTANCE = 1e-4
"""Mean distance below which an image has so many copies that it says nothing about how far apart images usually are."""


@dataclass(frozen=True)
class Outlier:
    """An image that is unlike all others.

    Attributes:
        image: Its number.
        distance: Mean cosine distance to its ``NEIGHBOURS`` nearest images.
        nearest: Number of the nearest image.
    """

    image: int
    distance: float
    nearest: int


class _Pictures:
    """Images as cleanvision reads them from a torchvision dataset, decoded as everywhere in crossx."""

    def __init__(self, files: Sequence[Path], progress: Callable[[int, int], None] | None) -> None:
        self._files, self._progress = files, progress

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[Image.Image]:
        if self._progress is not None:
            self._progress(number + 1, len(self._files))
        picture = Image.fromarray(read_pixels(self._files[number]))
        pixels = np.asarray(picture)
        # cleanvision knows grey images by their mode
        grey = bool((pixels == pixels[..., :1]).all())
        return (picture.convert("L") if grey else picture,)


def find_quality_issues(
    files: Sequence[Path], *, progress: Callable[[int, int], None] | None = None
) -> dict[str, list[tuple[int, float]]]:
    """Find images of doubtful quality.

    Args:
        files: Readable images.
        progress: Called with the number of images done and the total.

    Returns:
        Issue of ``ISSUES`` -> numbers of the images that have it, with cleanvision's score (0 is worst), worst first.
    """
    from cleanvision import Imagelab

    if not files:
        return {issue: [] for issue in ISSUES}
    # cleanvision prints, and shows progress bars of its own
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        lab = Imagelab(torchvision_dataset=_Pictures(files, progress), verbose=False)
        lab.find_issues({issue: {} for issue in ISSUES}, n_jobs=1, verbose=False)
    found = {}
    for issue in ISSUES:
        scores = lab.issues[f"{issue}_score"].to_numpy(dtype=float)
        flagged = np.flatnonzero(lab.issues[f"is_{issue}_issue"].to_numpy(dtype=bool))
        worst = sorted(flagged.tolist(), key=lambda number: (scores[number], number))
        found[issue] = [(number, round(float(scores[number]), 4)) for number in worst]
    return found


def find_outliers(vectors: NDArray[np.float32]) -> tuple[list[Outlier], float | None]:
    """Find images that are farther from their nearest neighbours than images usually are.

    Args:
        vectors: float32 (N, D), embeddings of length 1.

    Returns:
        The outliers, farthest first, and the distance from which an image is one; None if there are too few images
        without many copies.
    """
    if len(vectors) < LEAST_IMAGES:
        return [], None
    embedded = torch.from_numpy(vectors)
    similarities, positions = nearest_vectors(embedded, embedded, NEIGHBOURS + 1)
    others = positions != torch.arange(len(vectors))[:, None]
    # of images with many identical copies, the image itself may not be among its neighbours
    distances = ((1 - similarities) * others).sum(1) / others.sum(1)
    apart = (distances > LEAST_DISTANCE).numpy()
    if apart.sum() < LEAST_IMAGES:
        return [], None
    logarithms = np.log(distances.clamp(min=LEAST_DISTANCE).numpy())
    middle = float(np.median(logarithms[apart]))
    spread = 1.4826 * float(np.median(np.abs(logarithms[apart] - middle)))
    threshold = float(np.exp(middle + DEVIATIONS * spread))
    far = np.flatnonzero(logarithms > middle + DEVIATIONS * spread)
    outliers = [
        Outlier(int(image), round(float(distances[image]), 4), int(positions[image][others[image]][0]))
        for image in far
    ]
    return sorted(outliers, key=lambda outlier: (-outlier.distance, outlier.image)), round(threshold, 4)
