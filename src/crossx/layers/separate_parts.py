"""Gates and merged features for inference, with one map per part: runtimes are slow on five dimensions.

The layers compute what ``OSME``, ``ResidualOSME`` and ``MergedFeatures.pooled`` do in evaluation mode, up to rounding,
from operators on (B, C, H, W) that every runtime optimises: convolutions, products, sums and pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32
from crossx.layers.feature_pyramid import KERNEL, Interpolation, MergedFeatures, tap_windows
from crossx.layers.osme import OSME, ResidualOSME


class PartMaps:
    """P maps (B, C, H, W) that a residual block treats as one: it adds its shortcut to each and activates each.

    Args:
        maps: The maps.
    """

    def __init__(self, maps: Sequence[Tensor]) -> None:
        self.maps = tuple(maps)

    def __add__(self, shortcut: Tensor) -> PartMaps:
        return PartMaps([part + shortcut for part in self.maps])

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Tensor],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> PartMaps:
        """Apply a function of one map, such as an activation, to each."""
        parts, *others = args
        return PartMaps([function(part, *others, **(kwargs or {})) for part in parts.maps])


class SeparateGates(nn.Module):
    """The gates of ``OSME`` as 1x1 convolutions.

    Args:
        osme: The gates, whose weights are copied.
    """

    def __init__(self, osme: OSME) -> None:
        super().__init__()
        self.gating, self.num_parts = osme.gating, osme.num_parts
        # (M, hidden, C) -> (M*hidden, C)
        self.squeeze = convolution(osme.squeeze_weight.flatten(0, 1), osme.squeeze_bias.flatten())
        self.excite = nn.ModuleList(
            convolution(weight, bias)
            for weight, bias in zip(osme.excite_weight, osme.excite_bias, strict=True)
        )

    def forward(self, maps: Tensor) -> list[Tensor]:
        """Return the gates m_p of the parts, P tensors (B, C, 1, 1), for maps (B, C, H, W)."""
        z = F.adaptive_avg_pool2d(maps, 1)  # (B, C, H, W) -> (B, C, 1, 1)
        # (B, C, 1, 1) -> (B, M*hidden, 1, 1) -> M x (B, hidden, 1, 1) -> M x (B, C, 1, 1)
        hidden = F.relu(self.squeeze(z)).chunk(len(self.excite), 1)
        scores = [excite(own) for excite, own in zip(self.excite, hidden, strict=True)]
        if self.gating.gates == "sigmoid":
            return [torch.sigmoid(score) for score in scores]
        sharp = self.gating.sharpness * at_least_float32(torch.stack(scores, 1))  # -> (B, M, C, 1, 1)
        gates = sharp.softmax(1).to(maps.dtype)
        return list(gates.unbind(1)[: self.num_parts])  # -> P x (B, C, 1, 1)


class SeparateOSME(nn.Module):
    """``OSME`` or ``ResidualOSME`` for inference.

    Args:
        source: The layer, whose weights are copied.
    """

    def __init__(self, source: OSME | ResidualOSME) -> None:
        super().__init__()
        osme = source.osme if isinstance(source, ResidualOSME) else source
        self.of_gates = SeparateGates(osme)
        self.own = source.own if isinstance(source, ResidualOSME) else None
        self.keep_trunk = isinstance(source, ResidualOSME) and source.keep_trunk

    def gates(self, maps: Tensor) -> list[Tensor]:
        """Return the gates m_p, P tensors (B, C, 1, 1), for maps (B, C, H, W)."""
        gates: list[Tensor] = self.of_gates(maps)
        return gates

    def excite(self, maps: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the attention features, P maps (B, C, H, W), for maps (B, C, H, W) and their gates."""
        return tuple(maps * gate for gate in gates)

    def forward(self, residual: Tensor) -> PartMaps:
        """Gate F(x), (B, C, H, W), to [1 +] P maps, of which the first is the trunk's if it is kept."""
        trunk = () if not self.keep_trunk else (residual if self.own is None else self.own(residual),)
        return PartMaps((*trunk, *self.excite(residual, self.gates(residual))))

    def split(self, block_output: PartMaps) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Split the block's output into the trunk's map and the attention features, P maps (B, C, H, W)."""
        return block_output.maps[0], block_output.maps[self.keep_trunk :]


class MergedLogits(nn.Module):
    """Logits of the merged features, ``head(MergedFeatures.pooled(...))`` with fixed batch-norm statistics.

    Everything from the maps to the logits is linear, so the batch norm and, unless there are more classes than
    channels, the head are multiplied into the kernels: for ResNet-50 with 200 classes 4 million numbers instead of 19.

    Args:
        merge: The merged features.
        head: Its classifier.
        previous_size: (H, W) of the maps of stage L-1.
        last_size: (h, w) of those of stage L.
    """

    def __init__(
        self,
        merge: MergedFeatures,
        head: nn.Linear,
        previous_size: tuple[int, int],
        last_size: tuple[int, int],
    ) -> None:
        super().__init__()
        parts, norm = merge.num_parts, merge.norm
        kind = merge.interpolation
        self.taps_of_previous = TapMaps(previous_size, previous_size, kind).to(head.weight)
        self.taps_of_last = TapMaps(last_size, previous_size, kind).to(head.weight)
        self.reduce = nn.ModuleList(convolution(own) for own in merge.reduce.weight.chunk(parts))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)  # (P*C,)
        shift = norm.bias.double() - norm.running_mean.double() * scale
        kernel = merge.smooth.weight.double() * scale[:, None, None, None]  # (P*C, C, 3, 3)
        weight, bias = head.weight.double(), head.bias.double()
        if head.out_features <= kernel.shape[1]:
            # (K, P, C) x (P, C, C, 3, 3) -> (K, P, C, 3, 3) -> (K, P*C, 3, 3)
            by_part = weight.unflatten(1, (parts, -1)), kernel.unflatten(0, (parts, -1))
            kernel = torch.einsum("kpd,pdcij->kpcij", *by_part).flatten(1, 2)
            layers = [convolution(kernel, bias + weight @ shift)]
        else:
            layers = [convolution(kernel, shift, groups=parts), convolution(weight, bias)]
        self.classify = nn.Sequential(*layers).to(head.weight)

    def forward(self, previous: Sequence[Tensor], last: Sequence[Tensor]) -> Tensor:
        """Return logits (B, K, 1, 1) for U^{L-1}, P maps (B, C, H, W), and U^L, P maps (B, C', h, w)."""
        pooled = [self.taps_of_previous.pool(own) for own in previous]
        # K1 commutes with mix, which is cheaper on fewer channels
        reduced = [reduce(self.taps_of_last.pool(own)) for own, reduce in zip(last, self.reduce, strict=True)]
        # P x (B, C, 3, 3) -> (B, P*C, 3, 3)
        taps = self.taps_of_previous.mix(torch.cat(pooled, 1)) + self.taps_of_last.mix(torch.cat(reduced, 1))
        logits: Tensor = self.classify(taps)  # -> (B, K, 1, 1)
        return logits


class TapMaps(nn.Module):
    """``tap_means`` of maps of one size, as maps of 3 x 3.

    Without resizing, the window of a tap is all rows, or all but the first or last, as in a pooling with one row of
    padding. If resizing mixes only these, as it does for a whole number of times the size, pooling is followed by a
    matrix of 9 x 9; otherwise, the maps are multiplied by all windows.

    Args:
        source: (h, w) of the maps.
        target: (H, W) to which ``MergedFeatures`` would resize them.
        interpolation: How.
    """

    weights: Tensor

    def __init__(
        self, source: tuple[int, int], target: tuple[int, int], interpolation: Interpolation
    ) -> None:
        super().__init__()
        self.source = source
        exact = torch.zeros((), dtype=torch.double)
        wanted = [tap_windows(*sizes, interpolation, exact) for sizes in zip(source, target, strict=True)]
        pooled = [tap_windows(size, size, interpolation, exact) for size in source]
        mixes = [own @ torch.linalg.pinv(given) for own, given in zip(wanted, pooled, strict=True)]
        # a pooling may pad by at most half its size
        self.pools = min(source) > 1 and all(
            torch.allclose(mix @ given, own) for mix, given, own in zip(mixes, pooled, wanted, strict=True)
        )
        rows, cols = mixes if self.pools else wanted
        # (3, h), (3, w) -> (9, h*w) -> (h*w, 9); of pooled maps, h and w are 3
        self.register_buffer("weights", torch.kron(rows, cols).T.float())
        self.mixes = not (self.pools and torch.allclose(self.weights, torch.eye(KERNEL**2), atol=1e-6))

    def pool(self, maps: Tensor) -> Tensor:
        """Return maps (B, C, h, w) pooled for ``mix``, (B, C, 3, 3), or unchanged."""
        if not self.pools:
            return maps
        height, width = self.source
        # the padding adds zeros: (B, C, h, w) -> (B, C, 3, w) -> (B, C, 3, 3)
        return F.avg_pool2d(F.avg_pool2d(maps, (height, 1), 1, (1, 0)), (1, width), 1, (0, 1))

    def mix(self, pooled: Tensor) -> Tensor:
        """Return the mean over the window of each tap, (B, C, 3, 3), for the result of ``pool``."""
        if not self.mixes:
            return pooled
        # (B, C, h, w) -> (B, C, h*w) -> (B, C, 9) -> (B, C, 3, 3)
        mixed: Tensor = (pooled.flatten(2) @ self.weights).unflatten(2, (KERNEL, KERNEL))
        return mixed

    def forward(self, maps: Tensor) -> Tensor:
        """Return the mean over the window of each tap, (B, C, 3, 3), for maps (B, C, h, w)."""
        return self.mix(self.pool(maps))


def convolution(weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> nn.Conv2d:
    """Return a convolution with copies of weights (C', C[, h, w]) and biases (C')."""
    kernel = weight if weight.ndim == 4 else weight[..., None, None]
    made = nn.Conv2d(
        kernel.shape[1] * groups,
        len(kernel),
        (kernel.shape[2], kernel.shape[3]),
        groups=groups,
        bias=bias is not None,
        dtype=kernel.dtype,
        device=kernel.device,
    )
    with torch.no_grad():
        made.weight.copy_(kernel)
        if bias is not None and made.bias is not None:
            made.bias.copy_(bias)
    return made
