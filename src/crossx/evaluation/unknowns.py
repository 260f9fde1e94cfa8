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

benchmarks/unknowns.py compares them with the distance to the nearest training images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossx.errors import UsageError

SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "max_probability": lambda logits: logits.softmax(1).amax(1),
    "max_logit": lambda logits: logits.amax(1),
    "energy": lambda logits: logits.logsumexp(1),
}
"""Name -> score (B,) of logits (B, K)."""

SCORE = "max_logit"
"""Score of rejection, unless another is asked for; docs/unknowns.md compares them."""
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


class Separation(TypedDict):
    """How well a score separates known from unknown images.

    Attributes:
        auroc: Probability that a known image has a higher score than an unknown one, the area under the ROC curve.
        fpr95: Share of unknown images above the threshold that keeps 95% of these known ones.
        oscr: Probability that a known image is classified correctly and has a higher score than an unknown one: the
            area under the curve of correct classification over false positives (Dhamija et al., "Reducing Network
            Agnostophobia", 2018, https://arxiv.org/abs/1811.04110). At most the accuracy.
    """

    auroc: float
    fpr95: float
    oscr: float


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
    threshold = np.sort(known)[int(0.05 * len(known) + 1e-9)]
    return {
        "auroc": float(wins.mean()),
        "fpr95": float((unknown >= threshold).mean()),
        "oscr": float((wins * correct).mean()),
    }


def mean_score(name: str, views: list[Tensor]) -> Tensor:
    """Return the score of images, (B,), averaged over the logits (B, K) of their views."""
    return torch.stack([SCORES[name](logits) for logits in views]).mean(0)
