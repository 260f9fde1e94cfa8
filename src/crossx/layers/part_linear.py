"""One linear layer per part."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PartLinear(nn.Module):
    """P linear layers with stacked weights, each initialised like ``nn.Linear``.

    Args:
        num_parts: P.
        in_features: F.
        out_features: D.
    """

    def __init__(self, num_parts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_parts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_parts, out_features))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, parts: Tensor) -> Tensor:
        """Map parts (B, P, F) to (B, P, D)."""
        return torch.einsum("bpf,pdf->bpd", parts, self.weight) + self.bias  # (B, P, F) -> (B, P, D)
