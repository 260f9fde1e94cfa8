"""What one batch is to training, for every method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from crossx.distributed import batch_mean, world_size
from crossx.errors import UsageError
from crossx.losses import ClassificationLoss
from crossx.methods.base import Method
from crossx.training.config import OptimConfig
from crossx.training.optim import freeze, pretrained_norms


class Task(nn.Module):
    """A method with what training adds to its objective: mixed images, class weights, frozen layers.

    It is what DDP wraps, so that the objective of a batch is its ``forward``. Its state is the method's, with
    ``method.`` before each key.

    Args:
        method: The network and its objective.
        config: The ``--optim.*`` options.
        class_counts: Training images of each class, for balanced class weights.

    Raises:
        UsageError: If an option does not go with the method.
    """

    def __init__(self, method: Method, config: OptimConfig, *, class_counts: Sequence[int]) -> None:
        super().__init__()
        self.method = method
        self.config = config
        self.method.criterion = _criterion(config, class_counts)
        self.mix = build_mix(method, config)
        self.frozen_norms = self.norms_in_evaluation = freeze(method, config)
        self.frozen_at_first = [p for p in method.backbone.pretrained_parameters() if p.requires_grad]
        self.frozen = False
        if config.recompute_activations:
            method.backbone.recompute_activations()
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.method.to(memory_format=self.memory_format)
        self.objective: Callable[..., Any] = method.objective
        # frozen norms are in evaluation mode from the start, when the method is prepared
        self.train()

    def compile_objective(self) -> None:
        """Compile the objective: once the network is on its device, and copied where an average is kept."""
        self.objective = torch.compile(self.method.objective)

    def train(self, mode: bool = True) -> Task:
        """Set training mode, but for frozen batch norms."""
        super().train(mode)
        for norm in self.norms_in_evaluation:
            norm.eval()
        return self

    def start_epoch(self, epoch: int) -> None:
        """Set training mode; freeze the backbone, or free it, as ``freeze_backbone_epochs`` says."""
        self.frozen = epoch < self.config.freeze_backbone_epochs
        self.norms_in_evaluation = pretrained_norms(self.method) if self.frozen else self.frozen_norms
        self.train()
        # DDP waits for every gradient that it once saw: with it they are computed, and dropped before the step
        if world_size() == 1:
            for parameter in self.frozen_at_first:
                parameter.requires_grad_(not self.frozen)

    def drop_frozen_gradients(self) -> None:
        """Drop the gradients of a frozen backbone: the optimiser then passes its parameters over."""
        if self.frozen:
            for parameter in self.frozen_at_first:
                parameter.grad = None

    def forward(self, images: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and every number to report as scalars on the device.

        Args:
            images: (B, 3, H, W), normalised.
            targets: int64 (B,).
        """
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        objective = self.objective(images.to(memory_format=self.memory_format), targets)
        # a mixed image counts as the class that has most of it
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        top1 = batch_mean((objective.logits.detach().argmax(1) == labels).float().mean(), len(labels))
        numbers = {"loss": objective.loss, **objective.terms, **objective.measures, "top1": top1}
        return objective.loss, {name: value.detach().float() for name, value in numbers.items()}

    def logits(self, images: Tensor) -> Tensor:
        """Return the prediction (B, K) in float32 for normalised images (B, 3, H, W)."""
        logits: Tensor = self.method(images.to(memory_format=self.memory_format)).float()
        return logits


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
