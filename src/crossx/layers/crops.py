"""Crop and resize regions of images."""

from __future__ import annotations

from collections.abc import Sequence

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


def square_corners(
    positions: Tensor, map_size: Sequence[int], image_size: Sequence[int], side: int
) -> Tensor:
    """Return left and top of the squares centred at spatial positions of a map, moved into the image, (B, n, 2).

    Args:
        positions: Indices into the flattened map, row by row, int64 (B, n).
        map_size: (h, w).
        image_size: (H, W) in pixels.
        side: Side of the squares in pixels, at most that of the image.

    Returns:
        In pixels, with fractions.
    """
    (rows, columns), (height, width) = map_size, image_size
    corners = [
        ((place + 0.5) * (extent / count) - side / 2).clamp(0, extent - side)
        for place, count, extent in (
            (positions % columns, columns, width),
            (positions // columns, rows, height),
        )
    ]
    return torch.stack(corners, 2)  # 2 x (B, n) -> (B, n, 2)
