"""Crop and resize regions of images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def crop_boxes(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop boxes from images and resize them bilinearly.

    For boxes of whole pixels, equals ``F.interpolate(image[:, top:bottom, left:right], size, mode="bilinear",
    align_corners=True)`` per box with zeros beyond the image, computed in one call and in float32.

    Args:
        images: (B, C, H, W).
        boxes: (B, n, 4): left, top, right, bottom in pixels, right and bottom exclusive.
        size: Side of the crops in pixels, at least 2.

    Returns:
        (B, n, C, size, size), in the dtype of the images.
    """
    height, width = images.shape[2:]
    left, top, right, bottom = boxes.float()[..., None].unbind(2)  # (B, n, 4) -> 4 x (B, n, 1)
    steps = torch.arange(size, device=boxes.device) / (size - 1)
    x = (left + steps * (right - 1 - left)) * (2 / (width - 1)) - 1
    y = (top + steps * (bottom - 1 - top)) * (2 / (height - 1)) - 1
    # grid_sample takes one grid per image, so the crops are stacked along its rows
    # x (B, n, 1, size), y (B, n, size, 1) -> (B, n, size, size, 2) -> (B, n*size, size, 2)
    grid = torch.stack(torch.broadcast_tensors(x[:, :, None], y[..., None]), -1).flatten(1, 2)
    rows: Tensor = F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=True
    )
    # (B, C, n*size, size) -> (B, C, n, size, size) -> (B, n, C, size, size)
    return rows.view(*rows.shape[:2], boxes.shape[1], size, size).transpose(1, 2).to(images.dtype)
