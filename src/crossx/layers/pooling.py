"""Global pooling of attention features."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossx.distributed import at_least_float32, reduction_dtype
from crossx.errors import check_choice

Pooling: TypeAlias = Literal["max", "avg"]


def global_pool(features: Tensor, pooling: Pooling) -> Tensor:
    """Pool attention features (B, P, C, H, W) over the spatial positions to part features (B, P, C).

    ``avg`` is GAP, ``max`` is GMP (section 3.2 and the last paragraph of section 4.3). Under autocast the result is in
    float32.
    """
    check_choice("pooling", pooling, get_args(Pooling))
    # (B, P, C, H, W) -> (B, P, C)
    if pooling == "avg":
        return features.mean((3, 4), dtype=reduction_dtype(features))
    if torch.compiler.is_compiling():
        return features.amax((3, 4)).to(reduction_dtype(features))
    pooled: Tensor = _GlobalMax.apply(features)
    return pooled.to(reduction_dtype(features))


def pooled_shares(features: Tensor, pooling: Pooling) -> Tensor:
    """Return maps (B, P, C, H, W) whose spatial mean is ``global_pool(features, pooling)``.

    For ``avg``, the features themselves. For ``max``, ``H W`` times the channel's maximum at its position and zero
    elsewhere; ties share the value equally, as in the gradient of ``amax``.
    """
    if pooling == "avg":
        return features
    largest = (features == features.amax((3, 4), keepdim=True)).to(features.dtype)  # amax: (B, P, C, 1, 1)
    return features * largest / largest.mean((3, 4), keepdim=True)


class _GlobalMax(torch.autograd.Function):
    """``amax`` over the spatial positions, with the same gradient in a quarter of the time and memory.

    PyTorch counts ties in int64, which takes twice the memory of the features.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        pooled = features.amax((3, 4))  # (B, P, C, H, W) -> (B, P, C)
        ctx.save_for_backward(features, pooled)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        features, pooled = ctx.saved_tensors
        largest: Tensor = (features == pooled[..., None, None]).to(gradient.dtype)  # (B, P, C, H, W)
        ties = largest.sum((3, 4), dtype=at_least_float32(gradient).dtype)
        return largest.mul_((gradient / ties)[..., None, None])
