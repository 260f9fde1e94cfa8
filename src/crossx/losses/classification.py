"""Losses of one prediction: cross-entropy (Eq. 9) and entropy."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, batch_mean


def classification_loss(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Return the cross-entropy, a scalar, as ``torch.nn.functional.cross_entropy`` does.

    In a process group this is the rank's part of the mean over the whole batch (``crossx.distributed``). A weighted
    mean is divided by the sum of the weights over all ranks.

    Args:
        logits: (B, K).
        targets: int64 (B,), or class probabilities (B, K).
        class_weights: (K,).
        label_smoothing: Fraction of each target that is spread over all classes, 0 to 1.
    """
    mean = F.cross_entropy(logits, targets, class_weights, label_smoothing=label_smoothing)
    # torch divides by the sum of the weights only for class indices
    if class_weights is None or targets.ndim == 2:
        return batch_mean(mean, len(targets))
    return batch_mean(mean, class_weights[targets].sum())


def entropy_loss(logits: Tensor) -> Tensor:
    """Return the negative entropy of the predicted distribution, a scalar from -log K to 0, in nats.

    Maximum-entropy training adds it to the cross-entropy (Dubey et al., NeurIPS 2018,
    https://arxiv.org/abs/1809.05934). In a process group this is the rank's part of the mean over the whole batch.

    Args:
        logits: (B, K).
    """
    log_p = F.log_softmax(at_least_float32(logits), 1)
    return batch_mean((log_p.exp() * log_p).sum(1).mean(), len(logits))  # (B, K) -> (B,) -> scalar


class ClassificationLoss(nn.Module):
    """``classification_loss`` as a module."""

    class_weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__()
        # not persistent: the weights belong to the training, not to the trained network
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy, a scalar, of logits (B, K) and targets (B,) or (B, K)."""
        return classification_loss(logits, targets, self.class_weights, self.label_smoothing)


class EntropyLoss(nn.Module):
    """``entropy_loss`` as a module."""

    def forward(self, logits: Tensor) -> Tensor:
        """Return the negative entropy, a scalar, of logits (B, K)."""
        return entropy_loss(logits)
