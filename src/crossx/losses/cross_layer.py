"""The cross-layer regularizer, CL (Eq. 6)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from crossx.distributed import at_least_float32, batch_mean


def cross_layer_loss(teacher: Tensor, student: Tensor, detach_teacher: bool = False) -> Tensor:
    """Return ``KL(softmax(teacher) || softmax(student))`` averaged over the batch (Eq. 6), a scalar.

    In a process group this is the rank's part of the mean over the whole batch (``crossx.distributed``).

    Args:
        teacher: Logits of stage L, (B, K).
        student: Logits of stage L-1 or of the merged features, (B, K).
        detach_teacher: Whether gradients stop at the teacher. The paper does not say; the released code does not.
    """
    if detach_teacher:
        teacher = teacher.detach()
    # under autocast on a CPU, logits and loss would be in half precision
    log_q, log_p = (F.log_softmax(at_least_float32(logits), 1) for logits in (student, teacher))
    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return batch_mean(divergence, len(student))


class CrossLayerLoss(nn.Module):
    """``cross_layer_loss`` as a module."""

    def __init__(self, detach_teacher: bool = False) -> None:
        super().__init__()
        self.detach_teacher = detach_teacher

    def forward(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return the CL loss, a scalar, of the logits (B, K) of two heads."""
        return cross_layer_loss(teacher, student, self.detach_teacher)
