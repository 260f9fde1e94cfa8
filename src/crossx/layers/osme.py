"""One-squeeze multi-excitation (OSME): P channel gates turn one map into P attention features (Eq. 1 and 2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from crossx.errors import UsageError


class OSME(nn.Module):
    """P gates over the channels of one map, with the weights of all parts stacked.

    Eq. 1: ``m_p = sigmoid(W2_p ReLU(W1_p z))`` with ``z = GAP(U)``; Eq. 2: ``U_p = m_p * U``. The biases are those
    of the released code; the paper prints none.

    Args:
        channels: C.
        num_parts: P, the number of excitation modules.
        reduction: Channels per hidden unit of a gate, 1 to C (SE uses 16; the paper gives none).
    """

    def __init__(self, channels: int, num_parts: int, reduction: int = 16) -> None:
        super().__init__()
        if num_parts < 1:
            raise UsageError(f"num_parts must be at least 1, not {num_parts}.")
        if not 1 <= reduction <= channels:
            raise UsageError(
                f"reduction must be between 1 and the stage's {channels} channels, not {reduction}."
            )
        hidden = channels // reduction
        self.num_parts = num_parts
        self.squeeze_weight = nn.Parameter(torch.empty(num_parts, hidden, channels))
        self.squeeze_bias = nn.Parameter(torch.empty(num_parts, hidden))
        self.excite_weight = nn.Parameter(torch.empty(num_parts, channels, hidden))
        self.excite_bias = nn.Parameter(torch.empty(num_parts, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every gate like ``nn.Linear``: uniform within 1 / sqrt(inputs)."""
        for layer in ("squeeze", "excite"):
            bound = 1 / math.sqrt(self.get_parameter(f"{layer}_weight").shape[-1])
            for name in ("weight", "bias"):
                nn.init.uniform_(self.get_parameter(f"{layer}_{name}"), -bound, bound)

    def gates(self, maps: Tensor) -> Tensor:
        """Return the gates m_p, (B, P, C), for maps (B, C, H, W)."""
        z = maps.mean((2, 3))  # (B, C, H, W) -> (B, C)
        # (B, C) -> (B, P, hidden) -> (B, P, C)
        hidden = F.relu(torch.einsum("bc,phc->bph", z, self.squeeze_weight) + self.squeeze_bias)
        return torch.sigmoid(torch.einsum("bph,pch->bpc", hidden, self.excite_weight) + self.excite_bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the attention features U_p, (B, P, C, H, W), for maps (B, C, H, W), in their type."""
        # gates (B, P, C) -> (P, B, C); result (P, B, C, H, W) -> (B, P, C, H, W)
        return gate(maps, self.gates(maps).to(maps).transpose(0, 1)).transpose(0, 1)


def gate(maps: Tensor, gates: Tensor) -> Tensor:
    """Return ``m_p * U``, (P, B, C, H, W), for maps U (B, C, H, W) and gates m_p (P, B, C).

    The gradient is computed part by part: autograd's own allocates two tensors of the size of the result.
    """
    if torch.compiler.is_compiling():
        return gates[..., None, None] * maps  # (P, B, C, 1, 1) * (B, C, H, W) -> (P, B, C, H, W)
    gated: Tensor = _Gate.apply(maps, gates)
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(maps, gates)
        return gates[..., None, None] * maps  # (P, B, C, 1, 1) * (B, C, H, W) -> (P, B, C, H, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        maps, gates = ctx.saved_tensors
        # P x (map (B, C, H, W), gate (B, C, 1, 1))
        first, *others = (
            (part, m[..., None, None].to(part)) for part, m in zip(gradient, gates, strict=True)
        )
        of_maps = first[0] * first[1]
        for part, m in others:
            of_maps.addcmul_(part, m)
        # P x (B, C, H, W) -> P x (B, C) -> (P, B, C)
        return of_maps, torch.stack([(part * maps).sum((2, 3)) for part in gradient])


class ResidualOSME(nn.Module):
    """OSME in the attention slot of a residual block: gates F(x) before the shortcut is added.

    The unchanged block adds its shortcut by broadcasting and applies its activation, and so returns
    ``U_p = ReLU(m_p * F(x) + shortcut)`` (Eq. 2 as in the released code) with the parts as leading dimension.

    Args:
        osme: The gates.
        own: Former content of the slot, such as an SE gate, or None; the trunk keeps using it.
        drop_path: Stochastic depth of the block, which would otherwise take the parts for the batch.
        keep_trunk: Whether a later stage needs the trunk's map.
    """

    def __init__(
        self, osme: OSME, own: nn.Module | None, drop_path: nn.Module | None, keep_trunk: bool
    ) -> None:
        super().__init__()
        self.osme = osme
        self.own = own if keep_trunk else None
        self.drop_path = drop_path
        self.keep_trunk = keep_trunk

    def forward(self, residual: Tensor) -> Tensor:
        """Gate F(x) (B, C, H, W) to ([1 +] P, B, C, H, W), where the trunk's own residual comes first if it is kept."""
        if self.drop_path is not None:
            residual = self.drop_path(residual)
        # under autocast the gates are float32, in which all that follows would take twice the memory
        gates = self.osme.gates(residual).to(residual).transpose(0, 1)  # (B, P, C) -> (P, B, C)
        if self.keep_trunk and self.own is None:
            gates = torch.cat((torch.ones_like(gates[:1]), gates))  # -> (1 + P, B, C)
        gated = gate(residual, gates)
        if self.own is None:
            return gated
        own: Tensor = self.own(residual)
        return torch.cat((own[None], gated))  # (B, C, H, W) and (P, B, C, H, W) -> (1 + P, B, C, H, W)

    def split(self, block_output: Tensor) -> tuple[Tensor, Tensor]:
        """Split the block's output into the trunk's map (B, C, H, W) and the attention features (B, P, C, H, W).

        If the trunk's map is not kept, no stage follows and the first result has no meaning.
        """
        if not self.keep_trunk:
            return block_output, block_output.transpose(0, 1)  # (P, B, C, H, W) -> (B, P, C, H, W)
        # split's gradient is a concatenation, which is cheaper than that of two slices
        trunk, parts = block_output.split((1, self.osme.num_parts))  # (1 + P, ...) -> (1, ...) and (P, ...)
        return trunk.squeeze(0), parts.transpose(0, 1)  # (B, C, H, W) and (B, P, C, H, W)
