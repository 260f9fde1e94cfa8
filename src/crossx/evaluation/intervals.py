"""Confidence intervals of accuracies: bootstrap over test images, Student's t over seeds.

Resampling N images with replacement draws from a few kinds of images (the class, correct or wrong), so the counts of
each kind in a resample are multinomial. Drawing these counts is the same bootstrap without a (resamples, N) table of
indices: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float


def accuracy_intervals(
    correct: NDArray[np.bool_],
    targets: NDArray[np.int64],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return the percentile bootstrap intervals of ``top1`` and ``class_mean``.

    They cover the choice of test images, not the training seed. If all images are correct, or all wrong, every resample
    is the same; the intervals are then exact (``share_interval``).

    Args:
        correct: (N,), whether each image is predicted correctly; N > 0.
        targets: (N,), the class index of each image.
        confidence: Probability that the interval is to cover.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    n = len(correct)
    if np.ptp(correct.astype(int)) == 0:
        exact = share_interval(int(correct.sum()), n, confidence=confidence)
        return {"top1": exact, "class_mean": exact}
    _, labels = np.unique(targets, return_inverse=True)
    kinds = 2 * labels + correct
    counts = np.bincount(kinds, minlength=2 * (int(labels.max()) + 1))
    # in blocks, since thousands of classes times thousands of resamples take much memory
    block = max(1, 4_000_000 // len(counts))
    generator = np.random.default_rng(seed)
    top1, class_mean = [], []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.multinomial(n, counts / n, size=size).reshape(size, -1, 2)  # -> (size, classes, 2)
        right, totals = drawn[:, :, 1], drawn.sum(axis=2)
        top1.append(right.sum(axis=1) / n)
        class_mean.append((right / np.maximum(totals, 1)).sum(axis=1) / (totals > 0).sum(axis=1))
    return {
        "top1": percentile_interval(np.concatenate(top1), confidence),
        "class_mean": percentile_interval(np.concatenate(class_mean), confidence),
    }


def difference_interval(
    correct_a: NDArray[np.bool_],
    correct_b: NDArray[np.bool_],
    *,
    confidence: float = CONFIDENCE,
    **options: Any,
) -> Interval:
    """Return the paired percentile bootstrap interval of the difference in top-1, a minus b.

    If the classifiers differ on no image, or in the same way on all, every resample is the same; the interval is then
    ``matched_interval``.

    Args:
        correct_a: (N,), or (T, N) for the mean over T trainings: whether the first classifier is correct on each
            image; N > 0.
        correct_b: The same for the second classifier on the same images.
        confidence: Probability that the interval is to cover.
        **options: See ``mean_interval``.
    """
    a, b = np.atleast_2d(correct_a, correct_b)
    differences = a.astype(np.float64) - b
    if np.ptp(differences) == 0:
        # all trainings are alike
        return matched_interval(a[0], b[0], confidence=confidence)
    return mean_interval(differences.mean(axis=0), confidence=confidence, **options)


def mean_accuracy_interval(
    correct: NDArray[np.bool_], *, confidence: float = CONFIDENCE, **options: Any
) -> Interval:
    """Return the percentile bootstrap interval over images of the mean accuracy of several trainings.

    If all images are always correct, or always wrong, the interval is ``share_interval`` as in ``accuracy_intervals``.

    Args:
        correct: (T, N), whether each training is correct on each image; N > 0.
        confidence: Probability that the interval is to cover.
        **options: See ``mean_interval``.
    """
    if np.ptp(correct.astype(int)) == 0:
        return share_interval(int(correct[0].sum()), correct.shape[1], confidence=confidence)
    return mean_interval(correct.mean(axis=0), confidence=confidence, **options)


def mean_interval(
    values: NDArray[np.float64],
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of a mean over images.

    Args:
        values: (N,), one number per image with few distinct values, such as the share of trainings that predict it
            correctly; N > 0.
        confidence: Probability that the interval is to cover.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    kinds, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=resamples)
    return percentile_interval(drawn @ kinds / len(values), confidence)


def share_interval(count: int, total: int, *, confidence: float = CONFIDENCE) -> Interval:
    """Return the exact interval (Clopper and Pearson, 1934) of a share; it has a width even at 0 and 1.

    Args:
        count: Number of images with a property.
        total: Number of images, above 0.
        confidence: Probability that the interval is to cover.
    """
    from scipy import stats

    found = stats.binomtest(count, total).proportion_ci(confidence)
    return Interval(float(found.low), float(found.high))


def matched_interval(
    correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_], *, confidence: float = CONFIDENCE
) -> Interval:
    """Return the adjusted Wald interval of the difference in top-1, a minus b, on the same images.

    Half an image is added to each of the four outcomes. Unlike the bootstrap's interval, this one has a width if the
    classifiers differ on no image, and covers better on few images (Agresti and Min, Statistics in Medicine 24, 2005).

    Args:
        correct_a: (N,), whether the first classifier is correct on each image; N > 0.
        correct_b: (N,), the same for the second classifier.
        confidence: Probability that the interval is to cover.
    """
    from scipy import stats

    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    n = len(correct_a) + 2
    difference = (only_a - only_b) / n
    error = np.sqrt((only_a + only_b + 1) / n - difference**2) / np.sqrt(n)
    half = float(stats.norm.ppf((1 + confidence) / 2) * error)
    return Interval(max(difference - half, -1.0), min(difference + half, 1.0))


def student_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> Interval | None:
    """Return Student's t interval of the mean of normally distributed numbers, such as accuracies over seeds.

    Args:
        values: The numbers. There is no interval for fewer than two, nor for equal ones, such as shares of few images:
            their variance of 0 would claim that no other seed differs.
        confidence: Probability that the interval is to cover.
    """
    # equal shares of images may differ by rounding
    if len(values) < 2 or np.ptp(values) < 1e-12:
        return None
    from scipy import stats

    mean, error = np.mean(values), stats.sem(values)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * error)
    return Interval(float(mean) - half, float(mean) + half)


def percentile_interval(resampled: NDArray[np.float64], confidence: float = CONFIDENCE) -> Interval:
    """Return the percentile interval of a number's values in bootstrap resamples."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(low), float(high))
