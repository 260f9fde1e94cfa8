import re

import numpy as np
import pytest
import torch

from crossx.evaluation.metrics import calibration_error
from crossx.methods import CrossX
from crossx.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    reliability_bins,
    thinned,
    training_curves,
)


def points(series):
    return [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", series.path)]


def test_numbers_that_belong_together_share_a_chart(tested):
    charts = {
        chart.title: [series.label for series in chart.series]
        for chart in training_curves(tested.history, titles=CrossX.curve_titles)
    }
    assert charts == {
        "Loss": ["train", "val"],
        "Accuracy (top-1)": ["train", "val"],
        "Classification term": ["train"],
        "C3S term": ["last", "merged"],
        "Cross-layer term, merged": ["train"],
        "Similarity S of the parts (Eq. 3), last": ["diagonal", "off diagonal"],
        "Learning rate": ["lr"],
    }


def test_many_curves_are_divided_by_their_last_word():
    names = [
        f"train/s_{kind}_{stage}"
        for stage in ("last", "merged", "old")
        for kind in ("diagonal", "off_diagonal")
    ]
    charts = training_curves([dict({"epoch": 1}, **{name: float(n) for n, name in enumerate(names)})])
    assert [(chart.title, [series.label for series in chart.series]) for chart in charts] == [
        (f"s, {stage}", ["diagonal", "off diagonal"]) for stage in ("last", "merged", "old")
    ]
    # names that have no last words in common stay together
    (chart,) = training_curves([dict({"epoch": 1}, **{f"x_{n}": float(n) for n in range(6)})])
    assert len(chart.series) == 6


@pytest.mark.parametrize("scale", [1e-9, 2.5e-5, 0.001, 1.0, 123456.0])
def test_labels_of_ticks_have_room(scale):
    (chart,) = training_curves([{"epoch": n, "lr": scale * (1 + n / 7)} for n in range(4)])
    widest = max(len(tick.text) for tick in chart.y_ticks)
    assert chart.left - 6 >= 6.7 * widest
    assert all(float(tick.text) >= 0 for tick in chart.y_ticks)
    assert min(x for x, _ in points(chart.series[0])) >= chart.left


@pytest.mark.parametrize("name", ["lr", "val/top1"])
@pytest.mark.parametrize(
    ("value", "rise"), [(0, 0), (5e-5, 0), (0.875, 0), (1, 0), (1, -1.2e-3), (1.0, -1e-7)]
)
def test_ticks_differ_also_for_a_constant(name, value, rise):
    (chart,) = training_curves([{"epoch": n, name: value + n * rise} for n in range(2)])
    texts = [tick.text for tick in chart.y_ticks]
    assert len({*texts}) == len(texts) > 2
    numbers = [float(text.rstrip("%")) for text in texts]
    # at equal distances, up to the rounding of coordinates to 0.1
    steps = np.diff([tick.place for tick in chart.y_ticks]) / np.diff(numbers)
    assert np.ptp(steps) <= abs(steps.mean()) * 0.02
    assert name == "lr" or 0 <= min(numbers) <= max(numbers) <= 100
    low, high = numbers[0], numbers[-1]
    assert low <= value * (100 if name == "val/top1" else 1) <= high


def test_unknown_numbers_are_titled_by_their_name():
    (chart,) = training_curves([{"epoch": 1, "train/my_term_a": 1.0, "train/my_term_b": 2.0}])
    assert (chart.title, [series.label for series in chart.series]) == ("my term", ["a", "b"])


def test_places_are_proportional_to_the_values():
    (chart,) = training_curves(
        [{"epoch": epoch, "x": value} for epoch, value in ((1, 0.0), (2, 4.0), (5, 1.0))]
    )
    (x0, y0), (x1, y1), (x2, y2) = points(chart.series[0])
    assert (x1 - x0) / (x2 - x0) == pytest.approx(1 / 4, abs=1e-3)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(1 / 4, abs=2e-3)
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points(chart.series[0]))
    zero = next(tick for tick in chart.y_ticks if tick.text == "0")
    assert zero.place == y0


def test_a_repeated_curve_and_missing_values_are_left_out():
    rows = [
        {"epoch": 1, "train/loss": 2.0, "train/data": 2.0},
        {"epoch": 2, "train/loss": 1.0, "train/data": 1.0},
    ]
    rows[1]["val/loss"] = 3.0
    (chart,) = training_curves(rows)
    assert [(series.label, len(points(series))) for series in chart.series] == [("train", 2), ("val", 1)]


def test_equal_curves_of_two_splits_or_two_numbers_stay():
    row = {"epoch": 1, "train/loss": 0.5, "val/loss": 0.5, "train/top1": 1.0, "val/top1": 1.0, "train/s": 1.0}
    charts = {chart.title: [series.label for series in chart.series] for chart in training_curves([row])}
    assert charts == {"Loss": ["train", "val"], "Accuracy (top-1)": ["train", "val"], "s": ["train"]}


@pytest.mark.parametrize("kept", [None, 1, 7])
def test_one_epoch_is_a_chart_too(kept):
    (chart,) = training_curves([{"epoch": 1, "train/top1": 0.5}], kept)
    assert chart.series[0].last == "50.0%"
    assert (chart.kept is not None) == (kept == 1)


def test_no_history_is_no_chart():
    assert training_curves([]) == []


def test_long_histories_are_thinned_and_keep_their_end():
    rows = [{"epoch": epoch} for epoch in range(1, 1002)]
    kept = thinned(rows, 100)
    assert len(kept) <= 101
    assert (kept[0], kept[-1]) == (rows[0], rows[-1])
    assert thinned(rows[:100], 100) == rows[:100]


def test_bins_sum_up_to_the_calibration_error(tested):
    bins = reliability_bins(tested.confidences, tested.correct)
    assert sum(b.n for b in bins) == len(tested.targets)
    error = sum(b.n * abs(b.accuracy - b.confidence) for b in bins if b.n) / len(tested.targets)
    expected = calibration_error(torch.from_numpy(tested.logits), torch.from_numpy(tested.targets))
    assert error == pytest.approx(expected, abs=1e-6)


def test_the_ends_of_the_range_have_a_bin():
    bins = reliability_bins(np.array([0.0, 1.0], np.float32), np.array([False, True]))
    assert (bins[0].n, bins[-1].n) == (1, 1)
