import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

from crossx.layers import PartAssignment, prototype_scores
from crossx.losses import border_loss, centroid_concentration_loss, image_presence_loss
from crossx.methods import clusters
from crossx.methods.clusters import (
    BORDER,
    CONCENTRATION,
    INTERIOR,
    PRESENCE,
    REFINING_RATE,
    SHRINKAGE,
    SPREAD,
    object_positions,
    part_loss,
    refined_prototypes,
    starting_prototypes,
)
from crossx.training.config import Config


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


def two_blobs(images: int = 40, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (N, C, h, w) with two blobs anywhere inside, what is where (0 background, 1 and 2), and activations."""
    generator = torch.Generator().manual_seed(1)
    where = torch.zeros(images, size, size, dtype=torch.long)
    for of_image in where:
        top, left = (1 + torch.randint(size - 5, (2,), generator=generator)).tolist()
        of_image[top : top + 2, left : left + 4] = 1
        of_image[top + 2 : top + 4, left : left + 4] = 2
    features = 0.2 * torch.randn(images, 5, size, size, generator=generator)
    for part in (1, 2):
        features[:, part] += 2.0 * (where == part)
    return features, where, (where > 0).float()


@pytest.mark.slow
def test_prototypes_in_the_wrong_place_move_to_the_parts() -> None:
    maps, where, activations = two_blobs()
    # both start at the first blob, one of them half at the background
    start = torch.zeros(3, 5)
    start[0, 1], start[1, 1] = 1.5, 0.8

    def right(prototypes: Tensor) -> float:
        found = prototype_scores(maps, prototypes).argmax(1)
        best = max(
            ((found == a) & (where == 1)).sum() + ((found == b) & (where == 2)).sum()
            for a, b in ((0, 1), (1, 0))
        )
        return float((best + ((found == 2) & (where == 0)).sum()) / where.numel())

    refined = refined_prototypes(start, maps, activations)
    assert right(start) < 0.9 < right(refined)
    assert part_loss(refined, maps, activations) < 0.7 * part_loss(start, maps, activations)
    assert not refined.requires_grad
    torch.testing.assert_close(refined, refined_prototypes(start, maps, activations), rtol=0, atol=0)


def test_what_is_lowered_is_the_weighted_sum_of_the_terms_of_spatial_gates() -> None:
    maps, _, activations = two_blobs(images=3)
    prototypes = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    distances = torch.cdist(maps.permute(0, 2, 3, 1).flatten(0, 2), prototypes).square()  # (N*h*w, 3)
    # (N*h*w, 3) -> (N, 3, h, w)
    shares = (-distances).softmax(1).unflatten(0, (3, 8, 8)).permute(0, 3, 1, 2)
    expected = (
        clusters.PRESENCE * image_presence_loss(shares[:, :2], activations)
        + clusters.CONCENTRATION * centroid_concentration_loss(shares[:, :2])
        + clusters.BORDER * border_loss(shares[:, 2])
    )
    torch.testing.assert_close(part_loss(prototypes, maps, activations), expected)


def test_the_recipe_continues_the_refinement_with_its_weights_and_rate() -> None:
    config = Config.from_recipe("finetune_parts")
    options, optim = config.model.options, config.optim
    assert options["presence_weights"] == [0.0, PRESENCE]
    assert (options["concentration_weight"], options["border_weight"]) == (CONCENTRATION, BORDER)
    rate = optim.lr * optim.new_layers_lr_factor * options["assignment_lr_factor"]
    assert rate == pytest.approx(REFINING_RATE)
