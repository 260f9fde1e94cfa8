"""Global pooling of attention features."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

Pooling: TypeAlias = Literal["max", "avg"]


def global_pool(features: Tensor, pooling: Pooling) -> Tensor:
    """Pool attention features (B, P, C, H, W) over the places to part features (B, P, C).

    ``avg`` is GAP, ``max`` is GMP (section 3.2 and the last paragraph of section 4.3).
    """
    return features.amax((3, 4)) if pooling == "max" else features.mean((3, 4))
