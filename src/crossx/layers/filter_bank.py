"""The filter bank of DFL-CNN, and the energy peaks that initialise it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 3
"""Side of the non-maximum suppression window, in spatial positions."""


class FilterBank(nn.Module):
    """k filters per class: a 1x1 convolution whose output channels are grouped by class.

    "Conv6" of Wang et al., CVPR 2018 (https://arxiv.org/abs/1611.09932). Each filter detects a patch, the receptive
    field of one spatial position.

    Args:
        channels: C of the map.
        num_classes: K.
        num_filters: k.
        batch_norm: Whether to batch-normalise the responses.
    """

    def __init__(self, channels: int, num_classes: int, num_filters: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.groups = (num_classes, num_filters)
        total = num_classes * num_filters
        self.conv = nn.Conv2d(channels, total, 1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(total) if batch_norm else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """Return the responses (B, K, k, h, w) for maps (B, C, h, w)."""
        responses: Tensor = self.norm(self.conv(maps))
        responses = responses.unflatten(1, self.groups)  # (B, K*k, h, w) -> (B, K, k, h, w)
        return responses

    @torch.no_grad()
    def set_filters(self, label: int, filters: Tensor) -> None:
        """Set the filters of class ``label`` to ``filters`` (k, C), without bias."""
        own = slice(label * self.groups[1], (label + 1) * self.groups[1])
        # (k, C) -> (k, C, 1, 1)
        self.conv.weight[own] = filters[:, :, None, None].to(self.conv.weight)
        if self.conv.bias is not None:
            self.conv.bias[own] = 0


def energy_peaks(maps: Tensor, count: int) -> list[Tensor]:
    """Return the features at the peaks of each image's energy map (L2 norm over the channels).

    A peak is the maximum of its ``WINDOW`` with positive energy; of ties, the first in row-major order.

    Args:
        maps: (B, C, h, w).
        count: Maximum number of peaks per image; the strongest are kept.

    Returns:
        Per image, features (n, C) with n <= ``count``, strongest first.
    """
    energy = maps.norm(dim=1)  # (B, C, h, w) -> (B, h, w)
    _, strongest = F.max_pool2d(energy, WINDOW, stride=1, padding=WINDOW // 2, return_indices=True)
    energy, strongest = energy.flatten(1), strongest.flatten(1)  # (B, h, w) -> (B, h*w)
    is_peak = (strongest == torch.arange(energy.shape[1], device=maps.device)) & (energy > 0)
    ranked, positions = energy.where(is_peak, -1).topk(min(count, energy.shape[1]))
    features = maps.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h*w, C)
    return [
        feature[index[value > 0]] for feature, index, value in zip(features, positions, ranked, strict=True)
    ]
