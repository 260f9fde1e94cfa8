"""A bank of patch detectors, and the places of a map worth detecting (DFL-CNN)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 3
"""Places along one side of the window in which the strongest suppresses the others."""


class FilterBank(nn.Module):
    """k filters a class of one place each: a 1x1 convolution whose channels are grouped by class.

    "Conv6" of Wang et al., CVPR 2018 (https://arxiv.org/abs/1611.09932): each filter detects a patch, which is what a
    place of the map sees of the image.

    Args:
        channels: C of the map.
        num_classes: K.
        num_filters: k.
        batch_norm: Whether each filter's responses are normalised.
    """

    def __init__(self, channels: int, num_classes: int, num_filters: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.groups = (num_classes, num_filters)
        total = num_classes * num_filters
        self.conv = nn.Conv2d(channels, total, 1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(total) if batch_norm else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """Return the responses (B, K, k, h, w) to maps (B, C, h, w)."""
        responses: Tensor = self.norm(self.conv(maps)).unflatten(1, self.groups)
        return responses

    @torch.no_grad()
    def set_filters(self, label: int, filters: Tensor) -> None:
        """Start the filters of class ``label`` from ``filters`` (k, C), without bias."""
        own = slice(label * self.groups[1], (label + 1) * self.groups[1])
        self.conv.weight[own] = filters[:, :, None, None].to(self.conv.weight)
        if self.conv.bias is not None:
            self.conv.bias[own] = 0


def energy_peaks(maps: Tensor, count: int) -> list[Tensor]:
    """Return the features at the peaks of each image's energy map, the L2 norm over the channels.

    Non-maximum suppression keeps a place that no other within ``WINDOW`` exceeds; of equal ones the first in reading
    order. Places without energy are no peaks.

    Args:
        maps: (B, C, h, w).
        count: Most peaks of an image: the strongest.

    Returns:
        For each image its features (n, C), n <= ``count``, strongest first.
    """
    energy = maps.norm(dim=1)
    _, strongest = F.max_pool2d(energy, WINDOW, stride=1, padding=WINDOW // 2, return_indices=True)
    energy, strongest = energy.flatten(1), strongest.flatten(1)
    is_peak = (strongest == torch.arange(energy.shape[1], device=maps.device)) & (energy > 0)
    ranked, places = energy.where(is_peak, -1).topk(min(count, energy.shape[1]))
    features = maps.flatten(2).transpose(1, 2)
    return [feature[place[value > 0]] for feature, place, value in zip(features, places, ranked, strict=True)]
