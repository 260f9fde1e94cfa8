import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp

from crossx.evaluation import intervals


def draw_case(n=300, num_classes=6):
    generator = np.random.default_rng(0)
    targets = np.sort(generator.integers(num_classes, size=n))
    return generator.random(n) < 0.4 + 0.1 * targets, targets


def naive_class_mean(correct, targets):
    return np.mean([correct[targets == label].mean() for label in np.unique(targets)])


@pytest.mark.parametrize(
    ("name", "statistic"), [("top1", lambda c, t: c.mean()), ("class_mean", naive_class_mean)]
)
def test_agrees_with_resampled_images(name, statistic):
    correct, targets = draw_case()
    ours = intervals.accuracy_intervals(correct, targets)[name]
    reference = bootstrap(
        (correct, targets),
        statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    # Two independent samples of a bootstrap: equal up to the noise of 2,000 resamples, the width is about 0.11.
    assert ours.low == pytest.approx(reference.low, abs=0.008)
    assert ours.high == pytest.approx(reference.high, abs=0.008)
    assert ours.low < statistic(correct, targets) < ours.high


def test_large_sample_has_the_normal_interval():
    correct = np.arange(10_000) < 8000
    interval = intervals.accuracy_intervals(correct, np.zeros(10_000, dtype=np.int64))["top1"]
    half = 1.96 * np.sqrt(0.8 * 0.2 / 10_000)
    assert (interval.low, interval.high) == pytest.approx((0.8 - half, 0.8 + half), abs=5e-4)


def test_seed_decides():
    correct, targets = draw_case()
    first, again, other = (intervals.accuracy_intervals(correct, targets, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_memory_is_bounded_for_many_classes(monkeypatch):
    targets = np.arange(3000)
    drawn = []
    generator = np.random.default_rng(0)

    class Recorded:
        def multinomial(self, n, shares, size):
            drawn.append(size * len(shares))
            return generator.multinomial(n, shares, size)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Recorded())
    intervals.accuracy_intervals(targets % 2 == 0, targets, resamples=1000)
    assert len(drawn) > 1
    assert max(drawn) <= 4_000_000


@pytest.mark.parametrize("value", [True, False])
def test_all_right_and_all_wrong_have_exact_intervals(value):
    targets = np.array([0, 0, 3])
    # all three right is as probable as the tail at this share: p ** 3 = 0.025
    end = 0.025 ** (1 / 3)
    expected = (end, 1.0) if value else (0.0, 1 - end)
    found = intervals.accuracy_intervals(np.full(3, value), targets)
    assert tuple(found["top1"]) == pytest.approx(expected)
    assert tuple(found["class_mean"]) == pytest.approx(expected)
    assert tuple(intervals.mean_accuracy_interval(np.full((2, 3), value))) == pytest.approx(expected)


def test_no_difference_has_a_width_that_falls_with_the_images():
    widths = []
    for n in (6, 60, 600):
        right = np.arange(n) % 3 > 0
        low, high = intervals.difference_interval(right, right)
        assert low == -high < 0
        assert tuple(intervals.difference_interval(np.stack([right] * 2), np.stack([right] * 2))) == (
            low,
            high,
        )
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2] > 0


@pytest.mark.parametrize("trainings", [1, 2])
def test_a_difference_on_all_images_has_a_width(trainings):
    right, wrong = np.full((trainings, 40), True), np.full((trainings, 40), False)
    # (n12 + 1/2 - n21 - 1/2) / (n + 2), as in Agresti and Min's section 2.1
    centre, error = 40 / 42, np.sqrt((41 / 42 - (40 / 42) ** 2) / 42)
    low, high = intervals.difference_interval(right, wrong)
    assert (low, high) == pytest.approx((centre - 1.959964 * error, 1.0))
    assert tuple(intervals.difference_interval(wrong, right)) == pytest.approx((-high, -low))


def test_exact_intervals_are_narrower_with_less_confidence():
    same = np.full((2, 40), True)
    for found in (
        [intervals.difference_interval(same, same, confidence=c) for c in (0.5, 0.95)],
        [intervals.mean_accuracy_interval(same, confidence=c) for c in (0.5, 0.95)],
        [intervals.accuracy_intervals(same[0], np.zeros(40, int), confidence=c)["top1"] for c in (0.5, 0.95)],
    ):
        widths = [high - low for low, high in found]
        assert 0 < widths[0] < widths[1]


def test_differences_of_several_trainings_are_averaged_per_image():
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 3, 2000)) < 0.7
    means = (a.astype(float) - b).mean(axis=0)
    half = 1.96 * means.std() / np.sqrt(2000)
    found = intervals.difference_interval(a, b)
    assert tuple(found) == pytest.approx((means.mean() - half, means.mean() + half), abs=1.5e-3)
    half = 1.96 * a.mean(axis=0).std() / np.sqrt(2000)
    assert tuple(intervals.mean_accuracy_interval(a)) == pytest.approx(
        (a.mean() - half, a.mean() + half), abs=1.5e-3
    )


def test_difference_is_paired():
    generator = np.random.default_rng(0)
    a = generator.random(2000) < 0.7
    b = a ^ (generator.random(2000) < 0.05)
    difference = a.astype(float) - b
    half = 1.96 * difference.std() / np.sqrt(len(a))
    interval = intervals.difference_interval(a, b)
    mean = difference.mean()
    assert (interval.low, interval.high) == pytest.approx((mean - half, mean + half), abs=1.5e-3)
    reverse = intervals.difference_interval(b, a)
    assert (reverse.low, reverse.high) == pytest.approx((-interval.high, -interval.low), abs=1.5e-3)


def test_matched_interval_has_a_width_without_differences():
    right = np.ones(95, dtype=bool)
    assert intervals.matched_interval(right, right).high > 0.02
    right = np.ones(96, dtype=bool)
    assert intervals.matched_interval(right, right).high < 0.02


@pytest.mark.parametrize(("n", "only_a", "only_b"), [(40, 0.04, 0.01), (60, 0.02, 0.02), (200, 0.05, 0.0)])
def test_matched_interval_covers_the_difference(n, only_a, only_b):
    generator = np.random.default_rng(0)
    covered = []
    for kinds in generator.choice(3, size=(2000, n), p=[only_a, only_b, 1 - only_a - only_b]):
        low, high = intervals.matched_interval(kinds != 1, kinds != 0)
        covered.append(low <= only_a - only_b <= high)
    assert np.mean(covered) > 0.93


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5], [0.25, 0.25, 0.25], [0.7 - 0.6, 0.1]])
def test_seeds_that_agree_have_no_interval(values):
    assert intervals.student_interval(values) is None


@pytest.mark.parametrize("values", [[0.5, 0.501], [0.5, 0.5, 0.6]])
def test_the_interval_over_seeds_is_that_of_the_t_test(values):
    low, high = intervals.student_interval(values)
    assert (low, high) == pytest.approx(ttest_1samp(values, 0).confidence_interval(0.95))
    assert high > low
