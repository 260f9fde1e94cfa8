"""The negative entropy of a prediction, which maximum-entropy training minimises."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, batch_mean


def entropy_loss(logits: Tensor) -> Tensor:
    """Return the negative entropy of the predicted distribution, a scalar from -log K to 0, in nats.

    Maximum-entropy training adds it to the cross-entropy (Dubey et al., NeurIPS 2018,
    https://arxiv.org/abs/1809.05934). In a process group this is the rank's part of the mean over the whole batch.

    Args:
        logits: (B, K).
    """
    log_p = F.log_softmax(at_least_float32(logits), 1)
    return batch_mean((log_p.exp() * log_p).sum(1).mean(), len(logits))  # (B, K) -> (B,) -> scalar


class EntropyLoss(nn.Module):
    """``entropy_loss`` as a module."""

    def forward(self, logits: Tensor) -> Tensor:
        """Return the negative entropy, a scalar, of logits (B, K)."""
        return entropy_loss(logits)
