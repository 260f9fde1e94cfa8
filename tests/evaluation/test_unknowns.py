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
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid

from crossx.errors import UsageError
from crossx.evaluation.unknowns import (
    FEATURE_SCORES,
    KEPT_SHARES,
    SCORES,
    ClassMeansSum,
    ViewScores,
    images_to_keep,
    keeping_threshold,
    separation,
    similarity,
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
    assert list(found["rejected"]) == [f"{share:g}" for share in KEPT_SHARES]
    for share, rejected in zip(KEPT_SHARES, found["rejected"].values(), strict=True):
        # the highest threshold that keeps as many known images as needed
        enough = [t for t in known if sum(known >= t) >= math.ceil(round(share * len(known), 9))]
        assert rejected == pytest.approx(sum(unknown < max(enough)) / len(unknown))


def test_the_ends_of_the_measures() -> None:
    known, unknown = np.array([2.0, 3.0]), np.array([0.0, 1.0])
    right = np.array([True, False])
    all_of, none_of = (dict.fromkeys(("0.98", "0.95", "0.9", "0.8"), share) for share in (1, 0))
    found = separation(known, unknown, right)
    assert found == {"auroc": 1, "fpr95": 0, "oscr": 0.5, "rejected": all_of}
    found = separation(unknown, known, right)
    assert found == {"auroc": 0, "fpr95": 1, "oscr": 0, "rejected": none_of}
    same = np.zeros(3)
    found = separation(same, same, np.ones(3, bool))
    assert found == {"auroc": 0.5, "fpr95": 1, "oscr": 0.5, "rejected": none_of}


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
            ViewScores(views).score(name).numpy(), sum(SCORES[name](view).numpy() for view in views) / 3
        )


def class_means(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, ClassMeansSum]:
    """Logits, features and targets of 3 of 4 classes, added up in batches of different sizes."""
    generator = np.random.default_rng(seed)
    logits, features = generator.normal(2, 1, (31, 4)), generator.normal(1, 1, (31, 6))
    targets = generator.permutation(np.arange(31) % 3)
    total = ClassMeansSum(4, 31)
    for start, end in itertools.pairwise((0, 1, 9, 31)):
        total.add(*(torch.from_numpy(part[start:end]) for part in (logits, features, targets)))
    return logits, features, targets, total


def test_class_means_are_those_of_scikit_learn() -> None:
    logits, features, targets, total = class_means()
    found = total.finish()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    centroids = NearestCentroid().fit(unit, targets).centroids_
    np.testing.assert_allclose(cosine_similarity(found.means.numpy()[:3], centroids).diagonal(), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found.means.numpy(), axis=1), [1, 1, 1, 0], atol=1e-6)
    nearest = cosine_similarity(unit, centroids).max(1)
    assert found.weight == pytest.approx(logits.max(1).std() / nearest.std(), rel=1e-4)


def test_scores_of_features_are_those_of_a_loop() -> None:
    logits, features, _, total = class_means()
    means, weight = total.finish()
    cosines = [max(float(np.dot(f, m)) / np.linalg.norm(f) for m in means.numpy()[:3]) for f in features]
    found = similarity(torch.from_numpy(features), means)
    np.testing.assert_allclose(found.numpy(), cosines, rtol=1e-5)
    assert found.dtype == torch.float32

    # two views: the mean over both
    views = ViewScores([torch.from_numpy(logits), torch.from_numpy(logits + 2)], [found, found / 2])
    combined = [row.max() + 1 + weight * 0.75 * cosine for row, cosine in zip(logits, cosines, strict=True)]
    np.testing.assert_allclose(views.score("combined", weight).numpy(), combined, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(views.score("similarity").numpy(), 0.75 * np.array(cosines), rtol=1e-5)
    assert views.names(weight) == (*SCORES, *FEATURE_SCORES)
    assert views.names(None) == (*SCORES, "similarity")
    assert ViewScores([torch.from_numpy(logits)]).names(weight) == tuple(SCORES)


def test_weights_of_unusual_networks_are_finite() -> None:
    one_each = ClassMeansSum(2, 2)
    one_each.add(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2), torch.arange(2))
    assert one_each.finish().weight == pytest.approx(1e6)
    same = ClassMeansSum(2, 3)
    same.add(torch.ones(3, 2), torch.randn(3, 4), torch.tensor([0, 0, 1]))
    assert same.finish().weight == 0


def test_the_weight_of_many_images_is_that_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third image: 31 x 6 numbers do not fit."""
    monkeypatch.setattr("crossx.evaluation.unknowns.MAX_FEATURES", 31 * 6 // 3)
    logits, features, _, total = class_means()
    means, weight = total.finish()
    cosines = similarity(torch.from_numpy(features[::3]), means).numpy()
    assert weight == pytest.approx(logits[::3].max(1).std() / cosines.std(), rel=1e-4)


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
