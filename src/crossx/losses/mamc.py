"""The multi-attention multi-class constraint, MAMC (Sun et al., ECCV 2018, https://arxiv.org/abs/1806.05372)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, gather_over_ranks, world_size

MAMCAverage: TypeAlias = Literal["pairs", "features"]


def mamc_terms(
    features: Tensor, targets: Tensor, normalize: bool = True, average: MAMCAverage = "pairs"
) -> dict[str, Tensor]:
    """Return the three N-pair terms of MAMC, scalars: ``sasc``, ``sadc`` and ``dasc``.

    The other features of the batch fall into four sets by the anchor: same attention same class (SASC), same attention
    different class (SADC), and so on (DASC, DADC). Each term sums, over the anchors f and its positives f+,
    ``log(1 + sum over negatives f- of exp(f f- - f f+))``:

    - ``sasc``: SASC against all the rest;
    - ``sadc``: SADC against DADC;
    - ``dasc``: DASC against DADC.

    A feature is in none of its own sets; an image's other parts are in its DASC. An empty set adds nothing. The sum
    over negatives is one for all positives of an anchor, so time and memory are those of the (B P)^2 products.

    In a process group anchors are the rank's own, positives and negatives every rank's (one all-reduce of the
    features), and this is the rank's part of the loss of the whole batch (``crossx.distributed``).

    Args:
        features: Part features f_p of a batch, (B, P, D).
        targets: int64 (B,).
        normalize: Whether features are brought to length 1 first.
        average: ``pairs``: divided by N = B / 2, the pairs of the batch, as printed; ``features``: by B P, the anchors.
    """
    features = at_least_float32(features)
    if normalize:
        features = F.normalize(features, dim=2)
    others, first = gather_over_ranks(features)
    labels, _ = gather_over_ranks(targets)
    batch, parts, _ = features.shape
    # autocast would round the products to half precision
    with torch.autocast(features.device.type, enabled=False):
        products = torch.einsum("ipd,jqd->ipjq", features, others)
    index = torch.arange(first, first + batch, device=targets.device)
    itself = (index[:, None] == torch.arange(len(labels), device=targets.device))[:, None, :, None]
    same_class = (targets[:, None] == labels)[:, None, :, None]
    same_part = torch.eye(parts, dtype=torch.bool, device=targets.device)[None, :, None]
    dadc = ~same_class & ~same_part
    scale = world_size() / (len(labels) / 2 if average == "pairs" else len(labels) * parts)
    return {
        "sasc": scale * _n_pair(products, same_class & same_part & ~itself, ~(same_class & same_part)),
        "sadc": scale * _n_pair(products, ~same_class & same_part, dadc),
        "dasc": scale * _n_pair(products, same_class & ~same_part, dadc),
    }


def mamc_loss(
    features: Tensor, targets: Tensor, normalize: bool = True, average: MAMCAverage = "pairs"
) -> Tensor:
    """Return the MAMC loss, a scalar: the sum of ``mamc_terms``, whose arguments it takes."""
    return torch.stack(list(mamc_terms(features, targets, normalize, average).values())).sum()


def _n_pair(products: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Sum ``log(1 + sum_n exp(s_n - s_p))`` over anchors and positives p of products s (B, P, N, P)."""
    # the lowest finite number: with -inf a row without negatives would have no gradient
    lowest = torch.finfo(products.dtype).min
    negative = products.masked_fill(~negatives, lowest).flatten(2).logsumexp(2)[..., None, None]
    return F.softplus(negative - products).masked_fill(~positives, 0).sum()


class MAMCLoss(nn.Module):
    """``mamc_loss`` with its options fixed."""

    def __init__(self, normalize: bool = True, average: MAMCAverage = "pairs") -> None:
        super().__init__()
        self.normalize = normalize
        self.average: MAMCAverage = average

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return the MAMC loss, a scalar, of part features (B, P, D) and int64 targets (B,)."""
        return mamc_loss(features, targets, self.normalize, self.average)

    def terms(self, features: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return its three terms, scalars."""
        return mamc_terms(features, targets, self.normalize, self.average)
