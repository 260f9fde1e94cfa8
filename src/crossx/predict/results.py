"""Results of a predictor, one per image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crossx.explain.maps import Explanation


@dataclass(frozen=True)
class Prediction:
    """The predicted classes of one image.

    Attributes:
        path: The image file; None for an image in memory.
        label: Name of the most probable class; None for an error, and for an image that is rejected as one of none of
            the classes.
        probability: Calibrated probability of the most probable class, softmax(logits / temperature), also if the image
            is rejected; None for an error.
        error: Why there is no prediction, on one line.
        top: The most probable classes and their probabilities, best first, also if the image is rejected.
        score: The score that is below the threshold if the image is rejected, see ``crossx.evaluation.unknowns``; None
            for an error, or if the run has no threshold.
        candidates: The classes of the prediction set, most probable first, if a coverage was asked for, see
            ``crossx.evaluation.conformal``; it supposes that the image shows one of the classes.
    """

    path: Path | None
    label: str | None = None
    probability: float | None = None
    error: str | None = None
    top: tuple[tuple[str, float], ...] = ()
    score: float | None = None
    candidates: tuple[str, ...] | None = None

    @property
    def nearest(self) -> str | None:
        """Name of the most probable class, also if the image is rejected; None for an error."""
        return self.top[0][0] if self.top else None

    @property
    def rejected(self) -> bool:
        """Whether the image is taken to show none of the classes."""
        return self.label is None and self.error is None


@dataclass(frozen=True)
class ExplainedImage:
    """Where the network looks in one image.

    Attributes:
        path: The image file; None for an image in memory.
        pixels: uint8 (S, S, 3), the network's input; None for an error.
        explanation: Prediction and maps; None for an error.
        error: Why there is no explanation, on one line.
        rejected: Whether the image is taken to show none of the classes.
    """

    path: Path | None
    pixels: NDArray[np.uint8] | None = None
    explanation: Explanation | None = None
    error: str | None = None
    rejected: bool = False


@dataclass(frozen=True)
class Features:
    """The feature vector of one image.

    Attributes:
        path: The image file; None for an image in memory.
        vector: float32 (D,), L2-normalised; None for an error.
        error: Why there are no features, on one line.
    """

    path: Path | None
    vector: NDArray[np.float32] | None = None
    error: str | None = None


@dataclass(frozen=True)
class Neighbor:
    """A training image that is similar to an image.

    Attributes:
        path: Its file, which may no longer exist.
        name: Its path relative to the root of the training data.
        label: Name of its class.
        similarity: Cosine of the features, -1 to 1.
    """

    path: Path
    name: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Neighbors:
    """The training images that are nearest to one image.

    Attributes:
        path: The image file; None for an image in memory.
        neighbors: Nearest first.
        error: Why there are none, on one line.
    """

    path: Path | None
    neighbors: tuple[Neighbor, ...] = ()
    error: str | None = None
