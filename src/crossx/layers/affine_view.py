"""Randomly rotated, scaled and shifted views of images, and their maps turned back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.distributed import at_least_float32
from crossx.layers.similarity import transformed


class AffineView(NamedTuple):
    """A view of each image: rotated and scaled about its centre, then shifted.

    Positions are relative to the size, so that one view applies to images and to their maps of any stride. A point p of
    the image, in pixels from the centre, is at ``scale * R(angle) p + shift * (W, H)`` in the view.

    Attributes:
        angle: Clockwise rotation in radians, (B,).
        scale: Above 1 enlarges, (B,).
        shift: To the right and down, as shares of width and height, (B, 2).
    """

    angle: Tensor
    scale: Tensor
    shift: Tensor

    @classmethod
    def draw(
        cls,
        count: int,
        degrees: float = 90.0,
        scales: tuple[float, float] = (0.8, 1.4),
        shift: float = 0.11,
        device: torch.device | None = None,
    ) -> AffineView:
        """Draw a view per image from uniform distributions, by torch's global generator of the device.

        The defaults are those of PDiscoNet (van der Klis et al., ICCV 2023, https://arxiv.org/abs/2309.03173).

        Args:
            count: B.
            degrees: Largest rotation to either side, in degrees.
            scales: Smallest and largest scale.
            shift: Largest shift to either side, as a share of width or height.
            device: Where the view is used.
        """
        angle, scale, x, y = torch.rand(4, count, device=device)
        low, high = scales
        return cls(
            (2 * angle - 1) * math.radians(degrees),
            low + (high - low) * scale,
            (2 * torch.stack([x, y], 1) - 1) * shift,
        )

    def apply(self, images: Tensor) -> Tensor:
        """Return the views of images (B, C, H, W), sampled bilinearly, with zeros beyond the image."""
        # the point of the image at the point v of the view: R^T (v - shift) / scale
        return _sample(images, -self.angle, 1 / self.scale, -self.shift, shift_first=True)

    def undo(self, maps: Tensor) -> Tensor:
        """Return maps of the views (B, C, h, w) at the positions of the images, with zeros beyond the view."""
        return _sample(maps, self.angle, self.scale, self.shift, shift_first=False)


def _sample(maps: Tensor, angle: Tensor, scale: Tensor, shift: Tensor, shift_first: bool) -> Tensor:
    """Sample maps where the positions of the result are rotated, scaled and shifted to."""
    height, width = maps.shape[2:]
    # no autocast, which would round positions to half precision
    with torch.autocast(maps.device.type, enabled=False):
        pixels = at_least_float32(maps)
        cos, sin = (scale * turn(angle) for turn in (torch.cos, torch.sin))
        # positions from -1 to 1 along both sides, whatever their lengths
        matrix = torch.stack([cos, -sin * (height / width), sin * (width / height), cos], 1).unflatten(
            1, (2, 2)
        )
        y, x = (
            (torch.arange(side, device=maps.device, dtype=pixels.dtype) + 0.5) * (2 / side) - 1
            for side in (height, width)
        )
        # not affine_grid, which would make the number of images a constant of a compiled graph
        points = torch.stack(torch.broadcast_tensors(x, y[:, None]), 2).flatten(0, 1)  # (h, w, 2) -> (h*w, 2)
        if shift_first:
            points = points + 2 * shift[:, None]  # -> (B, h*w, 2)
        grid = transformed(matrix, points)
        if not shift_first:
            grid = grid + 2 * shift[:, None]
        grid = grid.to(pixels.dtype).unflatten(1, (height, width))  # (B, h*w, 2) -> (B, h, w, 2)
        return F.grid_sample(pixels, grid, align_corners=False).to(maps.dtype)
