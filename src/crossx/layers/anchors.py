"""Anchor boxes, and the greedy choice among them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

RATIOS = (2 / 3, 1.0, 3 / 2)
"""Width over height (Yang et al. 2018: 2:3, 1:1, 3:2)."""


def anchor_boxes(
    places: tuple[int, int],
    stride: int,
    sides: Sequence[float],
    image_size: tuple[int, int],
    *,
    scale: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Return the anchors of one map: boxes of every side and ratio around every place.

    Edges are rounded down to whole pixels. A box may reach beyond the image; its centre lies in it, or on its edge:
    where a map has more places than strides fit into the image, the outermost centre is drawn in.

    Args:
        places: (h, w) of the map.
        stride: Input pixels between two places.
        sides: Square roots of the boxes' areas, in pixels.
        image_size: (H, W) in pixels.
        scale: Factor on ``sides``.
        device: Where to put the boxes.

    Returns:
        float32 (A h w, 4), left, top, right, bottom in pixels, in the order of a map (A, h, w) flattened; A counts
        every ratio of the first side, then of the second, and so on.
    """
    y, x = (
        ((torch.arange(count, device=device) + 0.5) * stride).clamp(max=extent)
        for count, extent in zip(places, image_size, strict=True)
    )
    halves = [(side * ratio**0.5 / 2, side / ratio**0.5 / 2) for side in sides for ratio in RATIOS]
    half_x, half_y = (torch.tensor(halves, device=device) * scale).T[:, :, None, None]
    edges = (x - half_x, y[:, None] - half_y, x + half_x, y[:, None] + half_y)
    return torch.stack(torch.broadcast_tensors(*edges), -1).flatten(0, 2).floor()


@torch.no_grad()
def select_boxes(boxes: Tensor, scores: Tensor, count: int, iou_threshold: float) -> Tensor:
    """Choose boxes by greedy non-maximum suppression, for every image alone and without shapes that hang on the data.

    The best box is taken, those that overlap it are put back, and so on. Where no other is left before ``count`` are
    taken, the best of those put back follow, so that no box is taken twice.

    Args:
        boxes: (N, 4), left, top, right, bottom; N at least ``count``.
        scores: (B, N), finite.
        count: How many to choose for each image.
        iou_threshold: Intersection over union from which on a box overlaps.

    Returns:
        int64 (B, ``count``), numbers of boxes in the order in which they were taken.
    """
    scores = scores.float()
    put_back = scores - (scores.amax(1, keepdim=True) - scores.amin(1, keepdim=True) + 1)
    overlaps = torch.zeros_like(scores, dtype=torch.bool)
    taken = torch.zeros_like(overlaps)
    chosen = []
    for _ in range(count):
        best = scores.where(~overlaps, put_back).masked_fill(taken, -torch.inf).argmax(1)
        overlaps = overlaps | (box_iou(boxes[best], boxes) >= iou_threshold)
        taken = taken.scatter(1, best[:, None], True)
        chosen.append(best)
    return torch.stack(chosen, 1)
