"""Prediction sets against their definition, and their guarantee by counting."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossx.errors import UsageError
from crossx.evaluation.conformal import (
    PERCENTS,
    TOLERABLE,
    coverage_interval,
    images_enough,
    images_needed,
    is_weak,
    least_probabilities,
    least_probability,
    measure_sets,
    weakness,
)
from crossx.runs import PredictionSets


@given(n=st.integers(1, 150), percent=st.sampled_from(PERCENTS), seed=st.integers(0, 99))
def test_the_class_is_in_the_set_with_the_coverage(n: int, percent: int, seed: int) -> None:
    """Of n + 1 exchangeable images, each is as likely to be the new one."""
    own = np.random.default_rng(seed).random(n + 1)
    needed = -(-(n + 1) * percent // 100)
    covered = 0
    for new in range(n + 1):
        rows = least_probabilities(np.delete(own, new))
        index = percent - PERCENTS.start
        covered += index >= len(rows) or own[new] >= rows[index]
    assert covered >= needed
    if n >= images_needed(percent / 100):
        assert covered == needed


def test_few_images_guarantee_less() -> None:
    assert [images_needed(coverage) for coverage in (0.5, 0.9, 0.95, 0.99)] == [1, 9, 19, 99]
    for n in (1, 8, 9, 18, 19, 98, 99, 1000):
        rows = least_probabilities(np.linspace(0.1, 0.9, n))
        assert len(rows) == sum(images_needed(percent / 100) <= n for percent in PERCENTS)
        assert list(rows) == sorted(rows, reverse=True)


def test_the_thresholds_of_a_run_are_refused_where_there_are_none() -> None:
    sets = PredictionSets(12, {"1": least_probabilities(np.linspace(0, 1, 12))})
    assert least_probability(sets, "1", 0.5, "RUN") > least_probability(sets, "1", 0.9, "RUN")
    # between two calibrated coverages, the larger one
    assert least_probability(sets, "1", 0.895, "RUN") == least_probability(sets, "1", 0.9, "RUN")
    with pytest.raises(UsageError, match="needs 19 calibration images, and RUN has 12"):
        least_probability(sets, "1", 0.95, "RUN")
    for missing, views in ((None, "1"), (sets, "5")):
        with pytest.raises(UsageError, match="RUN: has no prediction sets"):
            least_probability(missing, views, 0.9, "RUN")
    for coverage in (0, 1, 1.5, -1, 0.49, 0.995, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--coverage takes a number from"):
            least_probability(sets, "1", coverage, "RUN")


def test_sets_are_those_of_a_loop_and_never_empty() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(5), 50)
    targets = generator.integers(0, 5, 50)
    for least in (0.0, 0.2, 0.4, 0.9, 1.1):
        found = measure_sets(probabilities, targets, least)
        for row, target, covered, size in zip(probabilities, targets, *found, strict=True):
            members = {c for c in range(5) if row[c] >= least} or {int(row.argmax())}
            assert (covered, size) == (target in members, len(members))


def test_the_interval_of_the_coverage_holds_nine_tenths_of_the_calibrations() -> None:
    generator = np.random.default_rng(0)
    # the probability of an image's own class is uniform, so the coverage of a threshold is one minus it
    coverages = [1 - least_probabilities(generator.random(200))[90 - PERCENTS.start] for _ in range(1000)]
    low, high = coverage_interval(200, 0.9)
    assert np.mean((np.array(coverages) >= low) & (np.array(coverages) <= high)) == pytest.approx(
        0.9, abs=0.03
    )
    assert np.mean(coverages) == pytest.approx(0.9, abs=0.005)


@pytest.mark.parametrize(("coverage", "enough"), [(0.5, 268), (0.9, 110), (0.95, 61), (0.99, 99)])
def test_as_many_images_as_are_said_to_be_enough_are(coverage: float, enough: int) -> None:
    """Against the quantiles of simulated calibrations: the coverage is an order statistic of uniform numbers."""
    assert images_enough(coverage) == enough
    assert not any(is_weak(images, coverage) for images in range(enough, enough + 40))
    if enough > images_needed(coverage):
        assert is_weak(enough - 1, coverage)
    generator = np.random.default_rng(0)
    rank = math.ceil((enough + 1) * coverage - 1e-9)
    covered = np.sort(generator.random((4000, enough)), axis=1)[:, rank - 1]
    low, high = coverage_interval(enough, coverage)
    assert np.quantile(covered, [0.05, 0.95]) == pytest.approx([low, high], abs=0.01)
    assert coverage - TOLERABLE <= low


def test_a_coverage_from_few_images_is_called_weak() -> None:
    generator = np.random.default_rng(0)
    for images in (12, 40, 300):
        coverages = [
            1 - least_probabilities(generator.random(images))[90 - PERCENTS.start] for _ in range(1500)
        ]
        warned = weakness(images, 0.9)
        assert (warned is not None) == (np.quantile(coverages, 0.05) < 0.85)
        if warned is not None:
            low, high = (round(100 * value) for value in np.quantile(coverages, [0.05, 0.95]))
            shown = re.search(r"between (\d+)% and (\d+)%", warned)
            assert shown is not None
            assert [int(shown[1]), int(shown[2])] == pytest.approx([low, high], abs=2)
            assert f"calibrated on {images} images only: instead of 90%" in warned
