"""One-squeeze multi-excitation: P channel gates that turn one map into P attention features (Eq. 1 and 2)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from crossx.errors import UsageError


class OSME(nn.Module):
    """P gates over the channels of one map, their weights stacked over the parts.

    Eq. 1: ``m_p = sigmoid(W2_p ReLU(W1_p z))`` with ``z = GAP(U)``; Eq. 2: ``U_p = m_p * U``. The biases are those
    of the released code; the paper prints none.

    Args:
        channels: C.
        num_parts: P, the number of excitation modules.
        reduction: C over the hidden units of a gate (SE uses 16; the paper gives none).

    Raises:
        UsageError: If ``num_parts`` or ``reduction`` is not positive, or ``reduction`` exceeds C.
    """

    def __init__(self, channels: int, num_parts: int, reduction: int = 16) -> None:
        super().__init__()
        if num_parts < 1:
            raise UsageError(f"num_parts must be at least 1, not {num_parts}.")
        if not 1 <= reduction <= channels:
            raise UsageError(
                f"reduction must lie between 1 and the stage's {channels} channels, not {reduction}."
            )
        hidden = channels // reduction
        self.num_parts = num_parts
        self.squeeze_weight = nn.Parameter(torch.empty(num_parts, hidden, channels))
        self.squeeze_bias = nn.Parameter(torch.empty(num_parts, hidden))
        self.excite_weight = nn.Parameter(torch.empty(num_parts, channels, hidden))
        self.excite_bias = nn.Parameter(torch.empty(num_parts, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every gate as ``nn.Linear`` draws its own: uniform within 1 / sqrt(inputs)."""
        for weight, bias in (
            (self.squeeze_weight, self.squeeze_bias),
            (self.excite_weight, self.excite_bias),
        ):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def gates(self, maps: Tensor) -> Tensor:
        """Return the gates m_p, (B, P, C), of maps (B, C, H, W)."""
        z = maps.mean((2, 3))
        hidden = F.relu(torch.einsum("bc,phc->bph", z, self.squeeze_weight) + self.squeeze_bias)
        return torch.sigmoid(torch.einsum("bph,pch->bpc", hidden, self.excite_weight) + self.excite_bias)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the attention features U_p, (B, P, C, H, W), of maps (B, C, H, W)."""
        return gate(maps, self.gates(maps).transpose(0, 1)).transpose(0, 1)


def gate(maps: Tensor, gates: Tensor) -> Tensor:
    """Return ``m_p * U``, (P, B, C, H, W), of maps U (B, C, H, W) and gates m_p (P, B, C).

    A plain product, whose gradient is taken part by part: autograd's own fills two tensors of the result's size first.
    """
    if torch.compiler.is_compiling():
        return gates[..., None, None] * maps
    gated: Tensor = _Gate.apply(maps, gates)
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(maps, gates)
        return gates[..., None, None] * maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        maps, gates = ctx.saved_tensors
        first, *others = (
            (part, m[..., None, None].to(part)) for part, m in zip(gradient, gates, strict=True)
        )
        of_maps = first[0] * first[1]
        for part, m in others:
            of_maps.addcmul_(part, m)
        return of_maps, torch.stack([(part * maps).sum((2, 3)) for part in gradient])


class ResidualOSME(nn.Module):
    """OSME in the attention slot of a residual block: gates F(x) before the shortcut is added.

    The block adds its shortcut and its activation to whatever the slot returns, by broadcasting, so that
    ``U_p = ReLU(m_p * F(x) + shortcut)`` (the released reading of Eq. 2) comes out of the unchanged block with the
    parts as a leading dimension.

    Args:
        osme: The gates.
        own: The slot's former content (an SE gate, say), None where the slot was empty. It stays on the trunk's way.
        drop_path: The block's stochastic depth, which would otherwise see the parts as the batch.
        keep_trunk: Whether a later stage needs the trunk's own map.
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
        """Return the gated residuals of F(x) (B, C, H, W), the trunk's own first if kept: ([1 +] P, B, C, H, W)."""
        if self.drop_path is not None:
            residual = self.drop_path(residual)
        gates = self.osme.gates(residual).transpose(0, 1)
        if self.keep_trunk and self.own is None:
            gates = torch.cat((torch.ones_like(gates[:1]), gates))
        gated = gate(residual, gates)
        if self.own is None:
            return gated
        own: Tensor = self.own(residual)
        return torch.cat((own[None], gated))

    def split(self, block_output: Tensor) -> tuple[Tensor, Tensor]:
        """Part what the block made of ``forward``'s result into the trunk's map (B, C, H, W) and U_p (B, P, C, H, W).

        Where the trunk's map is not kept nothing comes after it, and the first of the two has no meaning.
        """
        if not self.keep_trunk:
            return block_output, block_output.transpose(0, 1)
        # One split: its gradient is one concatenation, that of two slices a sum of maps filled with zeros.
        trunk, parts = block_output.split((1, self.osme.num_parts))
        return trunk.squeeze(0), parts.transpose(0, 1)
