"""Differentiable box attention and zoom: the position of a region learns from what is seen in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.distributed import at_least_float32


def box_mask(boxes: Tensor, height: int, width: int, slope: float = 10.0) -> Tensor:
    """Return a soft mask, (B, height, width), that is 1 inside the box and 0 outside.

    The product over both axes of ``h(x - left) - h(x - right)`` with ``h(x) = 1 / (1 + exp(-slope x))``, at the
    centres of the pixels (Fu et al., CVPR 2017).

    Args:
        boxes: (B, 4): left, top, right, bottom in pixels, fractions included; the outer edge of the first pixel is 0.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        slope: Steepness of the edges per pixel.
    """
    left, top, right, bottom = boxes[..., None].unbind(1)  # (B, 4) -> 4 x (B, 1)
    x = torch.arange(width, device=boxes.device) + 0.5
    y = torch.arange(height, device=boxes.device) + 0.5
    columns = (slope * (x - left)).sigmoid() - (slope * (x - right)).sigmoid()
    rows = (slope * (y - top)).sigmoid() - (slope * (y - bottom)).sigmoid()
    return rows[:, :, None] * columns[:, None]  # (B, h, 1) and (B, 1, w) -> (B, h, w)


def zoom(images: Tensor, boxes: Tensor, size: int, slope: float = 10.0) -> Tensor:
    """Multiply images by the soft mask of a box each, crop the box and resize it bilinearly.

    Differentiable with respect to images and boxes, through the mask and through the sampled positions. Computed in
    float32 at least. For boxes of whole pixels, all but the outermost pixels are those of ``crop_boxes``.

    Args:
        images: (B, C, H, W).
        boxes: (B, 4), see ``box_mask``; within the image, with sides of more than one pixel.
        size: Side of the result in pixels, at least 2.
        slope: See ``box_mask``.

    Returns:
        (B, C, size, size), in the dtype of the images.
    """
    height, width = images.shape[2:]
    pixels, boxes = at_least_float32(images), at_least_float32(boxes)
    attended = pixels * box_mask(boxes, height, width, slope)[:, None].to(pixels.dtype)
    left, top, right, bottom = boxes.to(pixels.dtype)[..., None].unbind(1)  # (B, 4) -> 4 x (B, 1)
    steps = torch.arange(size, device=boxes.device, dtype=pixels.dtype) / (size - 1)
    # from the centre of the first pixel in the box to that of the last, scaled to -1 and 1 at the image's own
    x = (left + steps * (right - 1 - left)) * (2 / (width - 1)) - 1
    y = (top + steps * (bottom - 1 - top)) * (2 / (height - 1)) - 1
    # x (B, 1, size), y (B, size, 1) -> (B, size, size, 2)
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[..., None]), -1)
    zoomed: Tensor = F.grid_sample(attended, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return zoomed.to(images.dtype)
