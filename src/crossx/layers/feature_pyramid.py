"""Merged features of two stages (Eq. 5), for all parts at once, and their pooled values without the maps."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.layers.pooling import global_pool

Interpolation: TypeAlias = Literal["bilinear", "nearest"]

KERNEL = 3


class MergedFeatures(nn.Module):
    """``U_p^G = BN(K2 * (U_p^{L-1} + Bilinear(K1 * U_p^L)))``, Eq. 5, with a K1, K2 and BN for each part.

    The parts are the groups of one convolution. Kernels start from N(0, 2 / (k^2 C)) as in the released code.

    Args:
        last_channels: Channels of stage L.
        previous_channels: C, channels of stage L-1 and of the merged features.
        num_parts: P.
        interpolation: ``bilinear`` (paper) or ``nearest`` (released code).
    """

    def __init__(
        self,
        last_channels: int,
        previous_channels: int,
        num_parts: int,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        super().__init__()
        width = num_parts * previous_channels
        self.num_parts = num_parts
        self.interpolation: Interpolation = interpolation
        self.reduce = nn.Conv2d(num_parts * last_channels, width, 1, groups=num_parts, bias=False)
        self.smooth = nn.Conv2d(width, width, KERNEL, padding=1, groups=num_parts, bias=False)
        self.norm = nn.BatchNorm2d(width)
        nn.init.normal_(self.reduce.weight, std=math.sqrt(2 / previous_channels))
        nn.init.normal_(self.smooth.weight, std=math.sqrt(2 / (KERNEL**2 * previous_channels)))

    def forward(self, previous: Tensor, last: Tensor) -> Tensor:
        """Return the merged maps.

        Args:
            previous: U^{L-1}, (B, P, C, H, W).
            last: U^L, (B, P, C', h, w), of any size.

        Returns:
            U^G, (B, P, C, H, W).
        """
        reduced = self.reduce(last.flatten(1, 2))
        resized = F.interpolate(reduced, size=previous.shape[-2:], mode=self.interpolation)
        merged: Tensor = self.norm(self.smooth(previous.flatten(1, 2) + resized))
        return merged.view_as(previous)

    def pooled(self, previous: Tensor, last: Tensor) -> Tensor:
        """Return the part features GAP(U^G), (B, P, C), of the arguments of ``forward``.

        With the batch norm's statistics fixed, everything between its input and the pooling is linear: the maps
        are not needed, only the nine window means of each channel (``tap_means``), exact up to rounding. In training
        the batch variance needs the maps.
        """
        if self.norm.training:
            return global_pool(self.forward(previous, last), "avg")
        parts, size = self.num_parts, previous.shape[-2:]
        means = tap_means(previous, size, self.interpolation)
        reduce = self.reduce.weight.reshape(parts, -1, last.shape[2])
        means = means + torch.einsum("poc,bpck->bpok", reduce, tap_means(last, size, self.interpolation))
        smooth = self.smooth.weight.reshape(parts, means.shape[2], -1)
        convolved = torch.einsum("pok,bpk->bpo", smooth, means.flatten(2))
        pooled: Tensor = self.norm(convolved.flatten(1)[..., None, None])
        return pooled.view_as(convolved)


def tap_means(maps: Tensor, size: torch.Size, interpolation: Interpolation) -> Tensor:
    """Return, for each tap of a zero-padded 3x3 kernel, the mean of what the tap sees of the resized maps.

    The windows and the interpolation are separable and linear: the mean of tap (i, j) is ``rows_i X cols_j^T``.

    Args:
        maps: (B, P, C, h, w).
        size: (H, W) that the maps would be resized to before the convolution.
        interpolation: How they would be resized.

    Returns:
        (B, P, C, 9), taps row by row as in the kernel's own memory.
    """
    rows = _tap_windows(maps.shape[-2], size[0], interpolation, maps)
    cols = _tap_windows(maps.shape[-1], size[1], interpolation, maps)
    return torch.einsum("yh,bpchw,xw->bpcyx", rows, maps, cols).flatten(3)


def _tap_windows(source: int, target: int, interpolation: Interpolation, like: Tensor) -> Tensor:
    """Return (3, source): each tap's window of the target, over the target's length, seen through the resizing."""
    windows = like.new_ones(KERNEL, target)
    windows[0, -1] = 0
    windows[-1, 0] = 0
    if source != target:
        unit = torch.eye(source, dtype=like.dtype, device=like.device)[None]
        mode = "linear" if interpolation == "bilinear" else "nearest"
        windows = windows @ F.interpolate(unit, size=target, mode=mode)[0].T
    return windows / target
