"""Pooling of products of features: full bilinear pooling and the Taylor series of a Gaussian kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crossx.errors import UsageError
from crossx.layers.tensor_sketch import TensorSketch

SQRT_EPSILON = 1e-6
"""What bounds the slope of ``signed_sqrt`` at zero, by 1000. Public ports add 1e-12 to 1e-5 to the argument."""


class BilinearPooling(nn.Module):
    """The outer product of features with themselves, averaged over the places of an image.

    B-CNN with one network (Lin et al., ICCV 2015).
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C, C) of features (B, N, C) at N places."""
        return features.transpose(1, 2) @ features / features.shape[1]


class TaylorSeriesKernel(nn.Module):
    """Explicit features of a Gaussian kernel's Taylor series, averaged over the places of an image.

    Cui et al., CVPR 2017. For unit vectors ``exp(-gamma |x - y|^2) = sum_i exp(-2 gamma) (2 gamma)^i / i! <x, y>^i``:
    the features of order i are ``alpha_i`` times the i-th tensor power of x, those from order 2 on in sketches. The
    composition ``alpha`` is learnt.

    Args:
        channels: C.
        order: p, where the series ends.
        sketch_size: d, the length of a sketch.
        gamma: Of the kernel that the composition starts from.
        seed: Of the sketches.

    Attributes:
        composition: alpha_0 to alpha_p.

    Raises:
        UsageError: For an option that cannot work.
    """

    def __init__(
        self, channels: int, order: int, sketch_size: int, gamma: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.sketch = TensorSketch(channels, sketch_size, order, seed)
        self.composition = nn.Parameter(gaussian_composition(order, gamma))

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, 1 + C + (p - 1) d) of features (B, N, C) at N places."""
        constant = self.composition[:1].expand(features.shape[0], 1)
        linear = self.composition[1] * features.mean(1)
        powers = self.composition[2:, None] * self.sketch(features)
        return torch.cat([constant, linear, powers.flatten(1)], 1)

    def start_from(self, gamma: float) -> None:
        """Set the composition to that of the Gaussian kernel of ``gamma``."""
        with torch.no_grad():
            self.composition.copy_(gaussian_composition(self.sketch.order, gamma))


def gaussian_composition(order: int, gamma: float) -> Tensor:
    """Return alpha_0 to alpha_p of a Gaussian kernel, ``alpha_i^2`` proportional to ``(2 gamma)^i / i!``.

    They are scaled to a sum of squares of 1, so that the kernel of a unit vector and itself is 1: for the whole series
    that factor is ``exp(-2 gamma)``.

    Raises:
        UsageError: If ``gamma`` is not positive.
    """
    if not 0 < gamma < math.inf:
        raise UsageError(f"gamma must be above 0, not {gamma}.")
    powers = torch.arange(order + 1, dtype=torch.float64)
    squares = torch.softmax(powers * math.log(2 * gamma) - torch.lgamma(powers + 1), 0)
    return squares.sqrt().to(torch.get_default_dtype())


def signed_sqrt(features: Tensor) -> Tensor:
    """Return ``sign(x) sqrt(|x|)``, with a finite slope at zero."""
    return features * torch.rsqrt(features.abs() + SQRT_EPSILON)
