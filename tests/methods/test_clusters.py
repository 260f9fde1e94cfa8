import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from crossx.layers import PartAssignment, prototype_scores
from crossx.methods.clusters import INTERIOR, SHRINKAGE, SPREAD, object_positions, starting_prototypes


def scenes(distance: float, images: int = 60, size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, C) of maps with a two-part object inside, which positions are outermost, and what is where.

    0 is background, of two kinds, 1 and 2 are the parts; they are ``distance`` away from the background.
    """
    generator = torch.Generator().manual_seed(0)
    where = torch.zeros(images, size, size, dtype=torch.long)
    where[:, 2:4, 2:5], where[:, 4, 2:5] = 1, 2
    outermost = torch.ones(images, size, size, dtype=torch.bool)
    outermost[:, 1:-1, 1:-1] = False
    features = torch.randn(images, size, size, 6, generator=generator)
    features[..., 0] += 3 * (torch.rand(images, 1, 1, generator=generator) < 0.5)
    features[..., 1] += distance * (where == 1)
    features[..., 2] += distance * (where == 2)
    return features.flatten(0, 2), outermost.flatten(), where.flatten()


def test_the_object_is_what_is_seldom_at_the_border() -> None:
    features, outermost, where = scenes(8.0)
    found = object_positions(features, outermost)
    assert (found == (where > 0)).double().mean() > 0.97
    assert not (found & outermost).any()
    # by another implementation of the discriminant
    reference = LinearDiscriminantAnalysis(solver="eigen", shrinkage=None).fit(features, ~outermost)
    scores = torch.from_numpy(features.double().numpy() @ reference.coef_[0])
    limit = scores[outermost].quantile(INTERIOR)
    assert (found == (~outermost & (scores > limit))).double().mean() > 1 - SHRINKAGE


@pytest.mark.parametrize("distance", [5.0, 8.0, 100.0])
def test_prototypes_start_at_the_parts_and_at_the_background(distance: float) -> None:
    features, outermost, where = scenes(distance)
    prototypes = starting_prototypes(features, outermost, 2)
    shares = prototype_scores(features.T[None, :, :, None], prototypes).softmax(1)[0, :, :, 0]  # -> (3, N)
    assignment = shares.argmax(0)
    parts = [assignment[where == part].mode().values.item() for part in (1, 2)]
    assert sorted(parts) == [0, 1]
    for part, number in zip((1, 2), parts, strict=True):
        assert (assignment[where == part] == number).double().mean() > 0.9
    assert (assignment[where == 0] == 2).double().mean() > 0.9
    assert torch.pdist(prototypes).square().mean() <= SPREAD * (1 + 1e-5)


@given(st.integers(1, 4), st.integers(0, 5))
def test_prototypes_of_any_features_are_finite(num_parts: int, kind: int) -> None:
    generator = torch.Generator().manual_seed(kind)
    features = torch.randn(30, 4, generator=generator)
    if kind == 0:
        features[:] = 0.5  # all alike
    elif kind == 1:
        features[:, 1:] = 0  # most channels are silent
    elif kind == 2:
        features *= 1e6
    outermost = torch.arange(30) % 3 > 0
    prototypes = starting_prototypes(features, outermost, num_parts)
    assert prototypes.shape == PartAssignment(4, num_parts).prototypes.shape
    assert prototypes.isfinite().all()
