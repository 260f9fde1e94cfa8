import numpy as np
import pytest
import torch
from torch import Tensor

from crossx.layers import AffineView
from crossx.losses import map_correlations, separation_loss, view_loss


def naive_separation(maps: Tensor, weights: Tensor) -> float:
    """The weighted correlation of every pair of maps of an image, by NumPy's weighted covariance."""
    correlations = []
    for image, weight in zip(maps.double().numpy(), weights.double().numpy(), strict=True):
        for p in range(len(image)):
            for q in range(p + 1, len(image)):
                covariance = np.cov(image[p].ravel(), image[q].ravel(), aweights=weight.ravel())
                correlations.append(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
    return float(np.mean(correlations))


def random_maps(parts: int, size: tuple[int, int], scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(parts)
    maps = scale * torch.rand(3, parts, *size, generator=generator, dtype=torch.double)
    return maps, torch.rand(3, *size, generator=generator, dtype=torch.double)


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_equals_the_weighted_correlation_of_every_pair(parts: int, scale: float) -> None:
    maps, weights = random_maps(parts, (4, 3), scale)
    loss = separation_loss(maps, weights).item()
    assert loss == pytest.approx(naive_separation(maps, weights), abs=1e-6)
    assert separation_loss(maps.float(), scale * weights.float()).item() == pytest.approx(loss, abs=1e-5)


def test_a_pixel_of_weight_two_counts_as_two() -> None:
    maps, _ = random_maps(2, (1, 3))
    twice = torch.cat([maps, maps[..., :1]], 3)
    weighted = separation_loss(maps, torch.tensor([2.0, 1.0, 1.0]).expand(3, 1, 3))
    torch.testing.assert_close(weighted, separation_loss(twice, torch.ones(3, 1, 4)))


def test_known_values() -> None:
    ramp = torch.arange(6.0).view(1, 2, 3)
    weights = torch.ones(1, 2, 3)
    for other, expected in ((3 * ramp + 2, 1.0), (5 - ramp, -1.0), (torch.full_like(ramp, 4.0), 0.0)):
        loss = separation_loss(torch.stack([ramp, other], 1), weights)
        assert loss.item() == pytest.approx(expected, abs=1e-5)
    # alike on the object, opposite beside it
    other = torch.where(torch.arange(6).view(1, 2, 3) < 3, ramp, 5 - ramp)
    on_object = (torch.arange(6).view(1, 2, 3) < 3).float()
    assert separation_loss(torch.stack([ramp, other], 1), on_object).item() == pytest.approx(1.0, abs=1e-5)
    # one part per position: the least that M maps can have
    apart = torch.eye(4).view(1, 4, 2, 2)
    assert separation_loss(apart, torch.ones(1, 2, 2)).item() == pytest.approx(-1 / 3, abs=1e-6)


@pytest.mark.parametrize("empty", ["maps", "weights", "both", "one position"])
def test_nothing_to_compare_is_no_nan(empty: str) -> None:
    maps, weights = torch.rand(2, 2, 3, 3), torch.rand(2, 3, 3)
    if empty in ("maps", "both"):
        maps[0] = 0
    if empty in ("weights", "both"):
        weights[0] = 0
    if empty == "one position":
        maps, weights = maps[..., :1, :1], weights[..., :1, :1]
    maps.requires_grad_()
    loss = separation_loss(maps, weights)
    loss.backward()
    assert loss.isfinite()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()


def test_gradient_equals_finite_differences() -> None:
    maps, weights = random_maps(3, (3, 2))
    assert torch.autograd.gradcheck(separation_loss, (maps.requires_grad_(), weights))


def test_half_precision_is_computed_in_float32() -> None:
    maps, weights = (tensor.bfloat16() for tensor in random_maps(2, (4, 4)))
    loss = separation_loss(maps, weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(naive_separation(maps.float(), weights.float()), abs=1e-5)


def test_correlations_of_maps_equal_numpys() -> None:
    first, weights = random_maps(3, (4, 5))
    second = random_maps(4, (4, 5))[0][:, :3] + 0.5 * first
    found = map_correlations(first, second, weights)
    for n in range(3):
        for p in range(3):
            covariance = np.cov(first[n, p].ravel(), second[n, p].ravel(), aweights=weights[n].ravel())
            expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
            assert found[n, p].item() == pytest.approx(expected, abs=1e-6)


def test_maps_that_follow_the_image_have_no_loss_and_maps_of_the_frame_have() -> None:
    """A quarter turn, which moves positions to positions."""
    count = 3
    view = AffineView(torch.full((count,), torch.pi / 2), torch.ones(count), torch.zeros(count, 2))
    maps, _ = random_maps(2, (6, 6))
    maps = maps.float()
    shown = view.undo(torch.ones(count, 1, 6, 6))[:, 0]
    follows = view_loss(maps, view.undo(maps.rot90(-1, (2, 3))), shown)
    assert follows.item() == pytest.approx(0, abs=1e-3)
    rows = torch.arange(6.0)[:, None].expand(count, 1, 6, 6)
    # turned, the rows are columns, which do not correlate with rows
    assert view_loss(rows, view.undo(rows), shown).item() == pytest.approx(1, abs=1e-3)
    level = 1000
    assert view_loss(rows + level, view.undo(rows + level), shown).item() == pytest.approx(1, abs=0.1)


def test_positions_that_a_view_does_not_show_do_not_count() -> None:
    maps, _ = random_maps(2, (4, 4))
    shown = (torch.arange(16).view(4, 4) % 3 > 0).double().expand(3, 4, 4)
    assert view_loss(maps, maps * shown[:, None], shown).item() == pytest.approx(0, abs=1e-6)
    half = 0.5 * shown  # half of each position is beyond the view, and sampled as zero
    assert view_loss(maps, maps * half[:, None], half).item() == pytest.approx(0, abs=1e-6)
    assert view_loss(maps, maps, 0 * shown).item() == 1


def test_gradient_of_the_view_loss_equals_finite_differences() -> None:
    maps, shown = random_maps(2, (2, 3))
    others = random_maps(3, (2, 3))[0][:, :2]
    assert torch.autograd.gradcheck(view_loss, (maps.requires_grad_(), others.requires_grad_(), shown))
