"""Channel grouping: parts as weighted sums of channels that peak at the same spatial positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crossx.distributed import at_least_float32
from crossx.layers.crops import square_corners
from crossx.layers.part_linear import PartLinear

START_WEIGHT = 0.95
"""Weight of a part's own channels at the start; the others have one minus that. At 0 and 1 a sigmoid cannot learn."""
START_STD = 0.005
"""Standard deviation of the weights of the linear layers at the start."""


class ChannelGrouping(nn.Module):
    """Weights of the channels for each part: two linear layers per part, with tanh between and a sigmoid.

    Zheng et al. 2017 (https://doi.org/10.1109/ICCV.2017.557).

    Args:
        channels: C.
        num_parts: P.
    """

    def __init__(self, channels: int, num_parts: int) -> None:
        super().__init__()
        self.hidden = PartLinear(num_parts, channels, channels)
        self.weights = PartLinear(num_parts, channels, channels)
        for layer in (self.hidden, self.weights):
            nn.init.normal_(layer.weight, std=START_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Return the weights, (B, P, C), between 0 and 1, for pooled features (B, C)."""
        parts = pooled[:, None].expand(-1, self.hidden.weight.shape[0], -1)  # (B, C) -> (B, P, C)
        weights: Tensor = self.weights(self.hidden(parts).tanh()).sigmoid()
        return weights

    @torch.no_grad()
    def start_from(self, groups: Tensor) -> None:
        """Give each part the channels of its group, whatever the image.

        A constant is fitted by the bias: no steps are needed.

        Args:
            groups: Part of each channel, int64 (C,).
        """
        own = torch.arange(len(self.weights.bias), device=groups.device)[:, None] == groups  # (P, C)
        level = math.log(START_WEIGHT / (1 - START_WEIGHT))
        self.weights.bias.copy_(torch.where(own, level, -level))


def attention_maps(features: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted sums of the channels, normalised to a sum of 1 over the spatial positions, (B, P, h, w).

    Computed in float32 at least. Negative features count as 0; without any above 0 the map is uniform.

    Args:
        features: (B, C, h, w).
        weights: Weights of the channels for each part, (B, P, C), not negative.
    """
    with torch.autocast(features.device.type, enabled=False):
        sums = torch.einsum(
            "bchw,bpc->bphw", at_least_float32(features).relu(), at_least_float32(weights)
        )  # (B, C, h, w) and (B, P, C) -> (B, P, h, w)
    sums = sums + 1e-6
    return sums / sums.sum((2, 3), keepdim=True)


def attention_pool(features: Tensor, maps: Tensor) -> Tensor:
    """Return the sums of the features weighted by the maps, (B, P, C), in the dtype of the features.

    Args:
        features: (B, C, h, w).
        maps: (B, P, h, w).
    """
    return torch.einsum("bchw,bphw->bpc", features, maps.to(features.dtype))


def channel_peaks(maps: Tensor) -> Tensor:
    """Return row and column of the maximum of each channel, (B, C, 2), float32.

    A channel that is the same everywhere in an image, such as one that is 0, has the mean of the other peaks of the
    image; if no channel has a peak, it is the middle.

    Args:
        maps: (B, C, h, w).
    """
    flat = maps.flatten(2)  # (B, C, h, w) -> (B, C, h*w)
    places = flat.argmax(2)
    width = maps.shape[3]
    peaks = torch.stack([places // width, places % width], 2).float()  # (B, C) -> (B, C, 2)
    has_peak = (flat.amax(2) > flat.amin(2))[..., None]  # (B, C, 1)
    count = has_peak.sum(1, keepdim=True)
    middle = peaks.new_tensor([(maps.shape[2] - 1) / 2, (width - 1) / 2])
    mean = torch.where(count > 0, (peaks * has_peak).sum(1, keepdim=True) / count.clamp(min=1), middle)
    return torch.where(has_peak, peaks, mean)


def peak_boxes(maps: Tensor, image_size: tuple[int, int], side: int) -> Tensor:
    """Return a square around the maximum of each map, moved into the image, in whole pixels, float32 (B, P, 4).

    Args:
        maps: (B, P, h, w).
        image_size: (H, W) in pixels.
        side: Side of the squares in pixels, at most that of the image.

    Returns:
        Left, top, right and bottom.
    """
    peaks = maps.flatten(2).argmax(2)  # (B, P, h, w) -> (B, P)
    left_top = square_corners(peaks, maps.shape[2:], image_size, side).floor()
    return torch.cat([left_top, left_top + side], 2)


def object_box(features: Tensor, image_size: tuple[int, int], threshold: float) -> Tensor:
    """Return the box of the spatial positions whose features are strong, in whole pixels, float32 (B, 1, 4).

    The box has all positions at which the sum over the channels, negative ones as 0, is above a share of its maximum.
    It is enlarged to a square with the same centre, and then moved and cut into the image.

    Args:
        features: (B, C, h, w).
        image_size: (H, W) in pixels.
        threshold: The share, below 1.
    """
    strength = at_least_float32(features).relu().sum(1)  # (B, C, h, w) -> (B, h, w)
    inside = strength >= threshold * strength.amax((1, 2), keepdim=True)
    edges = []
    for axis, extent in ((1, image_size[1]), (2, image_size[0])):
        line = inside.any(axis).float()  # (B, h, w) -> (B, w) or (B, h)
        count = line.shape[1]
        # the first maximum from either end
        first, last = line.argmax(1), count - line.flip(1).argmax(1)
        edges.append((first * (extent / count), last * (extent / count)))
    side = torch.maximum(*(high - low for low, high in edges))
    found = []
    for (low, high), extent in zip(edges, (image_size[1], image_size[0]), strict=True):
        low = ((low + high - side) / 2).clamp(min=0).minimum((extent - side).clamp(min=0)).floor()
        found.append((low, (low + side).clamp(max=extent).ceil()))
    (left, right), (top, bottom) = found
    return torch.stack([left, top, right, bottom], 1)[:, None]  # 4 x (B,) -> (B, 1, 4)
