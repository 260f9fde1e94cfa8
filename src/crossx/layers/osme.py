"""One-squeeze multi-excitation (OSME): P channel gates turn one map into P attention features (Eq. 1 and 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from crossx.distributed import at_least_float32
from crossx.errors import UsageError, check_choice

Gates: TypeAlias = Literal["sigmoid", "competing", "spatial"]

SHARPNESS = 10.0
MAX_SHARPNESS = 10_000
"""Far beyond a choice of one gate per channel; scores times much more are not finite."""


@dataclass(frozen=True)
class Gating:
    """How the scores ``s_p = W2_p ReLU(W1_p z)`` of the excitations become gates.

    Attributes:
        gates: ``sigmoid``: ``m_p = sigmoid(s_p)`` (Eq. 1). ``competing``: ``m_p = softmax over p of
            (sharpness * s_p)``, so that the gates of a channel add up to 1. ``spatial``: those of ``sigmoid``, for maps
            that are divided among the parts by ``PartAssignment``. The last two are not in the paper.
        sharpness: Factor of the scores of competing gates; the larger it is, the fewer channels are shared.
        background: Whether one more gate, the last, competes for channels that no part takes.

    Raises:
        UsageError: If the options contradict each other.
    """

    gates: Gates = "sigmoid"
    sharpness: float = SHARPNESS
    background: bool = False

    def __post_init__(self) -> None:
        check_choice("gates", self.gates, get_args(Gates))
        if not 0 < self.sharpness <= MAX_SHARPNESS:
            raise UsageError(
                f"gate_sharpness must be above 0 and at most {MAX_SHARPNESS}, not {self.sharpness}."
            )
        if self.gates != "competing" and self.sharpness != SHARPNESS:
            raise UsageError(
                f"gate_sharpness {self.sharpness:g} needs competing gates: --model.gates competing."
            )
        if self.background and self.gates == "spatial":
            raise UsageError("background: spatial gates have one already; leave it out.")
        if self.background and self.gates != "competing":
            raise UsageError("background needs competing gates: --model.gates competing.")


class OSME(nn.Module):
    """P gates over the channels of one map, with the weights of all parts stacked.

    Eq. 1: ``m_p = sigmoid(W2_p ReLU(W1_p z))`` with ``z = GAP(U)``; Eq. 2: ``U_p = m_p * U``. The biases are those
    of the released code; the paper prints none.

    Args:
        channels: C.
        num_parts: P, the number of excitation modules.
        reduction: Channels per hidden unit of a gate, 1 to C (SE uses 16; the paper gives none).
        gating: How scores become gates; default: Eq. 1. There are M of them: P, or P + 1 with a background.
    """

    def __init__(
        self, channels: int, num_parts: int, reduction: int = 16, gating: Gating | None = None
    ) -> None:
        super().__init__()
        if num_parts < 1:
            raise UsageError(f"num_parts must be at least 1, not {num_parts}.")
        if not 1 <= reduction <= channels:
            raise UsageError(
                f"reduction must be between 1 and the stage's {channels} channels, not {reduction}."
            )
        hidden = channels // reduction
        self.gating = gating or Gating()
        self.num_parts = num_parts
        count = num_parts + self.gating.background
        if self.gating.gates == "competing" and count < 2:
            raise UsageError(
                "competing gates need num_parts 2 or more, or a background: --model.background true."
            )
        self.squeeze_weight = nn.Parameter(torch.empty(count, hidden, channels))
        self.squeeze_bias = nn.Parameter(torch.empty(count, hidden))
        self.excite_weight = nn.Parameter(torch.empty(count, channels, hidden))
        self.excite_bias = nn.Parameter(torch.empty(count, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every gate like ``nn.Linear``: uniform within 1 / sqrt(inputs)."""
        for layer in ("squeeze", "excite"):
            bound = 1 / math.sqrt(self.get_parameter(f"{layer}_weight").shape[-1])
            for name in ("weight", "bias"):
                nn.init.uniform_(self.get_parameter(f"{layer}_{name}"), -bound, bound)

    def gates(self, maps: Tensor) -> Tensor:
        """Return the gates m_p, (B, M, C), for maps (B, C, H, W); that of the background, if any, is the last."""
        z = maps.mean((2, 3))  # (B, C, H, W) -> (B, C)
        # (B, C) -> (B, M, hidden) -> (B, M, C)
        hidden = F.relu(torch.einsum("bc,phc->bph", z, self.squeeze_weight) + self.squeeze_bias)
        scores = torch.einsum("bph,pch->bpc", hidden, self.excite_weight) + self.excite_bias
        if self.gating.gates != "competing":
            return torch.sigmoid(scores)
        return (self.gating.sharpness * at_least_float32(scores)).softmax(1).to(scores.dtype)

    def excite(self, maps: Tensor, gates: Tensor) -> Tensor:
        """Return the attention features U_p, (B, P, C, H, W), for maps (B, C, H, W) and their gates (B, M, C)."""
        # gates (B, M, C) -> (P, B, C); result (P, B, C, H, W) -> (B, P, C, H, W)
        # under autocast the gates are float32, in which all that follows would take twice the memory
        return gate(maps, gates[:, : self.num_parts].to(maps).transpose(0, 1)).transpose(0, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Return the attention features U_p, (B, P, C, H, W), for maps (B, C, H, W), in their type."""
        return self.excite(maps, self.gates(maps))


def gate_maps(maps: Tensor, gates: Tensor) -> Tensor:
    """Return ``A_p = mean over c of m_pc ReLU(U_c)``, where each gate looks, (B, M, H, W).

    Args:
        maps: U, (B, C, H, W). The ReLU only changes maps with negative values, as of a ViT, whose channels would
            otherwise cancel.
        gates: m_p, (B, M, C).
    """
    active = F.relu(at_least_float32(maps)).flatten(2)  # (B, C, H, W) -> (B, C, H*W)
    with torch.autocast(maps.device.type, enabled=False):
        means = at_least_float32(gates) @ active / maps.shape[1]  # (B, M, C) and (B, C, H*W) -> (B, M, H*W)
    return means.view(*gates.shape[:2], *maps.shape[2:])  # -> (B, M, H, W)


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
