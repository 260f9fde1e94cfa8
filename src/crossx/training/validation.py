"""Loss and accuracy on held-out images after an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import distributed
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from crossx.data.datamodule import DataModule
from crossx.training.batches import limited
from crossx.training.config import Config
from crossx.training.stages import VALIDATION_WAIT, Stages
from crossx.training.task import Task


class Validation:
    """Evaluates a network on the validation images; with ``optim.selection best_on_test`` on the test images.

    Args:
        data: The images.
        config: The options.
        fabric: Devices and processes, after their launch.

    Attributes:
        split: The split that is evaluated.
        batches: Batches of this rank; 0 if nothing is evaluated.

    Raises:
        UsageError: If ``trainer.limit_val_batches`` leaves no batch.
    """

    def __init__(self, data: DataModule, config: Config, fabric: Fabric) -> None:
        options = config.trainer
        self.split: Literal["val", "test"] = "test" if config.optim.selection == "best_on_test" else "val"
        self._data, self._fabric, self._interval = data, fabric, options.check_val_every_n_epoch
        self._loader: Any = data.test_dataloader() if self.split == "test" else data.val_dataloader()
        self.batches = limited("val", options.overfit_batches or options.limit_val_batches, self._loader)

    def is_due(self, epoch: int) -> bool:
        """Return whether this epoch, counted from 1, is one that is validated."""
        return self.batches > 0 and epoch % self._interval == 0

    @torch.inference_mode()
    def evaluate(self, task: Task, stages: Stages, done: Callable[[int], None]) -> dict[str, float]:
        """Return loss and top-1 as ``SPLIT/loss`` and ``SPLIT/top1``.

        The loss is plain cross-entropy, comparable between methods and options.

        Args:
            task: The network, which is put into evaluation mode.
            stages: Counts the time of waiting for images.
            done: Called with the number of batches after each.
        """
        task.eval()
        device = self._fabric.device
        if self._fabric.world_size > 1:
            # batch norm statistics differ between ranks; the checkpoint has those of the first
            for buffer in task.buffers():
                distributed.broadcast(buffer, 0)
        loss = MeanMetric().to(device)
        classes = task.method.num_classes
        top1 = MulticlassAccuracy(classes, average="micro", validate_args=False).to(device)
        loader = iter(self._loader)
        for batch in range(1, self.batches + 1):
            with stages(VALIDATION_WAIT):
                loaded = next(loader)
            images, targets = self._data.to_device(loaded, device)
            with self._fabric.autocast():
                logits = task.logits(images)
                loss.update(F.cross_entropy(logits, targets), weight=len(targets))
                top1.update(logits, targets)
            done(batch)
        return {f"{self.split}/loss": float(loss.compute()), f"{self.split}/top1": float(top1.compute())}
