"""Resize images inside a network."""

from __future__ import annotations

import torch
from torch import Tensor

from crossx.distributed import at_least_float32


def shrink(images: Tensor, size: int) -> Tensor:
    """Resize images to ``size`` x ``size`` pixels, bilinearly and without aliasing.

    Equals ``F.interpolate(images, size, mode="bilinear", antialias=True)``, as two matrix products: OpenVINO ignores
    the antialiasing of exported networks. Computed in float32 at least.

    Args:
        images: (B, C, H, W).
        size: Side of the result in pixels.

    Returns:
        (B, C, size, size), in the dtype of the images.
    """
    height, width = images.shape[2:]
    # no autocast: in half precision, large images would lose their gradations
    with torch.autocast(images.device.type, enabled=False):
        pixels = at_least_float32(images)
        rows, columns = _triangles(size, height, pixels), _triangles(size, width, pixels)
        # (size, H) x (B, C, H, W) x (W, size) -> (B, C, size, size)
        return (rows @ pixels @ columns.T).to(images.dtype)


def _triangles(size: int, length: int, like: Tensor) -> Tensor:
    """Return the weights of ``length`` pixels in each of ``size`` resized ones, (size, length)."""
    step = length / size
    centres = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) * step
    pixels = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    weights = (1 - (pixels - centres[:, None]).abs() / max(step, 1.0)).relu()
    return weights / weights.sum(1, keepdim=True)
