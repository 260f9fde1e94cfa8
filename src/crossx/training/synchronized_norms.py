"""Batch norm over all ranks, for ``trainer.sync_batchnorm``."""

from __future__ import annotations

from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from torch import nn

from crossx.backbones import synchronize_batch_norms


class SynchronizedNorms(TorchSyncBatchNorm):
    """Converts the norms that train.

    Lightning's own drops the activations that timm keeps in its norm layers, and thaws frozen norms.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the norms of the task, in place."""
        synchronize_batch_norms(model)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Leave the norms: the weights are read by name, and evaluation synchronises nothing."""
        return model
