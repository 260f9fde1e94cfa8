"""Where half precision is too coarse."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 where it is in half precision, as it is in float32 and float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
