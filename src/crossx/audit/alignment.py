"""How well one image explains another after the best scaling and shift: the test of a near-duplicate.

A copy that was recompressed, resized, slightly cropped, mirrored or made brighter has the same detail as its original,
shifted and at another contrast. Two photographs of one species have the same colours and outline but not the same
detail. So both images are aligned by least squares on their grey values (Gauss-Newton over a pyramid; Lucas and Kanade
1981, with the gain and offset of Baker and Matthews 2004, https://doi.org/10.1023/B:VISI.0000011205.11775.fd), and the
correlation of what remains without their low frequencies is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, conv2d, grid_sample, interpolate, pad

SIDE = 64
"""Side of the grey images that are compared, in pixels."""
PYRAMID = ((16, 6), (32, 8), (64, 6))
"""Side and Gauss-Newton steps of each level."""
STARTS = (1.0, 0.87, 1.15)
"""Scales that the coarsest level starts from: none, and of a crop in either image."""
COARSE, MIDDLE = 0.55, 0.4
"""Correlation after the first level, and of the detail after the second, below which a pair is abandoned."""
MIN_OVERLAP = 0.5
"""Least share of the first image that the second covers."""
BATCH = 256
_BAND = 4.0
"""Standard deviation in pixels of the blur that is subtracted."""


@torch.inference_mode()
def detail_correlation(
    first: Tensor, second: Tensor, *, progress: Callable[[int], None] | None = None, all_levels: bool = False
) -> Tensor:
    """Return how well aligned pairs of images agree in their detail.

    Args:
        first: uint8 (P, SIDE, SIDE), grey images, stretched to a square.
        second: Likewise.
        progress: Called with the number of pairs done.
        all_levels: Compute pairs that differ at a coarse level to the end, too.

    Returns:
        float32 (P,), the correlation of the band-passed images in their overlap, of the second image or its mirror
        image, whichever is higher; 0 where a coarser level already differs.
    """
    scores = torch.zeros(len(first))
    for start in range(0, len(first), BATCH):
        a, b = (_floats(images[start : start + BATCH]) for images in (first, second))
        for other in (b, b.flip(-1)):
            found = _aligned_correlation(a, other, all_levels)
            scores[start : start + BATCH] = torch.maximum(scores[start : start + BATCH], found)
        if progress is not None:
            progress(min(start + BATCH, len(first)))
    return scores


def _aligned_correlation(first: Tensor, second: Tensor, all_levels: bool) -> Tensor:
    scores = torch.zeros(len(first))
    remaining = torch.arange(len(first))
    (side, steps), *finer = PYRAMID
    a, b = _level(first, side), _level(second, side)
    starts = [_align(a, b, _initial_warps(len(a), scale), steps) for scale in STARTS]
    agreements = torch.stack([_agreement(a, b, warps) for warps in starts])  # (starts, P)
    best = agreements.argmax(0)
    warps = torch.stack(starts)[best, remaining]  # (starts, P, 4) -> (P, 4)
    keep = agreements.amax(0) > (-math.inf if all_levels else COARSE)
    remaining, warps = remaining[keep], warps[keep]
    for side, steps in finer:
        if not len(remaining):
            return scores
        a, b = _level(first[remaining], side), _level(second[remaining], side)
        warps = _align(a, b, warps, steps)
        if side < SIDE and not all_levels:
            keep = _agreement(_band(a), _band(b), warps) > MIDDLE
            remaining, warps = remaining[keep], warps[keep]
    if len(remaining):
        scores[remaining] = _agreement(_band(first[remaining]), _band(second[remaining]), warps)
    return scores.clamp(min=0)


def _align(first: Tensor, second: Tensor, warps: Tensor, steps: int) -> Tensor:
    """Improve warps by Gauss-Newton steps.

    Args:
        first: float32 (P, 1, S, S).
        second: Likewise.
        warps: (P, 4): scale and shift along x and y that map the first image's coordinates, from -1 to 1, to the
            second's.
        steps: Number of steps.
    """
    side = first.shape[-1]
    padded = pad(second, (1, 1, 1, 1), mode="replicate")
    # per unit of the coordinates, in which a pixel is 2 / side
    along_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) * side / 4
    along_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) * side / 4
    layers = torch.cat([second, along_x, along_y], 1)  # (P, 3, S, S)
    ticks = torch.linspace(1 / side - 1, 1 - 1 / side, side)
    y, x = (axis.flatten() for axis in torch.meshgrid(ticks, ticks, indexing="ij"))
    target = first.flatten(1)  # (P, 1, S, S) -> (P, S*S)
    for _ in range(steps):
        moved, inside = _warp(layers, warps)
        values, gradient_x, gradient_y = moved.flatten(2).unbind(1)  # (P, 3, S, S) -> 3 of (P, S*S)
        weight = inside.flatten(1)
        # first = gain * (second + gradient * change) + offset, linear in gain * change, gain and offset
        columns = [gradient_x * x, gradient_y * y, gradient_x, gradient_y, values, torch.ones_like(values)]
        system = torch.stack(columns, -1) * weight[..., None]  # (P, S*S, 6)
        squares = system.mT @ system
        damping = 1e-4 * torch.diag_embed(squares.diagonal(dim1=1, dim2=2)) + 1e-6 * torch.eye(6)
        solution = torch.linalg.solve(squares + damping, system.mT @ (target * weight)[..., None])[..., 0]
        gain = solution[:, 4:5].clamp(min=0.05)
        warps = warps + (solution[:, :4] / gain).clamp(-0.1, 0.1)
        warps = torch.cat([warps[:, :2].clamp(0.7, 1.4), warps[:, 2:].clamp(-0.4, 0.4)], 1)
    return warps


def _warp(images: Tensor, warps: Tensor) -> tuple[Tensor, Tensor]:
    """Return warped images (P, C, S, S), and where they are defined, (P, 1, S, S)."""
    matrix = torch.diag_embed(warps[:, :2])  # (P, 2) -> (P, 2, 2)
    grid = affine_grid(torch.cat([matrix, warps[:, 2:, None]], 2), list(images.shape), align_corners=False)
    moved = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return moved, (grid.abs() <= 1).all(-1)[:, None].to(images.dtype)


def _agreement(first: Tensor, second: Tensor, warps: Tensor) -> Tensor:
    """Return the correlation (P,) of images (P, 1, S, S) in their overlap; 0 if that is small or without contrast."""
    moved, inside = _warp(second, warps)
    count = inside.sum((1, 2, 3), keepdim=True).clamp(min=1)
    a, b = (
        (image - (image * inside).sum((1, 2, 3), keepdim=True) / count) * inside for image in (first, moved)
    )
    energy = (a.square().sum((1, 2, 3)) * b.square().sum((1, 2, 3))).sqrt()
    # less than a tenth of a grey level
    flat = energy / count[:, 0, 0, 0] < 0.01
    correlation = (a * b).sum((1, 2, 3)) / energy.clamp(min=1e-12)
    return torch.where(flat | (inside.mean((1, 2, 3)) < MIN_OVERLAP), 0, correlation)


def _initial_warps(count: int, scale: float) -> Tensor:
    return torch.tensor([scale, scale, 0.0, 0.0]).repeat(count, 1)


def _floats(images: Tensor) -> Tensor:
    return images.to(torch.float32)[:, None]  # (P, S, S) -> (P, 1, S, S)


def _level(images: Tensor, side: int) -> Tensor:
    return _blurred(interpolate(images, size=(side, side), mode="area"), 1.0)


def _band(images: Tensor) -> Tensor:
    return images - _blurred(images, _BAND * images.shape[-1] / SIDE)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    weights = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float32).square() / (2 * sigma**2))
    kernel = (weights / weights.sum())[None, None, None]
    padded = pad(images, (reach,) * 4, mode="replicate")
    return conv2d(conv2d(padded, kernel), kernel.mT)
