"""The ranking loss by which NTS-Net's Navigator learns from its Teacher."""

from __future__ import annotations

from torch import Tensor, nn

from crossx.distributed import batch_mean


def ranking_loss(scores: Tensor, losses: Tensor, margin: float = 1.0) -> Tensor:
    """Return ``sum over (i, j) with loss_i < loss_j of max(0, margin - score_i + score_j)``, the mean over images.

    The navigation loss of Yang et al. 2018, https://arxiv.org/abs/1809.00287: of two regions the one that the Teacher
    is surer of is to score higher. Its confidence decreases with the loss, so the order of losses is used. Equal
    losses make no pair. Gradients flow to the scores alone. In a process group this is the rank's part of the mean
    over the whole batch (``crossx.distributed``).

    Args:
        scores: The Navigator's, (B, M).
        losses: The Teacher's, -log of the probability of the true class, (B, M).
        margin: By how much the better region is to score higher.
    """
    losses = losses.detach()
    better = (losses[:, :, None] < losses[:, None]).to(scores.dtype)
    hinge = (margin - scores[:, :, None] + scores[:, None]).relu()
    return batch_mean((better * hinge).sum((1, 2)).mean(), len(scores))


class RankingLoss(nn.Module):
    """``ranking_loss`` with its option fixed."""

    def __init__(self, margin: float = 1.0) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, scores: Tensor, losses: Tensor) -> Tensor:
        """Return the ranking loss, a scalar, of scores and losses (B, M)."""
        return ranking_loss(scores, losses, self.margin)
