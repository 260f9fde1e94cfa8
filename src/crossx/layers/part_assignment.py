"""Assign each spatial position of a map to a part or to the background, as PDiscoNet does."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32


def prototype_scores(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return ``|z_i|^2 - |z_i - v_p|^2``, whose softmax over p is that of the negative squared distances.

    Computed in float32 at least.

    Args:
        features: z, (B, C, h, w).
        prototypes: v, (M, C).

    Returns:
        (B, M, h, w).
    """
    # no autocast: a softmax of squared distances magnifies rounding
    with torch.autocast(features.device.type, enabled=False):
        prototypes = at_least_float32(prototypes)
        kernels = 2 * prototypes[..., None, None]  # (M, C) -> (M, C, 1, 1)
        return F.conv2d(at_least_float32(features), kernels, -prototypes.square().sum(1))


def enlarge(maps: Tensor, like: Tensor) -> Tensor:
    """Return maps (B, C, h, w), resized bilinearly to the size (H, W) of ``like`` if theirs is another."""
    size = like.shape[-2:]
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size=size, mode="bilinear")


def join_stages(last: Tensor, previous: Tensor) -> Tensor:
    """Return ``last``, enlarged bilinearly to the size of ``previous``, and ``previous``, (B, C' + C, H, W).

    Args:
        last: (B, C', h, w).
        previous: (B, C, H, W).
    """
    return torch.cat([enlarge(last, previous), previous], 1)


def draw_prototypes(number: int, channels: int) -> Tensor:
    """Draw prototypes (number, channels) like the weights of PDiscoNet's 1 x 1 convolution."""
    bound = channels**-0.5
    return torch.empty(number, channels).uniform_(-bound, bound)


class PartAssignment(nn.Module):
    """The shares of P parts and of the background in each spatial position: a softmax over prototypes.

    Args:
        channels: C of the features that are compared with the prototypes.
        num_parts: P.
        detach: Whether the shares train only the prototypes, and not the features that are compared with them.
        whole: Whether one more excitation, the last, has every position to itself (``weights``).
        detach_shares: Whether ``weights`` pass no gradient to the shares, and so neither to prototypes nor features.
    """

    def __init__(
        self,
        channels: int,
        num_parts: int,
        detach: bool = False,
        whole: bool = False,
        detach_shares: bool = False,
    ) -> None:
        super().__init__()
        self.detach, self.whole, self.detach_shares = detach, whole, detach_shares
        self.prototypes = nn.Parameter(draw_prototypes(num_parts + 1, channels))

    def forward(self, features: Tensor) -> Tensor:
        """Return shares of sum 1, float32 (B, P + 1, h, w), the background's last, for features (B, C, h, w)."""
        compared = features.detach() if self.detach else features
        return prototype_scores(compared, self.prototypes).softmax(1)

    def weights(self, shares: Tensor) -> Tensor:
        """Return what the excitations multiply a map with, (B, P [+ 1], h, w), for the result of ``forward``."""
        parts = shares[:, :-1]
        if self.detach_shares:
            parts = parts.detach()
        return torch.cat((parts, torch.ones_like(shares[:, :1])), 1) if self.whole else parts
