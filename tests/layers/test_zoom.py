import math

import pytest
import torch
from torch.nn import functional as F

from crossx.layers import box_mask, zoom


def h(x: float, slope: float) -> float:
    return 1 / (1 + math.exp(-slope * x))


def naive_mask(box: list[float], height: int, width: int, slope: float) -> torch.Tensor:
    """The printed difference of logistic functions, one pixel at a time."""
    left, top, right, bottom = box
    mask = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            across = h(x - left, slope) - h(x - right, slope)
            mask[row, column] = across * (h(y - top, slope) - h(y - bottom, slope))
    return mask


BOXES = torch.tensor([[3.3, 4.6, 15.2, 13.9], [0.0, 0.0, 20.0, 16.0]], dtype=torch.float64)


@pytest.mark.parametrize("slope", [1.0, 10.0])
def test_mask_is_the_printed_difference_of_logistic_functions(slope: float) -> None:
    mask = box_mask(BOXES, 16, 20, slope)
    expected = torch.stack([naive_mask(box, 16, 20, slope) for box in BOXES.tolist()])
    torch.testing.assert_close(mask, expected)


def test_zoom_is_the_masked_image_cropped_and_resized() -> None:
    images = torch.randn(3, 2, 16, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[3, 4, 15, 13], [0, 0, 20, 16], [7, 2, 9, 16]])
    zoomed = zoom(images, boxes, 11)
    for image, (left, top, right, bottom), own in zip(images, boxes.tolist(), zoomed, strict=True):
        masked = image * naive_mask([left, top, right, bottom], 16, 20, 10.0)
        crop = masked[None, :, top:bottom, left:right]
        expected = F.interpolate(crop, (11, 11), mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(own, expected)


def test_a_steep_box_around_the_image_changes_nothing() -> None:
    images = torch.randn(2, 3, 16, 16)
    whole = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(2, -1)
    torch.testing.assert_close(zoom(images, whole, 16, slope=1000), images, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 16, 20, dtype=torch.float64, generator=generator).requires_grad_()
    # none of the 5 samples per axis is at the centre of a pixel, where bilinear interpolation has a kink
    boxes = BOXES + torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.31, 2.37, -3.41, -2.62]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda images, boxes: zoom(images, boxes, 5), (images, boxes.requires_grad_())
    )


def test_a_box_learns_to_contain_a_spot() -> None:
    """What no gradient through the position could do."""
    images = torch.zeros(1, 1, 24, 24)
    images[..., 4:9, 14:19] = 1
    center = torch.tensor([[11.0, 12.0]], requires_grad=True)
    optimizer = torch.optim.SGD([center], lr=20)
    seen = []
    for _ in range(40):
        brightness = zoom(images, torch.cat([center - 5, center + 5], 1), 12).mean()
        seen.append(brightness.item())
        optimizer.zero_grad()
        (-brightness).backward()
        optimizer.step()
    assert seen[-1] > 1.5 * seen[0]
    assert (center.detach() - torch.tensor([[16.5, 6.5]])).abs().max() < 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_result_has_the_images_type(dtype: torch.dtype) -> None:
    zoomed = zoom(torch.randn(2, 3, 16, 20).to(dtype), BOXES, 8)
    assert zoomed.dtype == dtype
    assert zoomed.shape == (2, 3, 8, 8)
