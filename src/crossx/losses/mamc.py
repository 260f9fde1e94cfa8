"""The multi-attention multi-class constraint, MAMC (Sun et al., ECCV 2018, https://arxiv.org/abs/1806.05372)."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, gather_over_ranks, world_size
from crossx.errors import check_choice

MAMCAverage: TypeAlias = Literal["pairs", "features", "positives"]


def mamc_terms(
    features: Tensor,
    targets: Tensor,
    normalize: bool = True,
    average: MAMCAverage = "pairs",
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Return the three N-pair terms of MAMC, scalars: ``sasc``, ``sadc`` and ``dasc``.

    For each anchor, the other features of the batch form four sets: same attention same class (SASC), same attention
    different class (SADC), different attention same class (DASC) and different attention different class (DADC). Each
    term sums ``log(1 + sum over negatives f- of exp(f f- - f f+))`` over the anchors f and their positives f+:

    - ``sasc``: positives SASC, negatives all others;
    - ``sadc``: positives SADC, negatives DADC;
    - ``dasc``: positives DASC, negatives DADC.

    An anchor belongs to none of its own sets; the other parts of its image belong to its DASC. An empty set adds
    nothing. All positives of an anchor share one sum over negatives, so time and memory are those of the (B P)^2
    products.

    In a process group, the anchors are the rank's own, and positives and negatives come from all ranks (one all-reduce
    of the features). The result is the rank's part of the loss of the whole batch (``crossx.distributed``).

    Args:
        features: Part features f_p of a batch, (B, P, D).
        targets: int64 (B,).
        normalize: Whether to normalise the features to length ``scale`` first.
        average: Divisor: ``pairs``: N = B / 2, the pairs of the batch, as printed; ``features``: B P, the anchors;
            ``positives``: B P, and each anchor's sum by the number of its positives, so that the terms have the same
            weight in every batch.
        scale: Length of the normalised features. At length 1 the lowest loss is that of features that are all alike.

    Raises:
        UsageError: For an unknown average.
    """
    check_choice("average", average, get_args(MAMCAverage))
    features = at_least_float32(features)
    if normalize:
        features = scale * F.normalize(features, dim=2)
    others, first = gather_over_ranks(features)  # (B, P, D) -> (N, P, D), N over all ranks
    labels, _ = gather_over_ranks(targets)
    batch, parts, _ = features.shape
    # autocast would round the products to half precision
    with torch.autocast(features.device.type, enabled=False):
        products = torch.einsum("ipd,jqd->ipjq", features, others)  # (B, P, D), (N, P, D) -> (B, P, N, P)
    index = torch.arange(first, first + batch, device=targets.device)
    itself = (index[:, None] == torch.arange(len(labels), device=targets.device))[
        :, None, :, None
    ]  # (B, 1, N, 1)
    same_class = (targets[:, None] == labels)[:, None, :, None]  # (B, 1, N, 1)
    same_part = torch.eye(parts, dtype=torch.bool, device=targets.device)[None, :, None]  # (1, P, 1, P)
    dadc = ~same_class & ~same_part
    factor = world_size() / (len(labels) / 2 if average == "pairs" else len(labels) * parts)
    sets = {
        "sasc": (same_class & same_part & ~itself, ~(same_class & same_part)),
        "sadc": (~same_class & same_part, dadc),
        "dasc": (same_class & ~same_part, dadc),
    }
    by_anchor = average == "positives"
    return {name: factor * _n_pair(products, *chosen, by_anchor) for name, chosen in sets.items()}


def mamc_loss(
    features: Tensor,
    targets: Tensor,
    normalize: bool = True,
    average: MAMCAverage = "pairs",
    scale: float = 1.0,
) -> Tensor:
    """Return the MAMC loss, a scalar: the sum of ``mamc_terms``, with the same arguments."""
    return torch.stack(list(mamc_terms(features, targets, normalize, average, scale).values())).sum()


def _n_pair(products: Tensor, positives: Tensor, negatives: Tensor, by_anchor: bool) -> Tensor:
    """Sum ``log(1 + sum_n exp(s_n - s_p))`` over anchors and positives p, for products s (B, P, N, P).

    With ``by_anchor``, the mean over an anchor's positives takes the place of their sum.
    """
    # the lowest finite number: with -inf, the gradient of a row without negatives would be undefined
    lowest = torch.finfo(products.dtype).min
    negative = products.masked_fill(~negatives, lowest).flatten(2).logsumexp(2)  # (B, P, N, P) -> (B, P)
    negative = negative[..., None, None]  # -> (B, P, 1, 1)
    losses = F.softplus(negative - products).masked_fill(~positives, 0).sum((2, 3))  # (B, P, N, P) -> (B, P)
    if by_anchor:
        losses = losses / positives.expand_as(products).sum((2, 3)).clamp(min=1)  # (B, P, N, P) -> (B, P)
    return losses.sum()


class MAMCLoss(nn.Module):
    """``mamc_loss`` as a module."""

    def __init__(self, normalize: bool = True, average: MAMCAverage = "pairs", scale: float = 1.0) -> None:
        super().__init__()
        self.normalize = normalize
        self.average: MAMCAverage = average
        self.scale = scale

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the MAMC loss, a scalar, of part features (B, P, D) and int64 targets (B,)."""
        return mamc_loss(features, targets, self.normalize, self.average, self.scale)

    def terms(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the three terms, scalars, of part features (B, P, D) and int64 targets (B,)."""
        return mamc_terms(features, targets, self.normalize, self.average, self.scale)
