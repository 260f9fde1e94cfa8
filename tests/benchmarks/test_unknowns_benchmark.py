import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestCentroid, NearestNeighbors
from torch.nn import functional as F

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


def test_the_nearest_class_mean_is_that_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    unknowns = importlib.import_module("unknowns")
    generator = torch.Generator().manual_seed(0)
    known, features = (F.normalize(torch.randn(n, 8, generator=generator)) for n in (20, 7))
    labels = torch.arange(20) % 3
    means = NearestCentroid().fit(known.numpy(), labels.numpy()).centroids_
    expected = cosine_similarity(features.numpy(), means).max(axis=1)
    found = unknowns.class_mean_scores(features, known, labels)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)
