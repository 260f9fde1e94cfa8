"""Cross-entropy of one prediction (Eq. 9)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import batch_mean


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
