"""Anchor boxes, and greedy non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_iou

RATIOS = (2 / 3, 1.0, 3 / 2)
"""Width over height (Yang et al. 2018: 2:3, 1:1, 3:2)."""


def anchor_boxes(
    map_size: tuple[int, int],
    stride: int,
    sides: Sequence[float],
    image_size: tuple[int, int],
    *,
    scale: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Return the anchor boxes of one map: every side and ratio, centred on every spatial position.

    Edges are rounded down to whole pixels. A box may extend beyond the image, but its centre is clamped to the image.

    Args:
        map_size: (h, w) of the map.
        stride: Distance of neighbouring positions in input pixels.
        sides: Square roots of the box areas, in pixels.
        image_size: (H, W) in pixels.
        scale: Factor on ``sides``.
        device: Device of the result.

    Returns:
        float32 (A h w, 4): left, top, right, bottom in pixels, in the order of a flattened map (A, h, w). A runs over
        all ratios of the first side, then of the second, and so on.
    """
    y, x = (
        ((torch.arange(count, device=device) + 0.5) * stride).clamp(max=extent)
        for count, extent in zip(map_size, image_size, strict=True)
    )
    halves = [(side * ratio**0.5 / 2, side / ratio**0.5 / 2) for side in sides for ratio in RATIOS]
    # (A, 2) -> 2 x (A, 1, 1)
    half_x, half_y = (torch.tensor(halves, device=device) * scale).T[:, :, None, None]
    # (A, 1, 1), (h, 1) and (w,) -> 4 x (A, h, w) -> (A, h, w, 4) -> (A*h*w, 4)
    edges = (x - half_x, y[:, None] - half_y, x + half_x, y[:, None] + half_y)
    return torch.stack(torch.broadcast_tensors(*edges), -1).flatten(0, 2).floor()


@torch.no_grad()
def select_boxes(boxes: Tensor, scores: Tensor, count: int, iou_threshold: float) -> Tensor:
    """Select boxes by greedy non-maximum suppression, batched, with static shapes.

    If fewer than ``count`` boxes remain after suppression, the best suppressed boxes follow; no box is selected twice.

    Args:
        boxes: (N, 4): left, top, right, bottom; N at least ``count``.
        scores: (B, N), finite.
        count: Number of boxes per image.
        iou_threshold: IoU with a selected box from which a box is suppressed.

    Returns:
        int64 (B, ``count``): indices of boxes in the order of selection.
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
    return torch.stack(chosen, 1)  # count x (B,) -> (B, count)
