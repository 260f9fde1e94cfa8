import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from crossx.methods.weights import load_method
from layouts import write_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("neighbors", [1, 3, 20])
def test_neighbors_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, neighbors: int) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    unknowns = importlib.import_module("unknowns")
    generator = torch.Generator().manual_seed(0)
    known, features = (F.normalize(torch.randn(n, 8, generator=generator)) for n in (20, 7))
    distances, _ = NearestNeighbors(n_neighbors=neighbors).fit(known.numpy()).kneighbors(features.numpy())
    found = unknowns.neighbor_scores(features, known, neighbors)
    np.testing.assert_allclose(found.numpy(), -distances[:, -1], rtol=1e-4)


@pytest.mark.parametrize("relative", [False, True])
def test_mahalanobis_distances_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    unknowns = importlib.import_module("unknowns")
    generator = np.random.default_rng(0)
    known, features, labels = generator.normal(size=(40, 5)), generator.normal(size=(6, 5)), np.arange(40) % 3
    means = np.stack([known[labels == label].mean(0) for label in range(3)])
    within = LedoitWolf(assume_centered=True).fit(known - means[labels])
    around = known - known.mean(0)
    overall = around.T @ around / 40
    shrunk = (1 - within.shrinkage_) * overall + within.shrinkage_ * np.trace(overall) / 5 * np.eye(5)
    expected = [-min(mahalanobis(x, mean, within.precision_) ** 2 for mean in means) for x in features]
    if relative:
        inverse = np.linalg.inv(shrunk)
        expected = [
            score + mahalanobis(x, known.mean(0), inverse) ** 2
            for score, x in zip(expected, features, strict=True)
        ]
    found = unknowns.mahalanobis_scores(known, labels, relative=relative)(features)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_vim_is_that_of_a_projection_by_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    unknowns = importlib.import_module("unknowns")
    generator = np.random.default_rng(0)
    known, features = generator.normal(size=(40, 6)), generator.normal(size=(7, 6))
    logits, values = generator.normal(size=(40, 3)), generator.normal(size=(7, 3))
    fitted = PCA(3).fit(known)

    def residual(x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x - fitted.inverse_transform(fitted.transform(x)), axis=1)

    scale = logits.max(1).mean() / residual(known).mean()
    expected = np.log(np.exp(values).sum(1)) - scale * residual(features)
    np.testing.assert_allclose(unknowns.vim_scores(known, logits)(features, values), expected, rtol=1e-6)


def test_an_image_is_rejected_if_either_score_is_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    unknowns = importlib.import_module("unknowns")
    references = [np.arange(9.0), np.arange(9.0)]
    scores = [np.array([-1.0, 8.0, 4.0]), np.array([8.0, 0.5, 4.0])]
    # (number of references that are no higher + 1) / 10
    assert unknowns.either_scores(references, scores) == pytest.approx([0.1, 0.2, 0.6], abs=1e-6)


def test_class_means_are_of_the_head_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    unknowns = importlib.import_module("unknowns")
    run = write_run(tmp_path / "run")
    method, _ = load_method(run)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = method.heads_and_features(images)[1]
        torch.testing.assert_close(
            method.embeddings(images)[:, unknowns.columns_of_class_means(run)], expected
        )
