"""The one LightningModule, for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from crossx.distributed import batch_mean
from crossx.errors import UsageError
from crossx.losses import ClassificationLoss
from crossx.methods.base import Method
from crossx.training.config import OptimConfig
from crossx.training.optim import build_optimizer, build_scheduler, freeze, pretrained_norms

Batch = tuple[Tensor, Tensor]


class Task(LightningModule):
    """Trains a method.

    Args:
        method: The network and its objective.
        config: The ``--optim.*`` options.
        class_counts: Training images of each class, for balanced class weights.
        eval_split: The split that is evaluated after each epoch; it names the metrics.

    Raises:
        UsageError: If an option does not go with the method.
    """

    def __init__(
        self,
        method: Method,
        config: OptimConfig,
        *,
        class_counts: Sequence[int],
        eval_split: Literal["val", "test"] = "val",
    ) -> None:
        super().__init__()
        self.method = method
        self.config = config
        self.eval_split = eval_split
        self.method.criterion = _criterion(config, class_counts)
        self.mix = build_mix(method, config)
        self.frozen_norms = self.norms_in_evaluation = freeze(method, config)
        self.frozen_at_first = [p for p in method.backbone.pretrained_parameters() if p.requires_grad]
        if config.recompute_activations:
            method.backbone.recompute_activations()
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.method.to(memory_format=self.memory_format)
        self.objective: Callable[..., Any] = method.objective
        self.eval_loss = MeanMetric()
        self.eval_top1 = MulticlassAccuracy(method.num_classes, average="micro", validate_args=False)
        # Lightning keeps the modes it finds: frozen norms must be in evaluation mode from the start
        self.train()

    def on_fit_start(self) -> None:
        """Compile once the network is on its device (and copied, where an average is kept)."""
        if self.config.compile:
            self.objective = torch.compile(self.method.objective)

    def train(self, mode: bool = True) -> Task:
        """Set training mode, but for frozen batch norms."""
        super().train(mode)
        for norm in self.norms_in_evaluation:
            norm.eval()
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Freeze the backbone in the first epochs, and free it afterwards, as ``freeze_backbone_epochs`` says."""
        if batch_idx == 0 and self.config.freeze_backbone_epochs:
            self.norms_in_evaluation = pretrained_norms(self.method) if self._freezes() else self.frozen_norms
            self.train()
            # DDP waits for every gradient that it once saw: with it they are computed, and dropped before the step
            if self.trainer.world_size == 1:
                for parameter in self.frozen_at_first:
                    parameter.requires_grad_(not self._freezes())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Drop the gradients of a frozen backbone: the optimiser then passes its parameters over."""
        if self._freezes():
            for parameter in self.frozen_at_first:
                parameter.grad = None

    def _freezes(self) -> bool:
        return self.current_epoch < self.config.freeze_backbone_epochs

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the loss, and beside it every number to report as scalars on the device."""
        images, targets = batch
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        objective = self.objective(images.to(memory_format=self.memory_format), targets)
        # a mixed image counts as the class that has most of it
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        top1 = batch_mean((objective.logits.detach().argmax(1) == labels).float().mean(), len(labels))
        numbers = {"loss": objective.loss, **objective.terms, **objective.measures, "top1": top1}
        return {
            "loss": objective.loss,
            "numbers": {name: value.detach().float() for name, value in numbers.items()},
        }

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch; the loss is plain cross-entropy, comparable between methods and options."""
        images, targets = batch
        logits = self.method(images.to(memory_format=self.memory_format)).float()
        self.eval_loss.update(F.cross_entropy(logits, targets), weight=len(targets))
        self.eval_top1.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        """Log loss and top-1 of the evaluated split."""
        values = {"loss": self.eval_loss.compute(), "top1": self.eval_top1.compute()}
        self.log_dict({f"{self.eval_split}/{name}": value for name, value in values.items()})
        self.eval_loss.reset()
        self.eval_top1.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimiser, and its schedule stepped after every optimiser step."""
        optimizer = build_optimizer(self.method, self.config)
        total = self.trainer.estimated_stepping_batches
        steps = -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches)
        scheduler = build_scheduler(
            optimizer, self.config, steps_per_epoch=max(1, steps), total_steps=max(1, int(total))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _criterion(config: OptimConfig, class_counts: Sequence[int]) -> ClassificationLoss:
    weights = None
    if config.class_weights == "balanced":
        counts = torch.tensor(class_counts, dtype=torch.float32)
        weights = counts.sum() / (len(counts) * counts.clamp(min=1))
    return ClassificationLoss(weights, config.label_smoothing)


def build_mix(method: Method, config: OptimConfig) -> v2.Transform | None:
    """Return what mixes the images of a batch, and their targets; None where nothing does.

    Raises:
        UsageError: If the method needs one class an image.
    """
    kinds = [(v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)]
    chosen = [kind(alpha=alpha, num_classes=method.num_classes) for kind, alpha in kinds if alpha > 0]
    if not chosen:
        return None
    if not method.supports_soft_targets:
        raise UsageError(
            f"method {method.name!r} needs one class per image, which optim.mixup and optim.cutmix do not leave: "
            "set both to 0."
        )
    return chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
