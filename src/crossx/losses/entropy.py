"""The entropy of the predicted distribution, which maximum-entropy training raises (Dubey et al., NeurIPS 2018)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, batch_mean


def entropy_loss(logits: Tensor) -> Tensor:
    """Return ``-H(p)``, p the softmax, in nats, the mean over the batch: a scalar from -log K to 0.

    The term of https://arxiv.org/abs/1809.05934, added to the cross-entropy with a weight. In a process group this is
    the rank's part of the mean over the whole batch (``crossx.distributed``).

    Args:
        logits: (B, K).
    """
    log_p = F.log_softmax(at_least_float32(logits), 1)
    return batch_mean((log_p.exp() * log_p).sum(1).mean(), len(logits))


class EntropyLoss(nn.Module):
    """``entropy_loss`` as a module."""

    def forward(self, logits: Tensor) -> Tensor:
        """Return the negative entropy, a scalar, of logits (B, K)."""
        return entropy_loss(logits)
