"""Merged features of two stages (Eq. 5), and their pooled values without computing the maps."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, reduction_dtype, sum_over_ranks
from crossx.errors import UsageError, check_choice

Interpolation: TypeAlias = Literal["bilinear", "nearest"]
MergeStatistics: TypeAlias = Literal["map", "strided", "pooled"]

KERNEL = 3


class MergedFeatures(nn.Module):
    """``U_p^G = BN(K2 * (U_p^{L-1} + Bilinear(K1 * U_p^L)))`` (Eq. 5), with separate K1, K2 and BN per part.

    Kernels are initialised from N(0, 2 / (k^2 C)) as in the released code. Only the pooled maps are classified;
    ``pooled`` does not compute the normalised maps, because pooling commutes with the batch norm's shift and scale.

    Args:
        last_channels: Channels of stage L.
        previous_channels: C, channels of stage L-1 and of the merged features.
        num_parts: P.
        interpolation: ``bilinear`` (paper) or ``nearest`` (released code).
        statistics: Source of the batch norm's variance in training. ``map``: all spatial positions (Eq. 5).
            ``strided``: every second row and column, with the exact mean, at a quarter of the cost. ``pooled``: the
            pooled features of the batch, without maps; this is no longer the paper's model.
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
        check_choice("interpolation", interpolation, get_args(Interpolation))
        check_choice("statistics", statistics, get_args(MergeStatistics))
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
        """Return U^G, (B, P, C, H, W), for U^{L-1} (B, P, C, H, W) and U^L (B, P, C', h, w) of any size."""
        reduced = self.reduce(last.flatten(1, 2))  # (B, P, C', h, w) -> (B, P*C', h, w) -> (B, P*C, h, w)
        resized = F.interpolate(reduced, size=previous.shape[-2:], mode=self.interpolation)
        merged: Tensor = self.norm(self.smooth(previous.flatten(1, 2) + resized))  # (B, P*C, H, W)
        return merged.view_as(previous)  # -> (B, P, C, H, W)

    def pooled(self, previous: Tensor, last: Tensor) -> Tensor:
        """Return the part features GAP(U^G), (B, P, C), for the arguments of ``forward``.

        With fixed batch-norm statistics the whole branch is linear: the nine window means per channel (``tap_means``)
        suffice, exactly up to rounding. In training the batch variance needs the maps; see ``statistics``.

        Raises:
            UsageError: For ``statistics="pooled"`` in training with a single image.
        """
        if not self.norm.training:
            means = self._convolved_mean(previous, last)
            means = means.to(reduction_dtype(means))
            fixed: Tensor = self.norm(means.flatten(1)[..., None, None])  # (B, P, C) -> (B, P*C, 1, 1)
            return fixed.view_as(means)  # -> (B, P, C)
        positions = previous.shape[3] * previous.shape[4]
        if self.statistics == "map":
            return self._normalize(*self._convolved_moments(previous, last), positions)
        # half precision would round the means before their differences are taken
        with torch.autocast(previous.device.type, enabled=False):
            full = self.smooth.weight.dtype
            means = self._convolved_mean(previous.to(full), last.to(full))
        if self.statistics == "pooled":
            if len(means) < 2:
                raise UsageError(
                    "merged_statistics pooled needs at least 2 images per step: raise data.batch_size."
                )
            return self._normalize(means, torch.zeros_like(means), positions=1)
        return self._normalize(means, self._convolved_moments(previous, last, stride=2)[1], positions)

    def _convolved_mean(self, previous: Tensor, last: Tensor) -> Tensor:
        """Return GAP(K2 * X), (B, P, C), without the maps; X is the input of K2."""
        parts, size = self.num_parts, previous.shape[-2:]
        means = tap_means(last, size, self.interpolation).flatten(1, 2)  # (P, B, 9, C') -> (P, B*9, C')
        weight = self.reduce.weight.view(parts, -1, last.shape[2])  # (P*C, C', 1, 1) -> (P, C, C')
        means = torch.bmm(means, weight.mT)  # -> (P, B*9, C)
        means = means.unflatten(1, (last.shape[0], KERNEL**2))  # -> (P, B, 9, C)
        means = means + tap_means(previous, size, self.interpolation)
        # follow the kernel's memory layout: a copy would move 75 MB for ResNet-50
        kernel = self.smooth.weight  # (P*C, C, 3, 3)
        if kernel.is_contiguous():
            means = means.mT  # -> (P, B, C, 9)
        else:
            kernel = kernel.permute(0, 2, 3, 1)  # -> (P*C, 3, 3, C)
        kernel = kernel.reshape(parts, previous.shape[2], -1)  # -> (P, C, C*9) or (P, C, 9*C)
        return torch.bmm(means.flatten(2), kernel.mT).transpose(0, 1)  # (P, B, C) -> (B, P, C)

    def _convolved_moments(self, previous: Tensor, last: Tensor, stride: int = 1) -> tuple[Tensor, Tensor]:
        """Return the spatial mean and variance of K2 * X, each (B, P, C)."""
        # part by part: grouped convolutions are slower and need a copy of the parts
        # (P*C, C', 1, 1) -> P x (C, C', 1, 1) and (P*C, C, 3, 3) -> P x (C, C, 3, 3)
        kernels = self.reduce.weight.chunk(self.num_parts), self.smooth.weight.chunk(self.num_parts)
        moments = []
        # (B, P, C, H, W) -> P x (B, C, H, W)
        for own, deeper, reduce, smooth in zip(previous.unbind(1), last.unbind(1), *kernels, strict=True):
            resized = F.interpolate(F.conv2d(deeper, reduce), size=own.shape[-2:], mode=self.interpolation)
            maps = F.conv2d(own + resized, smooth, stride=stride, padding=1)
            # (B, C, H, W) -> (B, C)
            moments.append(torch.var_mean(at_least_float32(maps), (2, 3), correction=0))
        variances, means = zip(*moments, strict=True)
        return torch.stack(means, 1), torch.stack(variances, 1)  # P x (B, C) -> (B, P, C)

    def _normalize(self, means: Tensor, variances: Tensor, positions: int) -> Tensor:
        """Apply the batch norm in training mode to pooled maps, and update its running statistics.

        ``means`` and ``variances``, (B, P, C), are over the ``positions`` spatial positions of each image's maps.
        """
        norm: Any = self.norm
        shape = means.shape
        means, variances = means.flatten(1), variances.flatten(1)  # (B, P, C) -> (B, P*C)
        gather = sum_over_ranks if isinstance(norm, nn.SyncBatchNorm) else nn.Identity()
        count = gather(means.new_full((), len(means) * positions))
        mean = gather(means.sum(0) * positions) / count  # (B, P*C) -> (P*C,)
        variance = gather((variances + (means - mean).square()).sum(0) * positions) / count  # (P*C,)
        with torch.no_grad():
            seen = norm.num_batches_tracked
            if seen is not None:
                seen += 1
            # as in nn.BatchNorm2d: the average over all batches if momentum is None
            momentum = 1 / float(seen) if norm.momentum is None and seen is not None else norm.momentum
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * count / (count - 1).clamp(min=1), momentum)
        normalized: Tensor = (means - mean) * (norm.weight * torch.rsqrt(variance + norm.eps)) + norm.bias
        return normalized.view(shape)  # (B, P*C) -> (B, P, C)


def tap_means(maps: Tensor, size: torch.Size, interpolation: Interpolation) -> Tensor:
    """Return the mean of the resized maps over the window of each tap of a zero-padded 3x3 kernel.

    Windows and interpolation are separable and linear: the mean for tap (i, j) is ``rows_i X cols_j^T``.

    Args:
        maps: (B, P, C, h, w).
        size: (H, W) to which the maps would be resized with ``interpolation`` before the convolution.

    Returns:
        (P, B, 9, C), taps row by row.
    """
    rows = tap_windows(maps.shape[-2], size[0], interpolation, maps)
    cols = tap_windows(maps.shape[-1], size[1], interpolation, maps)
    # (3, 1, h, 1) * (3, 1, w) -> (3, 3, h, w) -> (9, h*w)
    windows = (rows[:, None, :, None] * cols[:, None]).flatten(2).flatten(0, 1)
    # parts first, as residual blocks leave them in memory: views without a copy
    flat = maps.transpose(0, 1).flatten(3)  # (B, P, C, h, w) -> (P, B, C, h*w)
    # (P*B, 9, h*w) @ (P*B, h*w, C) -> (P*B, 9, C)
    means = torch.bmm(windows.expand(flat.shape[0] * flat.shape[1], -1, -1), flat.flatten(0, 1).mT)
    return means.view(*flat.shape[:2], *means.shape[1:])  # -> (P, B, 9, C)


def tap_windows(source: int, target: int, interpolation: Interpolation, like: Tensor) -> Tensor:
    """Return the averaging window of each tap, expressed in source positions before the resizing, (3, source)."""
    windows = like.new_ones(KERNEL, target)
    windows[0, -1] = 0
    windows[-1, 0] = 0
    if source != target:
        unit = torch.eye(source, dtype=like.dtype, device=like.device)[None]  # (1, source, source)
        mode = "linear" if interpolation == "bilinear" else "nearest"
        # (3, target) @ (target, source) -> (3, source)
        windows = windows @ F.interpolate(unit, size=target, mode=mode)[0].T
    return windows / target
