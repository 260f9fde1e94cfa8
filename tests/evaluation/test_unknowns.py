"""Scores of unknown images against scikit-learn, SciPy and naive loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from sklearn.metrics import roc_auc_score, roc_curve

from crossx.errors import UsageError
from crossx.evaluation.unknowns import (
    SCORES,
    images_to_keep,
    keeping_threshold,
    mean_score,
    separation,
)


def drawn(seed: int, known: int = 40, unknown: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    # rounded, so that there are ties
    scores = generator.normal(1, 1, known).round(1), generator.normal(0, 1, unknown).round(1)
    return *scores, generator.random(known) < 0.8


def naive_oscr(known: np.ndarray, unknown: np.ndarray, correct: np.ndarray) -> float:
    """Area under the curve of correct classification over false positives, by trapezoids."""
    thresholds = sorted({*known, *unknown}, reverse=True)
    points = [(0.0, 0.0)]
    for threshold in thresholds:
        false = sum(value >= threshold for value in unknown) / len(unknown)
        right = sum(c and value >= threshold for value, c in zip(known, correct, strict=True)) / len(known)
        points.append((false, right))
    return sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(points))


@pytest.mark.parametrize("seed", range(5))
def test_the_separation_is_that_of_scikit_learn_and_of_a_loop(seed: int) -> None:
    known, unknown, correct = drawn(seed)
    found = separation(known, unknown, correct)
    truth = np.r_[np.ones(len(known)), np.zeros(len(unknown))]
    scores = np.r_[known, unknown]
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found["fpr95"] == pytest.approx(false[np.argmax(true >= 0.95)])
    assert found["oscr"] == pytest.approx(naive_oscr(known, unknown, correct))
    assert found["oscr"] <= correct.mean()


def test_the_ends_of_the_measures() -> None:
    known, unknown = np.array([2.0, 3.0]), np.array([0.0, 1.0])
    right = np.array([True, False])
    assert separation(known, unknown, right) == {"auroc": 1, "fpr95": 0, "oscr": 0.5}
    assert separation(unknown, known, right) == {"auroc": 0, "fpr95": 1, "oscr": 0}
    same = np.zeros(3)
    assert separation(same, same, np.ones(3, bool)) == {"auroc": 0.5, "fpr95": 1, "oscr": 0.5}


def test_scores_are_those_of_scipy() -> None:
    logits = 3 * torch.randn(6, 4, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    values = logits.numpy()
    expected = {
        "max_probability": softmax(values, 1).max(1),
        "max_logit": values.max(1),
        "energy": logsumexp(values, 1),
    }
    assert set(expected) == set(SCORES)
    for name, score in expected.items():
        np.testing.assert_allclose(SCORES[name](logits).numpy(), score)
        views = [logits, logits + 1, 2 * logits]
        np.testing.assert_allclose(
            mean_score(name, views).numpy(), sum(SCORES[name](view).numpy() for view in views) / 3
        )


@given(n=st.integers(1, 120), percent=st.integers(1, 99), seed=st.integers(0, 99))
def test_the_threshold_keeps_the_share_of_exchangeable_images(n: int, percent: int, seed: int) -> None:
    """Of n + 1 values, one at random is the new one: it is kept for ``keep`` of the choices or more."""
    keep = percent / 100
    values = np.random.default_rng(seed).normal(size=n + 1)
    kept = [
        threshold is None or values[new] >= threshold
        for new in range(n + 1)
        for threshold in [keeping_threshold(np.delete(values, new), keep)]
    ]
    assert sum(kept) >= math.ceil(round(keep * (n + 1), 9))
    if n >= images_to_keep(keep):
        # and for no more than needed
        assert sum(kept) == math.ceil(round(keep * (n + 1), 9))
    else:
        assert keeping_threshold(values[1:], keep) is None


def test_19_images_are_needed_to_keep_95_percent() -> None:
    assert images_to_keep(0.95) == 19
    values = np.arange(19.0)
    assert keeping_threshold(values[:18]) is None
    assert keeping_threshold(values) == 0
    assert keeping_threshold(np.arange(39.0)) == 1


@pytest.mark.parametrize("keep", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_shares_that_cannot_be_kept_are_refused(keep: float) -> None:
    with pytest.raises(UsageError, match="keep must be above 0 and below 1"):
        keeping_threshold(np.arange(50.0), keep)
