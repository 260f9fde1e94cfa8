"""Images of none of the classes: scores that are low for them, and how well a score separates them.

A softmax has to choose one of the classes, whatever the image shows. Each score is a number per image that tends to be
higher if the image shows one of the classes, so that an image below a threshold can be left without a class:

- ``max_probability``: the largest probability (Hendrycks and Gimpel, "A Baseline for Detecting Misclassified and
  Out-of-Distribution Examples in Neural Networks", 2017, https://arxiv.org/abs/1610.02136), the baseline.
- ``max_logit``: the largest logit (Hendrycks et al., "Scaling Out-of-Distribution Detection for Real-World Settings",
  2022, https://arxiv.org/abs/1911.11132; Vaze et al., "Open-Set Recognition: A Good Closed-Set Classifier is All You
  Need", 2022, https://arxiv.org/abs/2110.06207).
- ``energy``: log sum exp of the logits, the negative free energy (Liu et al., "Energy-based Out-of-distribution
  Detection", 2020, https://arxiv.org/abs/2010.03759).
- ``similarity``: the cosine of the features to the nearest class mean, the mean of the features of a class's training
  images, each of length 1.
- ``combined``: ``max_logit`` + w ``similarity``. w is the standard deviation of ``max_logit`` over the training images
  divided by that of ``similarity``, so that both count alike.

The last two need class means (``ClassMeans``). All constants come from the training images, so that the promise of
``keeping_threshold`` holds for each score. benchmarks/unknowns.py compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from crossx.errors import UsageError

if TYPE_CHECKING:
    from crossx.evaluation.network import Network

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max_probability": lambda logits: logits.softmax(1).amax(1),
    "max_logit": lambda logits: logits.amax(1),
    "energy": lambda logits: logits.logsumexp(1),
}
"""Name -> score (B,) of logits (B, K)."""

FEATURE_SCORES = ("similarity", "combined")
"""Scores that need class means."""
FEATURE_SCORE = "combined"
"""Score of rejection of a network with class means, unless another is asked for."""

SCORE = "max_logit"
"""Score of rejection of a network without class means, unless another is asked for; docs/unknowns.md compares them."""
MIN_DEVIATION = 1e-6
"""Least standard deviation of the similarity; it is 0 where each class has one image."""
MAX_FEATURES = 50_000_000
"""Numbers in the features to keep in memory for the standard deviation; beyond, a part of the images is kept."""
KEEP = 0.95
"""Share of the images of the classes to keep, unless another is asked for."""


def keeping_threshold(scores: NDArray[np.float64], keep: float = KEEP) -> float | None:
    """Return the least score of an image that is to be kept.

    An image of the classes that is exchangeable with the n given ones is kept with probability ``keep`` or more: it is
    below the k-th smallest of their scores with probability k / (n + 1), and k is the largest for which that is at most
    ``1 - keep`` (the p-value of split conformal prediction; Vovk et al., 2005).

    Args:
        scores: (n,), of images of the classes that the network was not trained on.
        keep: Share of the images of the classes to keep, above 0 and below 1.

    Returns:
        The threshold; None if n is too small for any: 0.95 needs 19 images.

    Raises:
        UsageError: If ``keep`` is not above 0 and below 1.
    """
    if not 0 < keep < 1:
        raise UsageError(f"keep must be above 0 and below 1, not {keep}.")
    # 1 - 0.95 is slightly more than a twentieth
    rank = int((len(scores) + 1) * (1 - keep) + 1e-9)
    return float(np.partition(scores, rank - 1)[rank - 1]) if rank else None


def images_to_keep(keep: float) -> int:
    """Return the least number of images on which ``keeping_threshold`` finds a threshold."""
    return math.ceil(1 / (1 - keep) - 1e-9) - 1


KEPT_SHARES = (0.98, 0.95, 0.9, 0.8)
"""Shares of the images of the classes to keep, for each of which it is measured how many others are rejected."""


class Separation(TypedDict):
    """How well a score separates known from unknown images.

    Attributes:
        auroc: Probability that a known image has a higher score than an unknown one, the area under the ROC curve.
        fpr95: Share of unknown images above the threshold that keeps 95% of these known ones.
        oscr: Probability that a known image is classified correctly and has a higher score than an unknown one: the
            area under the curve of correct classification over false positives (Dhamija et al., "Reducing Network
            Agnostophobia", 2018, https://arxiv.org/abs/1811.04110). At most the accuracy.
        rejected: Share of ``KEPT_SHARES``, as text -> share of unknown images below the threshold that keeps it.
    """

    auroc: float
    fpr95: float
    oscr: float
    rejected: dict[str, float]


def separation(
    known: NDArray[np.float64], unknown: NDArray[np.float64], correct: NDArray[np.bool_]
) -> Separation:
    """Measure how well a score separates known from unknown images; ties count half.

    Args:
        known: (n,), scores of images of the classes; n > 0.
        unknown: (m,), scores of others; m > 0.
        correct: (n,), whether the known image is classified correctly.
    """
    ordered = np.sort(unknown)
    below = np.searchsorted(ordered, known, "left") + np.searchsorted(ordered, known, "right")  # doubled
    wins = below / (2 * len(unknown))
    own = np.sort(known)

    def rejected(keep: float) -> float:
        return float((unknown < own[int((1 - keep) * len(own) + 1e-9)]).mean())

    return {
        "auroc": float(wins.mean()),
        "fpr95": 1 - rejected(0.95),
        "oscr": float((wins * correct).mean()),
        "rejected": {f"{keep:g}": rejected(keep) for keep in KEPT_SHARES},
    }


class ViewScores(NamedTuple):
    """What scores are computed from, of each view of images.

    Attributes:
        logits: (B, K) of each view.
        similarities: (B,) of each view; None if the network has no class means.
    """

    logits: Sequence[Tensor]
    similarities: Sequence[Tensor] | None = None

    @classmethod
    def compute(cls, network: Network, views: Iterable[Tensor], *, similarities: bool) -> ViewScores:
        """Run a network over views, uint8 (B, 3, S, S) each; ``similarities`` only if it has them."""
        if not similarities:
            return cls([network.logits(view) for view in views])
        pairs = [network.logits_and_similarities(view) for view in views]
        return cls([logits for logits, _ in pairs], [cosines for _, cosines in pairs])

    def names(self, weight: float | None) -> tuple[str, ...]:
        """Return the names of the scores that can be computed."""
        if self.similarities is None:
            return tuple(SCORES)
        return (*SCORES, *(name for name in FEATURE_SCORES if name != "combined" or weight is not None))

    def double(self) -> ViewScores:
        """Return the same in float64."""
        cosines = self.similarities
        return ViewScores(
            [logits.double() for logits in self.logits],
            None if cosines is None else [similarity.double() for similarity in cosines],
        )

    def score(self, name: str, weight: float | None = None) -> Tensor:
        """Return a score of each image, (B,), averaged over its views.

        Args:
            name: One of ``SCORES``, or of ``FEATURE_SCORES`` if there are similarities.
            weight: w of ``combined``.
        """
        if name in SCORES:
            return torch.stack([SCORES[name](logits) for logits in self.logits]).mean(0)
        assert self.similarities is not None
        similarity = torch.stack(list(self.similarities)).mean(0)
        if name == "similarity":
            return similarity
        assert weight is not None
        return self.score("max_logit") + weight * similarity


def similarity(features: Tensor, class_means: Tensor) -> Tensor:
    """Return the cosine of features (B, D) to the nearest of class means (K, D) of length 1, float32 (B,)."""
    return (normalize(features.float()) @ class_means.float().T).amax(1)  # (B, D) @ (D, K) -> (B, K) -> (B,)


class ClassMeans(NamedTuple):
    """Means of the features of each class's training images.

    Attributes:
        means: float32 (K, D), of length 1; zeros for a class without images.
        weight: w of the score ``combined``, at least 0.
    """

    means: Tensor
    weight: float


class ClassMeansSum:
    """Add up features, batch by batch, for their class means.

    Args:
        num_classes: K.
        images: Number of images that will be added.
    """

    def __init__(self, num_classes: int, images: int) -> None:
        self._classes, self._images, self._added = num_classes, images, 0
        self._sums: Tensor | None = None
        # unit features and largest logits of all images, or of a part, evenly spread
        self._kept: list[tuple[Tensor, Tensor]] = []

    def add(self, logits: Tensor, features: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (B, K), features (B, D), targets (B,), on the CPU."""
        unit, width = normalize(features.double()), features.shape[1]
        if self._sums is None:
            self._sums = torch.zeros(self._classes, width, dtype=torch.double)
        self._sums.index_add_(0, targets, unit)
        stride = -(-self._images * width // MAX_FEATURES)
        mask = torch.arange(self._added, self._added + len(unit)) % stride == 0
        self._kept.append((unit[mask].float(), logits[mask].double().amax(1)))
        self._added += len(unit)

    def finish(self) -> ClassMeans:
        """Return the means of what was added, at least one batch."""
        assert self._sums is not None
        means = normalize(self._sums).float()
        cosines = torch.cat([similarity(unit, means) for unit, _ in self._kept])
        logits = torch.cat([largest for _, largest in self._kept])
        weight = float(logits.std(correction=0)) / max(float(cosines.std(correction=0)), MIN_DEVIATION)
        return ClassMeans(means, weight)
