"""Intervals of accuracies: bootstrap over test images, Student's over seeds.

Resampling N images with replacement draws from a handful of kinds of image (its class, right or wrong), so the
numbers of each kind in a resample are multinomial. Drawing these numbers is the same bootstrap without the
(resamples, N) table of indices: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A percentile interval.

    Attributes:
        low: Lower end, as a fraction.
        high: Upper end, as a fraction.
    """

    low: float
    high: float

    def to_json(self) -> list[float]:
        """Return ``[low, high]``."""
        return [self.low, self.high]


def accuracy_intervals(
    correct: NDArray[np.bool_],
    targets: NDArray[np.int64],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return the percentile bootstrap intervals of ``top1`` and ``class_mean``.

    They say how much the numbers depend on which images were tested, not on the training seed. Where every
    image is right (or wrong) the interval has no width: a percentile interval cannot tell more.

    Args:
        correct: (N,), whether each image is predicted right; N > 0.
        targets: (N,), the class index of each image.
        confidence: Probability that the interval is to cover.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    _, labels = np.unique(targets, return_inverse=True)
    kinds = 2 * labels + correct
    counts = np.bincount(kinds, minlength=2 * (int(labels.max()) + 1))
    n = len(correct)
    # Thousands of classes times thousands of resamples need not lie in memory together.
    block = max(1, 4_000_000 // len(counts))
    generator = np.random.default_rng(seed)
    top1, class_mean = [], []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.multinomial(n, counts / n, size=size).reshape(size, -1, 2)
        right, totals = drawn[:, :, 1], drawn.sum(axis=2)
        top1.append(right.sum(axis=1) / n)
        class_mean.append((right / np.maximum(totals, 1)).sum(axis=1) / (totals > 0).sum(axis=1))
    return {
        "top1": _percentile(np.concatenate(top1), confidence),
        "class_mean": _percentile(np.concatenate(class_mean), confidence),
    }


def difference_interval(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the paired percentile bootstrap interval of the difference in top-1, a minus b.

    Args:
        correct_a: (N,), whether the first classifier is right on each image; N > 0.
        correct_b: (N,), the same for the second on the same images.
        confidence: Probability that the interval is to cover.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    differences = correct_a.astype(np.float64) - correct_b
    return mean_interval(differences, confidence=confidence, resamples=resamples, seed=seed)


def mean_interval(
    values: NDArray[np.float64],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of a mean over images.

    Args:
        values: (N,), one number an image out of a handful that occur, such as the share of trainings that have it
            right; N > 0.
        confidence: Probability that the interval is to cover.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    kinds, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return _percentile(drawn @ kinds / len(values), confidence)


def student_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval | None:
    """Return Student's t interval of the mean of a few normally distributed numbers, such as accuracies over seeds.

    Args:
        values: The numbers; with fewer than two there is no interval.
        confidence: Probability that the interval is to cover.
    """
    if len(values) < 2:
        return None
    mean, error = np.mean(values), stats.sem(values)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)
    return Interval(float(mean) - half, float(mean) + half)


def _percentile(values: NDArray[np.float64], confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))
