"""The cross-category cross-semantic regularizer, C3S (Eq. 3 and 4)."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, sum_over_ranks, world_size

C3SForm: TypeAlias = Literal["paper", "released"]


def part_correlations(features: Tensor) -> Tensor:
    """Return S (Eq. 3), (P, P), of part features (B, P, C).

    As printed, F_p^T F_q is an N x N matrix; the released code takes the mean of its entries. With unit features
    that mean is the scalar product of two batch means, ``S_pq = <mean_n f_p, mean_n f_q>``, linear in the batch.

    In a process group S is that of the global batch: one all-reduce of the (P, C) sums and of the count, through
    which gradients flow, so that DDP's averaged gradients equal those of one process on the whole batch.
    """
    unit = F.normalize(at_least_float32(features), dim=2)
    total = unit.sum(0)
    count: int | Tensor = len(unit)
    if world_size() > 1:
        exchanged = sum_over_ranks(torch.cat((total.flatten(), total.new_full((1,), len(unit)))))
        total, count = exchanged[:-1].view_as(total), exchanged[-1].detach()
    mean = total / count
    # Not a matrix product, which autocast would round to half precision.
    return (mean[:, None] * mean[None]).sum(2)


def c3s_loss(features: Tensor, form: C3SForm = "paper", diagonal_weight: float = 2.0) -> Tensor:
    """Return the C3S loss, a scalar, of part features (B, P, C); they need not be normalised.

    Args:
        features: Pooled attention features f_p of a batch.
        form: ``paper``: ``|S|_F^2 / 2 - w |diag S|^2`` (Eq. 4). ``released``:
            ``sum_p (1 - S_pp) + sum_{p<q} S_pq``, the code of https://github.com/cswluo/CrossX.
        diagonal_weight: w of the paper's form: 2 as printed; 1 if the factor 1/2 was meant for both terms.
    """
    return correlation_loss(part_correlations(features), form, diagonal_weight)


def correlation_loss(s: Tensor, form: C3SForm = "paper", diagonal_weight: float = 2.0) -> Tensor:
    """Return the C3S loss, a scalar, of S (P, P); the other arguments are those of ``c3s_loss``."""
    diagonal = s.diagonal()
    if form == "released":
        return (1 - diagonal).sum() + s.triu(1).sum()
    return s.square().sum() / 2 - diagonal_weight * diagonal.square().sum()


def summarize_correlations(s: Tensor) -> dict[str, Tensor]:
    """Return the means of S (P, P) by which it is followed, detached scalars.

    ``diagonal``: how alike one excitation's features are over the images, 1 where all have one direction.
    ``off_diagonal``: how alike those of two excitations are; left out for P = 1. C3S raises the first and lowers the
    second.
    """
    s = s.detach()
    total, parts = s.trace(), len(s)
    means = {"diagonal": total / parts}
    if parts > 1:
        means["off_diagonal"] = (s.sum() - total) / (parts * (parts - 1))
    return means


class C3SLoss(nn.Module):
    """``c3s_loss`` with its options fixed."""

    def __init__(self, form: C3SForm = "paper", diagonal_weight: float = 2.0) -> None:
        super().__init__()
        self.form: C3SForm = form
        self.diagonal_weight = diagonal_weight

    def forward(self, features: Tensor) -> Tensor:
        """Return the C3S loss, a scalar, of part features (B, P, C)."""
        return self.of_correlations(part_correlations(features))

    def of_correlations(self, s: Tensor) -> Tensor:
        """Return the C3S loss, a scalar, of S (P, P), where that is known already."""
        return correlation_loss(s, self.form, self.diagonal_weight)
