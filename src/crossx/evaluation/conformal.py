"""Prediction sets: the classes that an image may show, with a stated coverage.

Split conformal prediction (Vovk et al., "Algorithmic Learning in a Random World", 2005; Papadopoulos et al., 2002): if
a new image is exchangeable with the calibration images, its class is in its set with the stated probability or more,
whatever the network. The set has all classes whose probability is at least a threshold, as in the least ambiguous
set-valued classifier (LAC; Sadinle, Lei and Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error
Levels", 2019, https://arxiv.org/abs/1609.00451), and always the most probable class. If the probabilities are right,
no other sets with this coverage are smaller on average.

The guarantee is on average over calibrations, and over classes: a hard class is covered less than an easy one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crossx.errors import UsageError, counted
from crossx.evaluation.intervals import Interval
from crossx.runs import PredictionSets

PERCENTS = range(50, 100)
"""Coverages that are calibrated, in percent."""
TOLERABLE = 0.05
"""How far the coverage of a calibration may be below the one asked for, in 19 of 20 cases, without a warning."""


def least_probabilities(probabilities: NDArray[np.float64]) -> tuple[float, ...]:
    """Return the least probability of a class in a set, for each coverage in ``PERCENTS`` that can be guaranteed.

    For a coverage c, ceil((n + 1) c) of the n calibration images have at least this probability of their own class.

    Args:
        probabilities: (n,), the probability of each calibration image's own class.

    Returns:
        Decreasing; shorter than ``PERCENTS`` if n is too small: 99% needs 99 images.
    """
    descending = -np.sort(-probabilities)
    ranks = [_rank(len(descending), percent) for percent in PERCENTS]
    return tuple(float(descending[rank - 1]) for rank in ranks if rank <= len(descending))


def least_probability(sets: PredictionSets | None, views: str, coverage: float, run: object) -> float:
    """Return the least probability of a class in a set of this coverage.

    Between two calibrated coverages, the larger one is used.

    Args:
        sets: Those of the run.
        views: See ``views_key``.
        coverage: 0.5 to 0.99.
        run: The run, for errors.

    Raises:
        UsageError: If the coverage is out of range, or the run was not calibrated for it.
    """
    check_coverage(coverage)
    rows = sets.least_probability.get(views) if sets else None
    if sets is None or rows is None:
        raise UsageError(
            f"{run}: has no prediction sets, which --coverage needs: calibrate it on held-out images with "
            "`crossx calibrate RUN`."
        )
    index = percent_of(coverage) - PERCENTS.start
    if index >= len(rows):
        most = f"{PERCENTS[len(rows) - 1] / 100:g} at most" if rows else "none"
        raise UsageError(
            f"--coverage {coverage:g} needs {images_needed(coverage)} calibration images, and {run} has "
            f"{sets.images}: {most}. `crossx calibrate RUN` takes others."
        )
    return rows[index]


def check_coverage(coverage: float) -> None:
    """Raise ``UsageError`` if a coverage is not from 0.5 to 0.99."""
    # also NaN
    if not 0.5 <= coverage <= 0.99:
        raise UsageError(f"--coverage takes a number from 0.5 to 0.99, not {coverage}.")


def percent_of(coverage: float) -> int:
    """Return a coverage in percent, rounded up."""
    return int(np.ceil(100 * coverage - 1e-9))


def images_needed(coverage: float) -> int:
    """Return the least number of calibration images that can guarantee a coverage."""
    percent = percent_of(coverage)
    return -(-percent // (100 - percent))


def coverage_interval(images: int, coverage: float, *, confidence: float = 0.9) -> Interval:
    """Return an interval that has a calibration's coverage on new images with a stated probability.

    The coverage of a calibration on n images, on average over new images, has a beta distribution with parameters k and
    n + 1 - k for k = ceil((n + 1) c), if no two probabilities are equal (Vovk, "Conditional Validity of Inductive
    Conformal Predictors", 2012, https://arxiv.org/abs/1209.2673). So has the share of the images of the classes that
    are kept by ``keeping_threshold``, for c = ``keep``.

    Args:
        images: n, enough for a k of at most n.
        coverage: c.
        confidence: Probability that the interval has it.
    """
    tail = (1 - confidence) / 2
    low, high = (float(_coverage_quantile(images, coverage, q)) for q in (tail, 1 - tail))
    return Interval(low, high)


def _coverage_quantile(images: NDArray[np.int64] | int, coverage: float, q: float) -> NDArray[np.float64]:
    from scipy.stats import beta

    rank = np.ceil((images + 1) * coverage - 1e-9)
    return np.asarray(beta.ppf(q, rank, images + 1 - rank), dtype=np.float64)


def is_weak(images: int, coverage: float) -> bool:
    """Whether the coverage of a calibration on so few images may be more than ``TOLERABLE`` below the one asked for."""
    return coverage_interval(images, coverage).low < coverage - TOLERABLE


def images_enough(coverage: float) -> int:
    """Return the least number of calibration images from which on none is weak."""
    least = math.ceil(coverage / (1 - coverage) - 1e-9)
    # a coverage of 0.5 needs the most, 268
    numbers = np.arange(least, least + 300)
    weak = _coverage_quantile(numbers, coverage, 0.05) < coverage - TOLERABLE
    return int(numbers[weak].max(initial=least - 1)) + 1


def weakness(
    images: int, coverage: float, what: str = "the prediction sets were", does: str = "cover"
) -> str | None:
    """Say how far below its coverage a calibration on so few images may be; None if that is at most ``TOLERABLE``.

    Args:
        images: Number of calibration images.
        coverage: The coverage that was asked for.
        what: Subject and verb of the message.
        does: What is done with that share of the images.
    """
    if not is_weak(images, coverage):
        return None
    low, high = coverage_interval(images, coverage)
    return (
        f"{what} calibrated on {counted(images, 'image')} only: instead of {coverage:.0%}, that will {does} between "
        f"{low:.0%} and {high:.0%} of new images of the classes, in 9 of 10 calibrations. `crossx calibrate RUN "
        f"--data.root DIR` takes more; {images_enough(coverage)} are enough"
    )


def _rank(images: int, percent: int) -> int:
    """Return how many of the calibration images are to be covered, ceil((n + 1) c); more than n if n is too small."""
    return -(-(images + 1) * percent // 100)


class SetResults(NamedTuple):
    """Prediction sets of images whose class is known.

    Attributes:
        covered: bool (N,), whether the set has the image's class.
        sizes: int64 (N,), classes per set.
    """

    covered: NDArray[np.bool_]
    sizes: NDArray[np.int64]


def measure_sets(probabilities: NDArray[np.floating], targets: NDArray[np.int64], least: float) -> SetResults:
    """Form the set of each image.

    Args:
        probabilities: (N, K).
        targets: (N,).
        least: See ``least_probability``.
    """
    members = probabilities >= least
    members[np.arange(len(members)), probabilities.argmax(1)] = True
    return SetResults(members[np.arange(len(members)), targets], members.sum(1))
