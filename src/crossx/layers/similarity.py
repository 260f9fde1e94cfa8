"""Similarity warps between keypoints and a reference shape."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from crossx.distributed import at_least_float32


class Similarity(NamedTuple):
    """Maps points (x, y) to ``matrix @ (x, y) + shift``.

    Attributes:
        matrix: (..., 2, 2), a rotation, perhaps with a reflection, times a scale.
        shift: (..., 2).
    """

    matrix: Tensor
    shift: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """Map points (..., N, 2)."""
        return transformed(self.matrix, points) + self.shift[..., None, :]

    @property
    def scale(self) -> Tensor:
        """Length of what was a unit vector, (...)."""
        scale: Tensor = torch.linalg.vector_norm(self.matrix[..., 0], dim=-1)
        return scale


def transformed(matrix: Tensor, points: Tensor) -> Tensor:
    """Multiply points (..., N, 2) by matrices (..., 2, 2), not in half precision under autocast as by ``@``."""
    # (..., N, 1, 2) and (..., 1, 2, 2) -> (..., N, 2)
    return (points[..., None, :] * matrix[..., None, :, :]).sum(-1)


def fit_similarity(source: Tensor, target: Tensor, weights: Tensor) -> tuple[Similarity, Tensor]:
    """Fit the similarity without reflection that maps weighted points to others with the least squared error.

    In closed form: with points as complex numbers it is a linear regression. It equals Umeyama's (PAMI 1991) where that
    has no reflection. With fewer than two different points the scale is 0.

    Args:
        source: (..., N, 2).
        target: (..., N, 2).
        weights: (..., N), not negative.

    Returns:
        The map, and the weighted sum of squared distances that remain, (...).
    """
    weights = weights[..., None]
    total = weights.sum(-2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    source_mean = (weights * source).sum(-2, keepdim=True) / total
    target_mean = (weights * target).sum(-2, keepdim=True) / total
    source, target = source - source_mean, target - target_mean
    spread = (weights * source.square()).sum((-2, -1))
    real = (weights * source * target).sum((-2, -1))
    cross = source[..., 0] * target[..., 1] - source[..., 1] * target[..., 0]
    imaginary = (weights[..., 0] * cross).sum(-1)
    divisor = torch.where(spread > 0, spread, 1)
    real, imaginary = real / divisor, imaginary / divisor
    matrix = torch.stack([real, -imaginary, imaginary, real], -1).unflatten(-1, (2, 2))
    shift = target_mean - transformed(matrix, source_mean)
    residual = (weights * target.square()).sum((-2, -1)) - spread * (real.square() + imaginary.square())
    return Similarity(matrix, shift[..., 0, :]), residual.clamp(min=0)


def warp_regions(images: Tensor, warps: Similarity, size: int) -> Tensor:
    """Sample square regions of images bilinearly, with zeros beyond the image.

    Args:
        images: (B, C, H, W).
        warps: From the square [-1, 1] x [-1, 1] of each region to pixels of the image, from the outer edge of the
            first; batch shape (B, R).
        size: Side of the result in pixels.

    Returns:
        (B, R, C, size, size), in the dtype of the images.
    """
    height, width = images.shape[2:]
    line = (torch.arange(size, device=images.device, dtype=torch.float32) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    points = torch.stack([x, y], -1).flatten(0, 1)  # (size, size, 2) -> (size*size, 2)
    places = warps(points)  # (B, R, size*size, 2)
    grid = places * places.new_tensor([2 / width, 2 / height]) - 1
    # grid_sample takes one grid per image: (B, R, size*size, 2) -> (B, R*size, size, 2)
    regions = places.shape[1]
    grid = grid.unflatten(2, (size, size)).flatten(1, 2)
    sampled = F.grid_sample(at_least_float32(images), grid.to(torch.float32), align_corners=False)
    # (B, C, R*size, size) -> (B, R, C, size, size)
    split: Tensor = sampled.unflatten(2, (regions, size)).transpose(1, 2).to(images.dtype)
    return split
