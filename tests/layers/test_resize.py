import pytest
import torch
from torch.nn import functional as F

from crossx.layers import shrink


@pytest.mark.parametrize(
    ("height", "width", "size"), [(227, 181, 80), (64, 64, 32), (40, 33, 33), (20, 31, 48)]
)
def test_equals_antialiased_interpolation(height: int, width: int, size: int) -> None:
    images = torch.rand(2, 3, height, width, dtype=torch.float64)
    expected = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(shrink(images, size), expected)


def test_a_constant_image_stays_constant_in_half_precision() -> None:
    images = torch.full((1, 3, 90, 70), 1.5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        small = shrink(images, 32)
    assert small.dtype == torch.bfloat16
    assert torch.equal(small, torch.full((1, 3, 32, 32), 1.5, dtype=torch.bfloat16))
