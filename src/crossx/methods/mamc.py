"""MAMC-CNN (Sun et al., ECCV 2018, https://arxiv.org/abs/1806.05372): network and objective."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone, Placement
from crossx.errors import UsageError, check_choice
from crossx.layers import PartLinear
from crossx.losses import MAMCLoss
from crossx.losses.mamc import MAMCAverage
from crossx.methods.base import Method, Objective, register_method

Combination: TypeAlias = Literal["join", "sum"]


@register_method("mamc")
class MAMC(Method):
    """OSME on the last stage, each part's map in full through a linear layer of its own, and the MAMC loss.

    The linear layers see every place of the map, so they are built for one size of images (``create_method``'s
    ``image_size``); maps of other images are brought to that size by adaptive average pooling.

    Args:
        backbone: The trunk; OSME gates are attached to its last stage.
        num_classes: K.
        num_parts: P, the number of excitation modules (attention branches).
        reduction: Channels over hidden units of a gate.
        osme_placement: ``output``: on the stage's map; ``residual``: inside its last residual block, before the
            shortcut is added, as Cross-X has it.
        embedding_size: D, the width of a part feature.
        combination: What the classifier sees: the part features joined (``join``, P D numbers) or added (``sum``, D).
        mamc_weight: Weight of the MAMC loss (lambda); 0 turns it off.
        mamc_normalize: Whether MAMC compares part features of length 1.
        mamc_average: ``features``: MAMC's sum is divided by the anchors of the batch, as public code has it; ``pairs``:
            by its pairs, as printed, which gives 2 P times as much. Either grows with the batch.

    Raises:
        UsageError: For an option that cannot work.
    """

    supports_soft_targets = False
    sampling = "pairs"
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
        combination: Combination = "join",
        mamc_weight: float = 0.5,
        mamc_normalize: bool = True,
        mamc_average: MAMCAverage = "features",
    ) -> None:
        super().__init__(backbone, num_classes)
        check_choice("combination", combination, get_args(Combination))
        check_choice("mamc_average", mamc_average, get_args(MAMCAverage))
        if embedding_size < 1:
            raise UsageError(f"embedding_size must be at least 1, not {embedding_size}.")
        if mamc_weight < 0:
            raise UsageError(f"mamc_weight takes no negative number: {mamc_weight}.")
        self.num_parts = num_parts
        self.map_size = backbone.map_size()
        self.mamc_weight = mamc_weight
        backbone.attach_osme("last", num_parts, reduction, osme_placement)
        backbone.drop_head()
        places = self.map_size[0] * self.map_size[1]
        self.embed = PartLinear(num_parts, backbone.channels["last"] * places, embedding_size)
        self.joins = combination == "join"
        self.classifier = nn.Linear(embedding_size * (num_parts if self.joins else 1), num_classes)
        self.mamc = MAMCLoss(mamc_normalize, mamc_average)

    def part_features(self, images: Tensor) -> Tensor:
        """Return the part features f_p, (B, P, D), of images (B, 3, H, W)."""
        features: Tensor = self.embed(self._attention_features(images).flatten(2))
        return features

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> logits (B, K) for images (B, 3, H, W)."""
        return {"last": self.classifier(self.embeddings(images))}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the loss and its terms: ``data`` and, weighted, ``mamc_sasc``, ``mamc_sadc`` and ``mamc_dasc``."""
        features = self.part_features(images)
        logits = self.classifier(self._combine(features))
        terms = {"data": self.criterion(logits, targets)}
        if self.mamc_weight:
            mamc = self.mamc.terms(features, targets)
            terms |= {f"mamc_{name}": self.mamc_weight * term for name, term in mamc.items()}
        return Objective.of(terms, logits)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> channel means of the attention features, (B, P, h, w)."""
        return {"last": self.backbone(images)["last"].mean(2)}

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> (B, P, h, w), exact; see ``Method``.

        Both linear layers together give each channel of each place its own weight. What the biases of either add to
        the logit is in no map.
        """
        features = self._attention_features(images)
        weights = self.classifier.weight[classes].unflatten(1, (-1, self.embed.bias.shape[1]))
        weights = torch.einsum("bpd,pdf->bpf", weights.expand(-1, self.num_parts, -1), self.embed.weight)
        height, width = self.map_size
        return {"last": (weights.view_as(features) * features).sum(2) * height * width}

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return ``last`` -> the classifier."""
        return {"last": self.classifier}

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the part features, joined (B, P D) or added (B, D)."""
        return self._combine(self.part_features(images))

    def _attention_features(self, images: Tensor) -> Tensor:
        """Return U_p, (B, P, C, h, w), in the size that the linear layers take."""
        maps: Tensor = self.backbone(images)["last"]
        if maps.shape[-2:] == self.map_size:
            return maps
        pooled = F.adaptive_avg_pool2d(maps.flatten(0, 1), self.map_size)
        return pooled.view(*maps.shape[:3], *self.map_size)

    def _combine(self, features: Tensor) -> Tensor:
        return features.flatten(1) if self.joins else features.sum(1)
