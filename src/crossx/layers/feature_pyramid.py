"""Merged features of two stages (Eq. 5), for all parts at once, and their pooled values without the maps."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, sum_over_ranks
from crossx.errors import UsageError

Interpolation: TypeAlias = Literal["bilinear", "nearest"]
MergeStatistics: TypeAlias = Literal["map", "strided", "pooled"]

KERNEL = 3


class MergedFeatures(nn.Module):
    """``U_p^G = BN(K2 * (U_p^{L-1} + Bilinear(K1 * U_p^L)))``, Eq. 5, with a K1, K2 and BN for each part.

    Kernels start from N(0, 2 / (k^2 C)) as in the released code. Only the pooled maps are ever classified, and
    ``pooled`` never makes the normalised ones: pooling commutes with the batch norm's shift and scale.

    Args:
        last_channels: Channels of stage L.
        previous_channels: C, channels of stage L-1 and of the merged features.
        num_parts: P.
        interpolation: ``bilinear`` (paper) or ``nearest`` (released code).
        statistics: Where the batch norm takes its variance in training. ``map``: from every place of the maps (Eq. 5).
            ``strided``: from every second row and column, with the exact mean, at a quarter of the cost.
            ``pooled``: from the pooled features of the batch, which needs no maps; it normalises a vector instead
            of a map and is not the paper's model any more.
    """

    def __init__(
        self,
        last_channels: int,
        previous_channels: int,
        num_parts: int,
        interpolation: Interpolation = "bilinear",
        statistics: MergeStatistics = "map",
    ) -> None:
        super().__init__()
        width = num_parts * previous_channels
        self.num_parts = num_parts
        self.interpolation: Interpolation = interpolation
        self.statistics: MergeStatistics = statistics
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
        the batch variance needs the maps; see ``statistics``.
        """
        if not self.norm.training:
            means = self._convolved_mean(previous, last)
            fixed: Tensor = self.norm(means.flatten(1)[..., None, None])
            return fixed.view_as(means)
        places = previous.shape[3] * previous.shape[4]
        if self.statistics == "map":
            return self._normalize(*self._convolved_moments(previous, last), places)
        # Half precision would round the means before their differences are taken.
        with torch.autocast(previous.device.type, enabled=False):
            full = self.smooth.weight.dtype
            means = self._convolved_mean(previous.to(full), last.to(full))
        if self.statistics == "pooled":
            if len(means) < 2:
                raise UsageError(
                    "merged_statistics pooled needs at least 2 images a step: raise data.batch_size."
                )
            return self._normalize(means, torch.zeros_like(means), places=1)
        return self._normalize(means, self._convolved_moments(previous, last, stride=2)[1], places)

    def _convolved_mean(self, previous: Tensor, last: Tensor) -> Tensor:
        """Return GAP(K2 * X), (B, P, C), without the maps; X is what K2 sees."""
        parts, size = self.num_parts, previous.shape[-2:]
        means = tap_means(last, size, self.interpolation).flatten(1, 2)
        means = torch.bmm(means, self.reduce.weight.view(parts, -1, last.shape[2]).mT)
        means = means.unflatten(1, (-1, KERNEL**2)) + tap_means(previous, size, self.interpolation)
        # In the order of the kernel's own memory: 75 MB for ResNet-50, which a copy would read and write first.
        kernel = self.smooth.weight
        if kernel.is_contiguous():
            means = means.mT
        else:
            kernel = kernel.permute(0, 2, 3, 1)
        kernel = kernel.reshape(parts, previous.shape[2], -1)
        return torch.bmm(means.flatten(2), kernel.mT).transpose(0, 1)

    def _convolved_moments(self, previous: Tensor, last: Tensor, stride: int = 1) -> tuple[Tensor, Tensor]:
        """Return mean and variance over the places of K2 * X, each (B, P, C).

        One part after the other: grouped convolutions are slower, and need the parts copied side by side.
        """
        kernels = self.reduce.weight.chunk(self.num_parts), self.smooth.weight.chunk(self.num_parts)
        moments = []
        for own, deeper, reduce, smooth in zip(previous.unbind(1), last.unbind(1), *kernels, strict=True):
            resized = F.interpolate(F.conv2d(deeper, reduce), size=own.shape[-2:], mode=self.interpolation)
            maps = F.conv2d(own + resized, smooth, stride=stride, padding=1)
            moments.append(torch.var_mean(at_least_float32(maps), (2, 3), correction=0))
        variances, means = zip(*moments, strict=True)
        return torch.stack(means, 1), torch.stack(variances, 1)

    def _normalize(self, means: Tensor, variances: Tensor, places: int) -> Tensor:
        """Return what the batch norm in training makes of GAP, (B, P, C).

        Args:
            means: GAP of each image's maps, (B, P, C).
            variances: Variance over the places of each image's maps, (B, P, C).
            places: Number of places behind each mean.
        """
        norm: Any = self.norm
        shape = means.shape
        means, variances = means.flatten(1), variances.flatten(1)
        gather = sum_over_ranks if isinstance(norm, nn.SyncBatchNorm) else nn.Identity()
        count = gather(means.new_full((), len(means) * places))
        mean = gather(means.sum(0) * places) / count
        variance = gather((variances + (means - mean).square()).sum(0) * places) / count
        with torch.no_grad():
            seen = norm.num_batches_tracked
            if seen is not None:
                seen += 1
            # as in nn.BatchNorm2d: without a momentum, the average over all batches
            momentum = 1 / float(seen) if norm.momentum is None and seen is not None else norm.momentum
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
        normalized: Tensor = (means - mean) * (norm.weight * torch.rsqrt(variance + norm.eps)) + norm.bias
        return normalized.view(shape)


def tap_means(maps: Tensor, size: torch.Size, interpolation: Interpolation) -> Tensor:
    """Return, for each tap of a zero-padded 3x3 kernel, the mean of what the tap sees of the resized maps.

    The windows and the interpolation are separable and linear: the mean of tap (i, j) is ``rows_i X cols_j^T``.

    Args:
        maps: (B, P, C, h, w).
        size: (H, W) that the maps would be resized to before the convolution.
        interpolation: How they would be resized.

    Returns:
        (P, B, 9, C), taps row by row.
    """
    rows = _tap_windows(maps.shape[-2], size[0], interpolation, maps)
    cols = _tap_windows(maps.shape[-1], size[1], interpolation, maps)
    windows = (rows[:, None, :, None] * cols[:, None]).flatten(2).flatten(0, 1)
    # Parts first, as the residual blocks leave them in memory: a matrix product of views, without a copy.
    flat = maps.transpose(0, 1).flatten(3)
    means = torch.bmm(windows.expand(flat.shape[0] * flat.shape[1], -1, -1), flat.flatten(0, 1).mT)
    return means.view(*flat.shape[:2], KERNEL**2, -1)


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
