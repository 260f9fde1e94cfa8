import pytest
import torch
from torch.nn import functional as F

from crossx.layers import crop_boxes


def one_by_one(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """Pad with zeros, slice, interpolate: what the authors do."""
    border = 64
    padded = F.pad(images, (border,) * 4)
    crops = [
        F.interpolate(
            image[None, :, top + border : bottom + border, left + border : right + border],
            (size, size),
            mode="bilinear",
            align_corners=True,
        )
        for image, own in zip(padded, boxes, strict=True)
        for left, top, right, bottom in own.tolist()
    ]
    return torch.cat(crops).unflatten(0, boxes.shape[:2])


@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_crops_are_slices_resized(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 2, *shape, generator=generator)
    corners = torch.randint(-30, 50, (3, 5, 2), generator=generator)
    boxes = torch.cat([corners, corners + torch.randint(1, 50, (3, 5, 2), generator=generator)], 2)
    # inside, across an edge, all of it and more, beyond
    boxes[0, :4] = torch.tensor([[4, 5, 20, 11], [-7, 3, 9, 60], [-9, -9, 60, 60], [50, 2, 60, 9]])
    crops = crop_boxes(images, boxes, 17)
    torch.testing.assert_close(crops, one_by_one(images, boxes, 17), rtol=1e-4, atol=1e-4)
    assert crops[0, 3].eq(0).all()


def test_the_whole_image_at_its_size_is_itself() -> None:
    images = torch.randn(2, 3, 16, 16)
    crops = crop_boxes(images, torch.tensor([[[0, 0, 16, 16]]]).expand(2, -1, -1), 16)
    torch.testing.assert_close(crops[:, 0], images, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_crops_have_the_images_type(dtype: torch.dtype) -> None:
    images = torch.randn(1, 3, 16, 16).to(dtype)
    crops = crop_boxes(images, torch.tensor([[[2.0, 3, 9, 12]]]), 8)
    assert crops.dtype == dtype
    assert crops.shape == (1, 1, 3, 8, 8)
