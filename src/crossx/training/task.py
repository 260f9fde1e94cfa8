"""The module that is trained: a method with the training options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from crossx.distributed import batch_mean, world_size
from crossx.errors import UsageError
from crossx.losses import ClassificationLoss
from crossx.methods.base import Method, Phase
from crossx.training.optim import freeze, pretrained_norms, pretrained_parameters, untrained_norms
from crossx.training.sections import OptimConfig
from crossx.training.views import early_layers


class Task(nn.Module):
    """A method with Mixup or CutMix, class weights and frozen layers.

    DDP wraps it, so its ``forward`` is the objective of a batch. Its state dict is the method's, with the prefix
    ``method.``.

    Args:
        method: The network and its objective.
        config: The ``--optim.*`` options.
        class_counts: Training images per class, for balanced class weights.

    Raises:
        UsageError: If the method does not support an option.
    """

    def __init__(self, method: Method, config: OptimConfig, *, class_counts: Sequence[int]) -> None:
        super().__init__()
        self.method = method
        self.config = config
        self.method.criterion = _criterion(config, class_counts)
        self.mix = build_mix(method, config)
        self.frozen_norms = self.norms_in_evaluation = freeze(method, config)
        self.trainable = {name: p for name, p in method.named_parameters() if p.requires_grad}
        self.frozen_at_first = [p for p in pretrained_parameters(method) if p.requires_grad]
        self.frozen = False
        self.early = early_layers(method, config)
        self.takes_maps = False
        if config.recompute_activations:
            for trunk in method.trunks():
                trunk.recompute_activations()
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.method.to(memory_format=self.memory_format)
        self.objective: Callable[..., Any] = method.part_objective if method.uses_parts else method.objective
        # frozen norms are in evaluation mode from the start, also while the method is prepared
        self.train()

    def compile_objective(self) -> None:
        """Compile the objective; call it after the network is on its device and copied for the average."""
        self.objective = torch.compile(self.objective)

    def train(self, mode: bool = True) -> Task:
        """Set training mode, except for frozen batch norms."""
        super().train(mode)
        for norm in self.norms_in_evaluation:
            norm.eval()
        return self

    def check_phases(self, epochs: int) -> None:
        """Check that every epoch of a training has something to train.

        Raises:
            UsageError: If a frozen backbone leaves nothing in one.
        """
        frozen = {id(parameter) for parameter in self.frozen_at_first}
        left = [name for name, parameter in self.trainable.items() if id(parameter) not in frozen]
        for epoch in range(epochs):
            phase = self.method.phase_at(epoch, epochs)
            names = left if epoch < self.config.freeze_backbone_epochs else self.trainable
            if not any(name.startswith(phase.trains) for name in names):
                raise UsageError(
                    f"optim.freeze_backbone and freeze_backbone_epochs leave nothing to train in epoch {epoch + 1}, "
                    f"phase {phase.name!r} of method {self.method.name!r}. Leave them out."
                )

    def start_epoch(self, epoch: int, phase: Phase) -> None:
        """Set training mode, and freeze what ``freeze_backbone_epochs`` or the phase does not train.

        On several ranks the parameters of the phase must be wrapped by DDP anew if they have changed.
        """
        self.method.phase = phase
        self.frozen = epoch < self.config.freeze_backbone_epochs
        self.norms_in_evaluation = [
            *(pretrained_norms(self.method) if self.frozen else self.frozen_norms),
            *untrained_norms(self.method, phase),
        ]
        self.train()
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(name.startswith(phase.trains))
        # DDP waits for every gradient it has seen, so with it they are computed, and dropped before the step
        if self.frozen and world_size() == 1:
            for parameter in self.frozen_at_first:
                parameter.requires_grad_(False)

    def drop_frozen_gradients(self) -> None:
        """Drop the gradients of a frozen backbone, so that the optimiser skips its parameters."""
        if self.frozen:
            for parameter in self.frozen_at_first:
                parameter.grad = None

    def forward(self, images: Tensor, targets: Tensor, *parts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch, and the metrics to report as scalars on the device.

        Args:
            images: Normalised images (B, 3, H, W), or the maps of the early layers if ``takes_maps``.
            targets: int64 (B,).
            *parts: (B, N, 3), only for a method that uses parts.
        """
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        with self.skipping():
            objective = self.objective(images.to(memory_format=self.memory_format), targets, *parts)
        # a mixed image counts as its dominant class
        labels = targets.argmax(1) if targets.ndim == 2 else targets  # (B, K) -> (B,)
        top1 = batch_mean((objective.logits.detach().argmax(1) == labels).float().mean(), len(labels))
        numbers = {"loss": objective.loss, **objective.terms, **objective.measures, "top1": top1}
        return objective.loss, {name: value.detach().float() for name, value in numbers.items()}

    def skipping(self) -> AbstractContextManager[None]:
        """Return a context in which the method takes stored maps in place of images, if ``takes_maps``."""
        return self.early.skipped() if self.early is not None and self.takes_maps else nullcontext()

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
    """Return the transform that mixes the images and targets of a batch, or None.

    Raises:
        UsageError: If the method needs one class per image.
    """
    kinds = [(v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)]
    chosen = [kind(alpha=alpha, num_classes=method.num_classes) for kind, alpha in kinds if alpha > 0]
    if not chosen:
        return None
    if method.uses_parts:
        raise UsageError(
            f"method {method.name!r} learns the parts of each image and does not support optim.mixup and optim.cutmix. "
            "Set both to 0."
        )
    if not method.supports_soft_targets:
        raise UsageError(
            f"method {method.name!r} needs one class per image and does not support optim.mixup and optim.cutmix. "
            "Set both to 0."
        )
    return chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
