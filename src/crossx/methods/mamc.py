"""MAMC-CNN (Sun et al., ECCV 2018, https://arxiv.org/abs/1806.05372)."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone, Placement
from crossx.errors import UsageError, check_positive
from crossx.layers import PartLinear
from crossx.losses import MAMCLoss
from crossx.losses.mamc import MAMCAverage
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method

Combination: TypeAlias = Literal["join", "sum"]
Start: TypeAlias = Literal["random", "average"]


@register_method("mamc")
class MAMC(Method):
    """OSME on the last stage, a linear layer on each part's whole map, and the MAMC loss.

    The linear layers see every spatial position, so they are built for one image size (``image_size`` of
    ``create_method``). Maps of other sizes are resized by adaptive average pooling.

    Args:
        backbone: The trunk; OSME gates are attached to its last stage.
        num_classes: K.
        num_parts: P, the number of excitation modules (attention branches).
        reduction: Channels per hidden unit of a gate.
        osme_placement: ``output``: on the stage's map; ``residual``: inside its last residual block, before the
            shortcut is added, as in Cross-X.
        embedding_size: D, the length of a part feature.
        embedding_start: First weights of the linear layers: ``random`` for each channel and position, as ``nn.Linear``;
            or ``average``: random for each channel and the same at all positions, so that the network starts as average
            pooling with a linear layer, and learns to tell positions apart.
        embedding_lr_factor: Learning rate of the linear layers relative to that of new layers. They have an input per
            channel and position, so a step of Adam at the full rate, the same for each weight, moves a part feature as
            many times further as there are positions.
        combination: Input of the classifier: the part features concatenated (``join``, P D) or added (``sum``, D).
        mamc_weight: Weight of the MAMC loss (lambda); 0 turns it off.
        mamc_normalize: Whether MAMC normalises the part features to length ``mamc_scale``.
        mamc_scale: Length of the normalised part features in MAMC, 1 in public code. At 1, the lowest MAMC loss is that
            of features that are all alike.
        mamc_average: Divisor of the MAMC sum: ``features``, the number of anchors in the batch, as in public code;
            ``pairs``, the number of pairs, as printed, which gives a loss 2 P times as large; or ``positives``, the
            number of anchors after dividing each one's sum by its positives. The first two grow with the batch.
    """

    supports_soft_targets = False
    sampling = "pairs"
    map_name = "excitation"
    citation = """\
@inproceedings{sun2018multi,
  title     = {Multi-Attention Multi-Class Constraint for Fine-grained Image Recognition},
  author    = {Sun, Ming and Yuan, Yuchen and Zhou, Feng and Ding, Errui},
  booktitle = {ECCV},
  year      = {2018}
}"""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_parts: int = 2,
        reduction: int = 16,
        osme_placement: Placement = "output",
        embedding_size: int = 1024,
        embedding_start: Start = "random",
        embedding_lr_factor: float = 1.0,
        combination: Combination = "join",
        mamc_weight: float = 0.5,
        mamc_normalize: bool = True,
        mamc_scale: float = 1.0,
        mamc_average: MAMCAverage = "features",
    ) -> None:
        super().__init__(backbone, num_classes)

        if embedding_size < 1:
            raise UsageError(f"embedding_size must be at least 1, not {embedding_size}.")
        check_positive("embedding_lr_factor", embedding_lr_factor)
        if mamc_weight < 0:
            raise UsageError(f"mamc_weight must be at least 0, not {mamc_weight}.")
        if mamc_scale <= 0:
            raise UsageError(f"mamc_scale must be above 0, not {mamc_scale}.")
        self.num_parts = num_parts
        self.map_size = backbone.map_size()
        self.mamc_weight = mamc_weight
        self.embedding_lr_factor = embedding_lr_factor
        backbone.attach_osme("last", num_parts, reduction, osme_placement)
        backbone.drop_head()
        positions = self.map_size[0] * self.map_size[1]
        self.embed = PartLinear(num_parts, backbone.channels["last"] * positions, embedding_size)
        if embedding_start == "average":
            _start_as_average(self.embed, positions)
        self.joins = combination == "join"
        self.classifier = nn.Linear(embedding_size * (num_parts if self.joins else 1), num_classes)
        self.mamc = MAMCLoss(mamc_normalize, mamc_average, mamc_scale)

    def part_features(self, images: Tensor) -> Tensor:
        """Return the part features f_p, (B, P, D), for images (B, 3, H, W)."""
        attended = self._attention_features(images).flatten(2)  # (B, P, C, h, w) -> (B, P, C*h*w)
        features: Tensor = self.embed(attended)
        return features

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> logits (B, K) for images (B, 3, H, W)."""
        return {"last": self.classifier(self.embeddings(images))}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the loss with the terms ``data``, ``mamc_sasc``, ``mamc_sadc`` and ``mamc_dasc``."""
        features = self.part_features(images)
        logits = self.classifier(self._combine(features))
        terms = {"data": self.criterion(logits, targets)}
        if self.mamc_weight:
            mamc = self.mamc.terms(features, targets)
            terms |= {f"mamc_{name}": self.mamc_weight * term for name, term in mamc.items()}
        return Objective.of(terms, logits)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> channel means of the attention features, (B, P, h, w)."""
        return {"last": self.backbone(images)["last"].mean(2)}  # (B, P, C, h, w) -> (B, P, h, w)

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> (B, P, h, w), exact; see ``Method``.

        The two linear layers together give each channel at each position a weight. The maps leave out the biases of
        both.
        """
        features = self._attention_features(images)
        weights = self.classifier.weight[classes]
        # (B, P*D) -> (B, P, D); for sum (B, D) -> (B, 1, D)
        weights = weights.unflatten(1, (-1, self.embed.bias.shape[1]))
        weights = weights.expand(-1, self.num_parts, -1)  # -> (B, P, D)
        weights = torch.einsum("bpd,pdf->bpf", weights, self.embed.weight)  # -> (B, P, C*h*w)
        maps = (weights.view_as(features) * features).sum(2)  # (B, P, C, h, w) -> (B, P, h, w)
        height, width = self.map_size
        return {"last": maps * height * width}

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return ``last`` -> classifier."""
        return {"last": self.classifier}

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the part features, concatenated (B, P D) or added (B, D)."""
        return self._combine(self.part_features(images))

    def lr_factors(self) -> dict[str, float]:
        """Return the factor of the linear layers; see ``Method``."""
        return {"embed": self.embedding_lr_factor}

    def _attention_features(self, images: Tensor) -> Tensor:
        """Return U_p, (B, P, C, h, w), at the size of the linear layers."""
        maps: Tensor = self.backbone(images)["last"]
        if maps.shape[-2:] == self.map_size:
            return maps
        pooled = F.adaptive_avg_pool2d(maps.flatten(0, 1), self.map_size)  # (B, P, C, H, W) -> (B*P, C, h, w)
        return pooled.view(*maps.shape[:3], *self.map_size)  # -> (B, P, C, h, w)

    def _combine(self, features: Tensor) -> Tensor:
        return features.flatten(1) if self.joins else features.sum(1)  # (B, P, D) -> (B, P*D) or (B, D)


@torch.no_grad()
def _start_as_average(layer: PartLinear, positions: int) -> None:
    """Give all positions the same weights, those of a linear layer on the average of the map."""
    weight = layer.weight.view(*layer.weight.shape[:2], -1, positions)  # (P, D, C*h*w) -> (P, D, C, h*w)
    bound = 1 / math.sqrt(weight.shape[2])
    of_channels = torch.empty_like(weight[..., :1]).uniform_(-bound, bound)
    weight.copy_((of_channels / positions).expand_as(weight))
    layer.bias.uniform_(-bound, bound)
