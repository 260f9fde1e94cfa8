"""What a predictor gives for each image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crossx.explain.maps import Explanation


@dataclass(frozen=True)
class Prediction:
    """What the network says about one image.

    Attributes:
        path: The image file; None for an image that was given in memory.
        label: Name of the most probable class; None where the image could not be read.
        probability: Its calibrated probability, softmax(logits / temperature); None likewise.
        error: Why there is no prediction, on one line; None where there is one.
        top: The most probable classes and their probabilities, best first, as many as were asked for.
    """

    path: Path | None
    label: str | None = None
    probability: float | None = None
    error: str | None = None
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class ExplainedImage:
    """Where the network looks in one image.

    Attributes:
        path: The image file; None for an image that was given in memory.
        pixels: uint8 (S, S, 3), what the network saw of it; None where the image could not be read.
        explanation: Prediction and maps; None likewise.
        error: Why there is none, on one line; None where there is one.
    """

    path: Path | None
    pixels: NDArray[np.uint8] | None = None
    explanation: Explanation | None = None
    error: str | None = None


@dataclass(frozen=True)
class Features:
    """What the network's classifiers see of one image.

    Attributes:
        path: The image file; None for an image that was given in memory.
        vector: float32 (D,), of length 1; None where the image could not be read.
        error: Why there is none, on one line; None where there is one.
    """

    path: Path | None
    vector: NDArray[np.float32] | None = None
    error: str | None = None
