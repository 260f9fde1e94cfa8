import math

import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from crossx.layers import AffineView

SIZES = [(24, 24), (17, 30), (31, 16)]


def fixed(angle: float, scale: float, x: float, y: float) -> AffineView:
    """The same view of each of two images; the angle in degrees."""
    return AffineView(
        torch.tensor([math.radians(angle)] * 2), torch.tensor([scale] * 2), torch.tensor([[x, y]] * 2)
    )


def blobs(height: int, width: int) -> torch.Tensor:
    """Two smooth spots near the centre per image, (2, 1, H, W)."""
    y, x = torch.arange(height)[:, None] - height / 2, torch.arange(width) - width / 2
    spots = [torch.exp(-((x - a) ** 2 + (y - b) ** 2) / 18) for a, b in ((2, -3), (-1, 2))]
    return torch.stack(spots)[:, None]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("angle", "scale", "x", "y"), [(0, 1, 3, -2), (37, 1, 0, 0), (-90, 0.8, 2, 1), (64, 1.4, -3, 4)]
)
def test_views_are_those_of_torchvision(size, angle, scale, x, y) -> None:
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = affine(images, angle, [x, y], scale, [0.0], InterpolationMode.BILINEAR)
    views = fixed(angle, scale, x / size[1], y / size[0]).apply(images)
    # only the fill beyond the edge differs: none of a pixel, or a share
    inner = affine(torch.ones(images.shape), angle, [x, y], scale, [0.0]) == 1
    inner &= affine(torch.ones(images.shape), angle, [x, y], scale, [0.0], InterpolationMode.BILINEAR) > 0.999
    torch.testing.assert_close(views[inner], expected[inner], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(40, 40), (36, 48), (47, 36)])
def test_undoing_a_view_returns_the_image(size) -> None:
    images = blobs(*size)
    view = AffineView(
        torch.tensor([0.6, -1.5]), torch.tensor([1.2, 0.9]), torch.tensor([[0.1, -0.05], [0.0, 0.1]])
    )
    torch.testing.assert_close(view.undo(view.apply(images)), images, rtol=0, atol=0.06)
    assert (view.apply(images) - images).abs().max() > 0.3


def test_a_quarter_turn_is_exact_at_any_stride() -> None:
    images = torch.rand(2, 3, 12, 12)
    view = fixed(90.0, 1.0, 0.0, 0.0)
    torch.testing.assert_close(view.apply(images), images.rot90(-1, (2, 3)), rtol=0, atol=1e-5)
    maps = torch.rand(2, 4, 3, 3)
    torch.testing.assert_close(view.undo(maps), maps.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    # a third of the side: 4 pixels of the images, 1 position of the maps
    moved = fixed(0.0, 1.0, 1 / 3, 0.0)
    torch.testing.assert_close(moved.apply(images)[..., 4:], images[..., :-4], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved.undo(maps)[..., :-1], maps[..., 1:], rtol=0, atol=1e-5)
    assert moved.undo(maps)[..., -1].abs().max() < 1e-5


def test_draws_are_uniform_within_their_limits_and_seeded() -> None:
    torch.manual_seed(0)
    view = AffineView.draw(4000, degrees=60, scales=(0.5, 2.0), shift=0.2)
    torch.manual_seed(0)
    assert all(map(torch.equal, view, AffineView.draw(4000, degrees=60, scales=(0.5, 2.0), shift=0.2)))
    for values, low, high in (
        (view.angle, -math.pi / 3, math.pi / 3),
        (view.scale, 0.5, 2.0),
        (view.shift[:, 0], -0.2, 0.2),
        (view.shift[:, 1], -0.2, 0.2),
    ):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high >= values.max() > high - 0.01 * (high - low)
        # the standard error of a uniform mean is (high - low) / sqrt(12 n)
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 4000)
    assert (
        torch.stack([view.angle, view.scale, *view.shift.unbind(1)]).corrcoef().fill_diagonal_(0).abs().max()
        < 0.07
    )


def test_maps_receive_gradients_and_keep_their_type() -> None:
    view = AffineView(torch.tensor([0.7, -0.3]), torch.tensor([1.1, 0.9]), torch.full((2, 2), 0.05))
    maps = torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(view.undo, maps)
    assert view.apply(torch.rand(2, 3, 8, 8).bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        under = view.apply(torch.linspace(0, 1, 2 * 3 * 64).view(2, 3, 8, 8))
    torch.testing.assert_close(under, view.apply(torch.linspace(0, 1, 2 * 3 * 64).view(2, 3, 8, 8)))
