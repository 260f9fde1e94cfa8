"""The plain backbone: the baseline of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossx.backbones import Backbone
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method


@register_method("plain")
class Plain(Method):
    """A backbone with its own pooling and one linear classifier, trained with cross-entropy."""

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__(backbone, num_classes)
        self.classifier = nn.Linear(backbone.pooled_channels, num_classes)

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> logits (B, K) for images (B, 3, H, W)."""
        return {"last": self.classifier(self.embeddings(images))}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the cross-entropy; see ``Method.objective``."""
        logits = self(images)
        return Objective.of({"data": self.criterion(logits, targets)}, logits)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> the channel mean of the last map, (B, 1, h, w)."""
        return {"last": self.backbone(images)["last"].mean(1, keepdim=True)}  # (B, C, h, w) -> (B, 1, h, w)

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        """Return ``last`` -> (B, 1, h, w), or None if the backbone does not average its last map.

        CAM is undefined for ConvNeXt, which normalises the average, and for ViT, which classifies a token.
        """
        maps = self.backbone(images)["last"]
        pooled, average = self.embeddings(images), maps.mean((2, 3))  # (B, C, h, w) -> (B, C)
        if pooled.shape != average.shape or not torch.allclose(pooled, average, rtol=1e-3, atol=1e-4):
            return None
        weights = self.classifier.weight[classes]
        return {"last": torch.einsum("bchw,bc->bhw", maps, weights)[:, None]}  # (B, C, h, w) -> (B, 1, h, w)

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return ``last`` -> classifier."""
        return {"last": self.classifier}

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the pooled features, (B, D), that the classifier sees."""
        return self.backbone.pool(self.backbone.features(images))
