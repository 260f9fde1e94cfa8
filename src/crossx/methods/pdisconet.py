"""PDiscoNet: consistent parts without annotations (van der Klis et al., ICCV 2023, https://arxiv.org/abs/2309.03173)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from crossx.backbones import Backbone
from crossx.distributed import at_least_float32, batch_mean
from crossx.errors import UsageError, check_choice, check_positive
from crossx.layers import AffineView, draw_prototypes, join_stages, prototype_scores
from crossx.losses import (
    assignment_entropy_loss,
    background_presence_loss,
    centroid_concentration_loss,
    equivariance_loss,
    orthogonality_loss,
    presence_loss,
    total_variation_loss,
)
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method

Features: TypeAlias = Literal["both", "previous", "last"]
Modulation: TypeAlias = Literal["weights", "layer_norm", "none"]
Orthogonal: TypeAlias = Literal["features", "modulated"]
Present: TypeAlias = Literal["all", "parts"]

MAX_PARTS = 64
ACTIVE = 0.5
"""Share of a position from which a part is active there, as in the authors' evaluation."""


class Assignment(NamedTuple):
    """Which part each spatial position belongs to. The last of the P + 1 parts is the background.

    Attributes:
        features: (B, C, h, w).
        maps: Shares of the parts in each position, of sum 1, float32 (B, P + 1, h, w).
    """

    features: Tensor
    maps: Tensor


@register_method("pdisconet")
class PDiscoNet(Method):
    """Assigns each spatial position to the prototype of a part or the background, and classifies the parts.

    The defaults are PDiscoNet's; PDiscoFormer (ECCV 2024) is a combination of options.

    Args:
        backbone: The trunk.
        num_classes: K.
        num_parts: P, without the background.
        features: Maps that are compared with the prototypes: `both` (`last` enlarged to the size of `previous`, and
            `previous`), or one of them.
        feature_stride: Stride of `previous`; the deepest map of that stride is used. Default: the backbone's own.
        gumbel: Whether Gumbel noise is added to the scores of the parts in training (PDiscoFormer).
        modulation: What makes equal features of different parts different for the shared classifier: `weights` for
            each part and channel, a `layer_norm` over parts and channels (PDiscoFormer), or `none`.
        part_dropout: Probability that a part is left out in training.
        data_weight: Weight of the cross-entropy.
        concentration_weight: Weight of the spread of each map around its centroid.
        orthogonality_weight: Weight of the squared cosines between the features of different parts.
        orthogonality_of: Compare the parts' `features` or the `modulated` ones (PDiscoFormer).
        equivariance_weight: Weight of the difference between the maps of an image and of a random view of it.
        view_rotation: Largest rotation of the view, in degrees.
        view_scales: Smallest and largest scale of the view.
        view_shift: Largest shift of the view as a share of the image's side.
        presence_weight: Weight of the absence of parts from the batch.
        presence_of: The parts that must be present: `all` with the background, or the `parts` only (PDiscoFormer).
        presence_border: Positions at each edge at which presence does not count.
        total_variation_weight: Weight of the differences between neighbouring positions (PDiscoFormer).
        entropy_weight: Weight of the entropy of the shares at each position (PDiscoFormer).
        background_weight: Weight of the absence of background near the edges of each image (PDiscoFormer).
        prototype_lr_factor: Learning rate of the prototypes relative to that of new layers.
        modulation_lr_factor: Learning rate of the modulation relative to that of new layers.
    """

    map_name = "part map"
    maps_are_shares = True
    citation = """\
@inproceedings{vanderklis2023pdisconet,
  title     = {PDiscoNet: Semantically consistent part discovery for fine-grained recognition},
  author    = {van der Klis, Robert and Alaniz, Stephan and Mancini, Massimiliano and Dantas, Cassio F. and
               Ienco, Dino and Akata, Zeynep and Marcos, Diego},
  booktitle = {ICCV},
  year      = {2023}
}"""

    curve_titles: ClassVar[dict[str, str]] = {
        "data": "Classification term",
        "concentration": "Spread of the maps",
        "orthogonality": "Cosines between parts",
        "equivariance": "Change under affine views",
        "presence": "Absence of parts",
        "total_variation": "Total variation of the maps",
        "entropy": "Entropy of the assignment",
        "background": "Background",
        "active": "Share of active parts per image",
    }

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_parts: int = 8,
        features: Features = "both",
        feature_stride: int | None = None,
        gumbel: bool = False,
        modulation: Modulation = "weights",
        part_dropout: float = 0.3,
        data_weight: float = 2.0,
        concentration_weight: float = 1000.0,
        orthogonality_weight: float = 1.0,
        orthogonality_of: Orthogonal = "features",
        equivariance_weight: float = 1.0,
        view_rotation: float = 90.0,
        view_scales: Sequence[float] = (0.8, 1.4),
        view_shift: float = 0.11,
        presence_weight: float = 1.0,
        presence_of: Present = "all",
        presence_border: int = 2,
        total_variation_weight: float = 0.0,
        entropy_weight: float = 0.0,
        background_weight: float = 0.0,
        prototype_lr_factor: float = 0.1,
        modulation_lr_factor: float = 10.0,
    ) -> None:
        super().__init__(backbone, num_classes)
        weights = {
            "concentration": concentration_weight,
            "orthogonality": orthogonality_weight,
            "equivariance": equivariance_weight,
            "presence": presence_weight,
            "total_variation": total_variation_weight,
            "entropy": entropy_weight,
            "background": background_weight,
        }
        for option, choice, kind in (
            ("features", features, Features),
            ("modulation", modulation, Modulation),
            ("orthogonality_of", orthogonality_of, Orthogonal),
            ("presence_of", presence_of, Present),
        ):
            check_choice(option, choice, get_args(kind))
        if not 1 <= num_parts <= MAX_PARTS:
            raise UsageError(f"num_parts must be between 1 and {MAX_PARTS}, not {num_parts}.")
        if feature_stride is not None and features == "last":
            raise UsageError("feature_stride is that of the previous map, which features last does not use.")
        if not 0 <= part_dropout < 1:
            raise UsageError(f"part_dropout must be at least 0 and below 1, not {part_dropout}.")
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise UsageError(f"{name}_weight must be at least 0 and finite, not {weight}.")
        for name, value in (
            ("data_weight", data_weight),
            ("prototype_lr_factor", prototype_lr_factor),
            ("modulation_lr_factor", modulation_lr_factor),
        ):
            check_positive(name, value)
        if not 0 <= view_rotation <= 180:
            raise UsageError(f"view_rotation must be between 0 and 180 degrees, not {view_rotation}.")
        if len(view_scales) != 2 or not 0 < view_scales[0] <= view_scales[1] < math.inf:
            raise UsageError(
                f"view_scales takes the smallest and largest scale, above 0, not {list(view_scales)}."
            )
        if not 0 <= view_shift < 1:
            raise UsageError(f"view_shift must be at least 0 and below 1, not {view_shift}.")
        if presence_border < 0:
            raise UsageError(f"presence_border must be at least 0, not {presence_border}.")

        self.num_parts, self.features, self.gumbel = num_parts, features, gumbel
        self.weights, self.data_weight = weights, data_weight
        self.orthogonality_of, self.presence_of = orthogonality_of, presence_of
        self.presence_border = presence_border
        self.view_rotation, self.view_shift = view_rotation, view_shift
        self.view_scales = view_scales[0], view_scales[1]
        self.factors = {"prototypes": prototype_lr_factor, "modulation": modulation_lr_factor}
        if feature_stride is not None:
            backbone.take_previous(feature_stride)
        backbone.drop_head()
        if features == "previous":
            backbone.freeze_after_previous()
        stages = ("last", "previous") if features == "both" else (features,)
        channels = sum(backbone.channels[stage] for stage in stages)
        self.prototypes = nn.Parameter(draw_prototypes(num_parts + 1, channels))
        self.modulation: nn.Parameter | nn.LayerNorm | None = None
        if modulation == "weights":
            self.modulation = nn.Parameter(torch.ones(num_parts, channels))
        elif modulation == "layer_norm":
            self.modulation = nn.LayerNorm([num_parts + 1, channels])
        self.dropout = nn.Dropout1d(part_dropout)
        self.classifier = nn.Linear(channels, num_classes, bias=False)

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of ``parts``, the only head: the mean over the parts."""
        return {"parts": self.classifier(self.embeddings(images))}

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted cross-entropy, ``data``."""
        return {"data": self.data_weight * self.criterion(heads["parts"], targets)}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the weighted sum of the cross-entropy and of the losses of ``crossx.losses.part_discovery``.

        In evaluation mode the view of the images is fixed. The measures are the share of the parts that are active in
        an image, and the background's share of the positions.
        """
        features, maps = self._assign(images)
        vectors = self._pool(features, maps)
        modulated = self._modulate(vectors)
        parts = maps[:, :-1]
        # the classifier has no bias: the mean of the parts' logits
        logits = self.classifier(self.dropout(modulated[:, :-1]).mean(1))
        losses: dict[str, Callable[[], Tensor]] = {
            "concentration": lambda: centroid_concentration_loss(parts),
            "orthogonality": lambda: orthogonality_loss(
                vectors if self.orthogonality_of == "features" else modulated
            ),
            "equivariance": lambda: self._equivariance(images, parts),
            "presence": lambda: presence_loss(
                maps if self.presence_of == "all" else parts, self.presence_border
            ),
            "total_variation": lambda: total_variation_loss(maps),
            "entropy": lambda: assignment_entropy_loss(maps),
            "background": lambda: background_presence_loss(maps[:, -1]),
        }
        terms = self.head_terms({"parts": logits}, targets)
        terms |= {name: self.weights[name] * loss() for name, loss in losses.items() if self.weights[name]}
        shares = parts.detach()
        measures = {
            "active_parts": (shares.amax((2, 3)) > ACTIVE).float().mean(),
            "background_share": 1 - shares.sum(1).mean(),
        }
        means = {name: batch_mean(value, len(images)) for name, value in measures.items()}
        return Objective.of(terms, logits, means)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``parts`` -> the shares of the parts in each position, (B, P, h, w).

        What they lack of a sum of 1 is the background's share.
        """
        return {"parts": self._assign(images).maps[:, :-1]}

    def class_activation_maps(self, images: Tensor, classes: Tensor) -> dict[str, Tensor] | None:
        """Return ``parts`` -> (B, P, h, w), one map per part; None with a layer norm, which is not linear."""
        if isinstance(self.modulation, nn.LayerNorm):
            return None
        features, maps = self._assign(images)
        weights = self.classifier.weight[classes][:, None]  # (B, 1, C)
        if self.modulation is not None:
            weights = weights * self.modulation  # (B, 1, C) and (P, C) -> (B, P, C)
        evidence = torch.einsum("bchw,bpc->bphw", features, weights.expand(-1, self.num_parts, -1))
        return {"parts": maps[:, :-1] * evidence / self.num_parts}

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the mean of the modulated features of the parts, (B, C)."""
        return self._modulate(self._pool(*self._assign(images)))[:, :-1].mean(1)

    def lr_factors(self) -> dict[str, float]:
        """Return the factors of the prototypes and the modulation; see ``Method``."""
        return self.factors

    def _assign(self, images: Tensor) -> Assignment:
        stages = self.backbone(images)
        both = self.features == "both"
        features = join_stages(stages["last"], stages["previous"]) if both else stages[self.features]
        scores = prototype_scores(features, self.prototypes)
        if self.gumbel and self.training:
            scores = scores - torch.empty_like(scores).exponential_().log()
        return Assignment(features, scores.softmax(1))

    def _pool(self, features: Tensor, maps: Tensor) -> Tensor:
        """Return the mean over all positions of the features times the shares, (B, P + 1, C)."""
        with torch.autocast(features.device.type, enabled=False):
            shares = maps.flatten(2) / (maps.shape[2] * maps.shape[3])  # (B, P + 1, h, w) -> (B, P + 1, h*w)
            vectors = shares @ at_least_float32(features).flatten(2).mT  # (B, C, h, w) -> (B, h*w, C)
            return vectors.to(self.classifier.weight.dtype)

    def _modulate(self, vectors: Tensor) -> Tensor:
        """Return modulated features (B, P + 1, C); weights leave the background, which is not classified."""
        if self.modulation is None:
            return vectors
        if isinstance(self.modulation, nn.LayerNorm):
            normalized: Tensor = self.modulation(vectors)
            return normalized
        return torch.cat([vectors[:, :-1] * self.modulation, vectors[:, -1:]], 1)

    def _equivariance(self, images: Tensor, parts: Tensor) -> Tensor:
        count, device = len(images), images.device
        if self.training:
            view = AffineView.draw(count, self.view_rotation, self.view_scales, self.view_shift, device)
        else:
            # the same for every image, whatever else is in the batch
            angle = torch.full((count,), math.radians(self.view_rotation) / 2, device=device)
            view = AffineView(angle, torch.ones_like(angle), torch.zeros(count, 2, device=device))
        return equivariance_loss(parts, view.undo(self._assign(view.apply(images)).maps[:, :-1]))
