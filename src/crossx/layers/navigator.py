"""The Navigator of NTS-Net, which scores how informative each anchor box of an image is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crossx.distributed import at_least_float32
from crossx.layers.anchors import RATIOS, anchor_boxes

SCALES = ((2 ** (1 / 3), 2 ** (2 / 3)), (2 ** (1 / 3), 2 ** (2 / 3)), (1, 2 ** (1 / 3), 2 ** (2 / 3)))
"""Factors on the anchor size of each level (github.com/yangze0930/NTS-Net, core/anchors.py)."""
REFERENCE = 448
"""Shorter side of the images that anchor sizes refer to, in pixels."""


class Navigator(nn.Module):
    """Scores anchor boxes on maps of three levels, each half the size of the previous one (Yang et al. 2018).

    Args:
        channels: C, channels of the trunk's map.
        stride: Input pixels per spatial position of the trunk's map, along one side.
        sizes: Anchor size of each level, in pixels of a 448 px image; anchors scale with the image.
        width: Channels of each level's map.
    """

    def __init__(
        self, channels: int, stride: int, sizes: Sequence[float] = (48, 96, 192), width: int = 128
    ) -> None:
        super().__init__()
        self.stride = stride
        self.sides = [
            [size * factor for factor in factors] for size, factors in zip(sizes, SCALES, strict=True)
        ]
        self.levels = nn.ModuleList(
            [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
                nn.Conv2d(width, width, 3, stride=2, padding=1),
            ]
        )
        self.scores = nn.ModuleList(nn.Conv2d(width, len(sides) * len(RATIOS), 1) for sides in self.sides)

    def num_anchors(self, map_size: tuple[int, int]) -> int:
        """Return the number of boxes that ``forward`` scores on a map of size (h, w)."""
        height, width = map_size
        count = 0
        for sides in self.sides:
            count += len(sides) * len(RATIOS) * height * width
            height, width = (height + 1) // 2, (width + 1) // 2
        return count

    def forward(self, maps: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the anchor boxes, (N, 4) as in ``anchor_boxes``, and their scores, float32 (B, N).

        Args:
            maps: The trunk's map, (B, C, h, w).
            image_size: (H, W) of the images, in pixels.
        """
        boxes, scores = [], []
        # no autocast: in half precision, many anchors would have equal scores
        with torch.autocast(maps.device.type, enabled=False):
            maps = maps.to(next(self.parameters()).dtype)
            for level, (convolve, score) in enumerate(zip(self.levels, self.scores, strict=True)):
                maps = convolve(maps).relu()
                scores.append(at_least_float32(score(maps)).flatten(1))  # (B, A, h, w) -> (B, A*h*w)
                boxes.append(
                    anchor_boxes(
                        (maps.shape[2], maps.shape[3]),
                        self.stride * 2**level,
                        self.sides[level],
                        image_size,
                        scale=min(image_size) / REFERENCE,
                        device=maps.device,
                    )
                )
        return torch.cat(boxes), torch.cat(scores, 1)  # levels x (n, 4) -> (N, 4); levels x (B, n) -> (B, N)
