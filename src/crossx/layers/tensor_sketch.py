"""Tensor Sketch: short vectors whose inner products estimate those of tensor powers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from crossx.errors import UsageError


class TensorSketch(nn.Module):
    """Sketches of the tensor powers 2 to p of vectors, averaged over the spatial positions.

    Pham and Pagh, KDD 2013. A count sketch adds entry c of x, times a random sign s(c), to entry h(c) of a vector of
    length d. The circular convolution of i independent count sketches of x is a sketch of the i-th tensor power of x:
    the inner product of two such sketches is an unbiased estimate of ``<x, y>^i``. Convolutions are products in the
    Fourier domain, so power i costs one more count sketch and product than power i - 1. The mean is also taken there,
    which needs one inverse transform per image instead of one per spatial position.

    The hashes h and signs s are buffers, saved with the weights.

    Args:
        channels: C.
        size: d, the length of a sketch, at least 2.
        order: p, the highest power, at least 2.
        seed: Seed of the hashes and signs.
    """

    hashes: Tensor
    signs: Tensor

    def __init__(self, channels: int, size: int, order: int, seed: int = 0) -> None:
        super().__init__()
        if size < 2:
            raise UsageError(f"sketch_size must be at least 2, not {size}.")
        if order < 2:
            raise UsageError(f"order must be at least 2, not {order}.")
        self.size = size
        self.order = order
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("hashes", torch.randint(size, (order, channels), generator=generator))
        self.register_buffer("signs", torch.randint(2, (order, channels), generator=generator) * 2.0 - 1.0)

    def forward(self, features: Tensor) -> Tensor:
        """Return the mean sketches of the powers 2 to p, (B, p - 1, d), for features (B, N, C) at N spatial positions.

        The features must be float32 or float64; there is no Fourier transform in half precision.
        """
        # MKL has no transform of an empty batch
        if torch.compiler.is_exporting() or len(features) == 0:
            return self._by_matrix_products(features)
        product, sketches = self._spectrum(features, 0), []
        for factor in range(1, self.order):
            product = product * self._spectrum(features, factor)
            sketches.append(torch.fft.irfft(product.mean(1), n=self.size))  # (B, N, d//2 + 1) -> (B, d)
        return torch.stack(sketches, 1)  # (p - 1) x (B, d) -> (B, p - 1, d)

    def _spectrum(self, features: Tensor, factor: int) -> Tensor:
        """Return the Fourier transform of one count sketch per spatial position, (B, N, d//2 + 1)."""
        empty = features.new_zeros(*features.shape[:2], self.size)
        # (B, N, C) -> (B, N, d)
        sketch = empty.index_add(2, self.hashes[factor], features * self.signs[factor])
        spectrum: Tensor = torch.fft.rfft(sketch)  # -> (B, N, d//2 + 1)
        return spectrum

    def _by_matrix_products(self, features: Tensor) -> Tensor:
        """Compute ``forward`` without Fourier transforms, which some runtimes lack.

        The transform of a count sketch is linear in x: entry k is ``sum_c s(c) exp(-2 pi i h(c) k / d) x(c)``.
        """
        frequencies = torch.arange(self.size // 2 + 1, device=features.device)
        real, imaginary, sketches = None, None, []
        for hashes, signs in zip(self.hashes, self.signs, strict=True):
            angles = self._angles(hashes, frequencies, features.dtype)
            # (B, N, C) @ (C, d//2 + 1) -> (B, N, d//2 + 1)
            cosines = features @ (signs[:, None] * angles.cos())
            sines = features @ (-signs[:, None] * angles.sin())
            if real is None or imaginary is None:
                real, imaginary = cosines, sines
                continue
            real, imaginary = real * cosines - imaginary * sines, real * sines + imaginary * cosines
            # (B, N, d//2 + 1) -> (B, d//2 + 1) -> (B, d)
            sketches.append(self._inverse(real.mean(1), imaginary.mean(1), frequencies))
        return torch.stack(sketches, 1)  # (p - 1) x (B, d) -> (B, p - 1, d)

    def _inverse(self, real: Tensor, imaginary: Tensor, frequencies: Tensor) -> Tensor:
        angles = self._angles(frequencies, torch.arange(self.size, device=real.device), real.dtype)
        # every frequency except 0 and d / 2 also represents its mirror image
        single = 2 * frequencies % self.size == 0
        weights = torch.where(single, 1.0, 2.0)[:, None].to(real.dtype) / self.size
        # (B, d//2 + 1) @ (d//2 + 1, d) -> (B, d)
        return real @ (weights * angles.cos()) - imaginary @ (weights * angles.sin())

    def _angles(self, positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Tensor:
        # (n, 1) * (m,) -> (n, m)
        return (positions[:, None] * frequencies % self.size).to(dtype) * (2 * math.pi / self.size)
