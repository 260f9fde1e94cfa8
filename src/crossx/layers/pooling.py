"""Global pooling of attention features."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Pooling: TypeAlias = Literal["max", "avg"]


def global_pool(features: Tensor, pooling: Pooling) -> Tensor:
    """Pool attention features (B, P, C, H, W) over the places to part features (B, P, C).

    ``avg`` is GAP, ``max`` is GMP (section 3.2 and the last paragraph of section 4.3).
    """
    if pooling == "avg":
        return features.mean((3, 4))
    if torch.compiler.is_compiling():
        return features.amax((3, 4))
    pooled: Tensor = _GlobalMax.apply(features)
    return pooled


def pooled_shares(features: Tensor, pooling: Pooling) -> Tensor:
    """Return maps (B, P, C, H, W) whose mean over the places is ``global_pool(features, pooling)``.

    For ``avg`` the features themselves. For ``max`` zero wherever a channel is not largest, and ``H W`` times its
    maximum where it is, shared by equal places as the gradient of ``amax`` is.
    """
    if pooling == "avg":
        return features
    largest = (features == features.amax((3, 4), keepdim=True)).to(features.dtype)
    return features * largest / largest.mean((3, 4), keepdim=True)


class _GlobalMax(torch.autograd.Function):
    """``amax`` over the places with its gradient, shared by equal places, in a quarter of the time and memory.

    PyTorch's own counts the equal places in int64, twice the features' size.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        pooled = features.amax((3, 4))
        ctx.save_for_backward(features, pooled)
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        features, pooled = ctx.saved_tensors
        largest: Tensor = (features == pooled[..., None, None]).to(gradient.dtype)
        return largest.mul_((gradient / largest.sum((3, 4)))[..., None, None])
