"""The cross-category cross-semantic regularizer, C3S (Eq. 3 and 4)."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, sum_over_ranks, world_size
from crossx.errors import check_choice

C3SForm: TypeAlias = Literal["paper", "released"]


def part_correlations(features: Tensor) -> Tensor:
    """Return the correlation matrix S of the parts (Eq. 3), (P, P), for part features (B, P, C).

    As printed, F_p^T F_q is an N x N matrix; the released code averages its entries. For unit vectors this average is
    the scalar product of two batch means, ``S_pq = <mean_n f_p, mean_n f_q>``, so the cost is linear in the batch size.

    In a process group, S is computed on the global batch with one differentiable all-reduce of the (P, C) sums and
    the count. DDP's averaged gradients then equal those of a single process on the whole batch.
    """
    unit = F.normalize(at_least_float32(features), dim=2)
    total = unit.sum(0)  # (B, P, C) -> (P, C)
    count: int | Tensor = len(unit)
    if world_size() > 1:
        # (P, C) and the count -> (P*C + 1,)
        exchanged = sum_over_ranks(torch.cat((total.flatten(), total.new_full((1,), len(unit)))))
        total, count = exchanged[:-1].view_as(total), exchanged[-1].detach()  # (P*C,) -> (P, C)
    mean = total / count
    # no matrix product, which autocast would round to half precision: (P, 1, C) * (1, P, C) -> (P, P)
    return (mean[:, None] * mean[None]).sum(2)


def centre_correlations(s: Tensor) -> Tensor:
    """Return the correlations of centred part features, (P, P), for S (P, P): ``H S H`` with ``H = I - 1 1^T / P``.

    These are the entries of Eq. 3 for ``f_p - f``, with f the mean of the unit vectors over the images of the batch and
    the parts: ``S_pq = <mean_n f_p - f, mean_n f_q - f>``. Rows and columns add up to 0, so entries off the diagonal
    can be negative; adding a number to all entries of S, as by what all features have in common, changes nothing.
    Exact on several ranks, as S is.
    """
    return s - s.mean(0, keepdim=True) - s.mean(1, keepdim=True) + s.mean()


def c3s_loss(
    features: Tensor, form: C3SForm = "paper", diagonal_weight: float = 2.0, centred: bool = False
) -> Tensor:
    """Return the C3S loss, a scalar, of part features (B, P, C), which are normalised first.

    Args:
        features: Pooled attention features f_p of a batch.
        form: ``paper``: ``|S|_F^2 / 2 - w |diag S|^2`` (Eq. 4). ``released``:
            ``sum_p (1 - S_pp) + sum_{p<q} S_pq``, as in https://github.com/cswluo/CrossX.
        diagonal_weight: w in the paper's form: 2 as printed; 1 if the factor 1/2 was meant for both terms.
        centred: Whether S is that of centred features, see ``centre_correlations``; not in the paper.
    """
    s = part_correlations(features)
    return correlation_loss(centre_correlations(s) if centred else s, form, diagonal_weight)


def correlation_loss(s: Tensor, form: C3SForm = "paper", diagonal_weight: float = 2.0) -> Tensor:
    """Return the C3S loss, a scalar, of S (P, P); for the other arguments see ``c3s_loss``."""
    check_choice("form", form, get_args(C3SForm))
    diagonal = s.diagonal()  # (P, P) -> (P,)
    if form == "released":
        return (1 - diagonal).sum() + s.triu(1).sum()
    return s.square().sum() / 2 - diagonal_weight * diagonal.square().sum()


def summarize_correlations(s: Tensor) -> dict[str, Tensor]:
    """Return the means of S (P, P) on and off its diagonal, detached scalars.

    ``diagonal``: similarity of one part's features between images, at most 1; C3S increases it. ``off_diagonal``:
    similarity of the features of different parts, omitted for P = 1; C3S decreases it.
    """
    s = s.detach()
    total, parts = s.trace(), len(s)
    means = {"diagonal": total / parts}
    if parts > 1:
        means["off_diagonal"] = (s.sum() - total) / (parts * (parts - 1))
    return means


class C3SLoss(nn.Module):
    """``c3s_loss`` as a module."""

    def __init__(self, form: C3SForm = "paper", diagonal_weight: float = 2.0, centred: bool = False) -> None:
        super().__init__()
        self.form: C3SForm = form
        self.diagonal_weight = diagonal_weight
        self.centred = centred

    def forward(self, features: Tensor) -> Tensor:
        """Return the C3S loss, a scalar, of part features (B, P, C)."""
        return self.of_correlations(part_correlations(features))

    def of_correlations(self, s: Tensor) -> Tensor:
        """Return the C3S loss, a scalar, of the correlation matrix S (P, P) of features that are not centred."""
        return correlation_loss(
            centre_correlations(s) if self.centred else s, self.form, self.diagonal_weight
        )
