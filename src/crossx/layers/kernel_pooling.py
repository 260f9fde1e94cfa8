"""Pooling of products of features: full bilinear pooling and the Taylor series of a Gaussian kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crossx.errors import UsageError
from crossx.layers.tensor_sketch import TensorSketch

SQRT_EPSILON = 1e-6
"""Limits the slope of ``signed_sqrt`` at zero to 1000. Public ports add 1e-12 to 1e-5 to the argument."""


class BilinearPooling(nn.Module):
    """Outer product of the features with themselves, averaged over the spatial positions.

    B-CNN with one network (Lin et al., ICCV 2015).
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean products, (B, C, C), for features (B, N, C) at N spatial positions."""
        return features.transpose(1, 2) @ features / features.shape[1]  # (B, C, N) @ (B, N, C) -> (B, C, C)


class TaylorSeriesKernel(nn.Module):
    """Explicit features of the Taylor series of a Gaussian kernel, averaged over the spatial positions.

    Cui et al., CVPR 2017. For unit vectors, ``exp(-gamma |x - y|^2) = sum_i exp(-2 gamma) (2 gamma)^i / i! <x, y>^i``.
    The features of order i are ``alpha_i`` times the i-th tensor power of x, which is sketched from order 2 on. The
    coefficients ``alpha`` are learnt.

    Args:
        channels: C.
        order: p, the last order of the series.
        sketch_size: d, the length of a sketch.
        gamma: gamma of the kernel that initialises ``alpha``.
        seed: Seed of the sketches.

    Attributes:
        composition: alpha_0 to alpha_p.
    """

    def __init__(
        self, channels: int, order: int, sketch_size: int, gamma: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.sketch = TensorSketch(channels, sketch_size, order, seed)
        self.composition = nn.Parameter(gaussian_composition(order, gamma))

    def forward(self, features: Tensor) -> Tensor:
        """Return the features of all orders, (B, 1 + C + (p - 1) d), for features (B, N, C) at N spatial positions."""
        constant = self.composition[:1].expand(features.shape[0], 1)  # (1,) -> (B, 1)
        linear = self.composition[1] * features.mean(1)  # (B, N, C) -> (B, C)
        powers = self.composition[2:, None] * self.sketch(features)  # (p - 1, 1) * (B, p - 1, d)
        return torch.cat([constant, linear, powers.flatten(1)], 1)  # -> (B, 1 + C + (p - 1) d)

    def start_from(self, gamma: float) -> None:
        """Set the coefficients to those of the Gaussian kernel with ``gamma``."""
        with torch.no_grad():
            self.composition.copy_(gaussian_composition(self.sketch.order, gamma))


def gaussian_composition(order: int, gamma: float) -> Tensor:
    """Return alpha_0 to alpha_p of a Gaussian kernel, with ``alpha_i^2`` proportional to ``(2 gamma)^i / i!``.

    Their squares sum to 1, so the kernel of a unit vector with itself is 1. For the full series, the factor of
    proportionality is ``exp(-2 gamma)``.

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
