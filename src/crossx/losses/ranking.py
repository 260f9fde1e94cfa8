"""The ranking losses that train NTS-Net's Navigator and RA-CNN's attention proposals."""

from __future__ import annotations

from torch import Tensor, nn

from crossx.distributed import batch_mean


def ranking_loss(scores: Tensor, losses: Tensor, margin: float = 1.0) -> Tensor:
    """Return ``sum over (i, j) with loss_i < loss_j of max(0, margin - score_i + score_j)``, averaged over images.

    The navigation loss of Yang et al. 2018 (https://arxiv.org/abs/1809.00287): of two regions, the one with the lower
    loss, of which the Teacher is more confident, should score higher. Equal losses form no pair. Only the scores
    receive gradients. In a process group this is the rank's part of the mean over the whole batch
    (``crossx.distributed``).

    Args:
        scores: Scores of the Navigator, (B, M).
        losses: Losses of the Teacher, the negative log-probability of the true class, (B, M).
        margin: Margin by which the better region should score higher.
    """
    losses = losses.detach()
    # (B, M, 1) and (B, 1, M) -> (B, M, M)
    better = (losses[:, :, None] < losses[:, None]).to(scores.dtype)
    hinge = (margin - scores[:, :, None] + scores[:, None]).relu()
    return batch_mean((better * hinge).sum((1, 2)).mean(), len(scores))  # (B, M, M) -> (B,) -> scalar


def scale_ranking_loss(probabilities: Tensor, margin: float = 0.05) -> Tensor:
    """Return ``sum over s of max(0, p_s - p_(s+1) + margin)``, averaged over images.

    The inter-scale ranking loss of Fu et al. 2017 (https://doi.org/10.1109/CVPR.2017.476): each finer scale should be
    more confident than the coarser one before. In a process group this is the rank's part of the mean over the whole
    batch (``crossx.distributed``).

    Args:
        probabilities: Probability of the true class at each scale, coarse to fine, (B, S).
        margin: Margin by which the finer scale should be more confident.
    """
    hinge = (probabilities[:, :-1] - probabilities[:, 1:] + margin).relu()
    return batch_mean(hinge.sum(1).mean(), len(probabilities))  # (B, S - 1) -> (B,) -> scalar


class RankingLoss(nn.Module):
    """``ranking_loss`` as a module."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, scores: Tensor, losses: Tensor) -> Tensor:
        """Return the ranking loss, a scalar, of scores and losses (B, M)."""
        return ranking_loss(scores, losses, self.margin)
