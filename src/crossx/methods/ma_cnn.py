"""MA-CNN: multiple attention (Zheng et al., ICCV 2017, https://doi.org/10.1109/ICCV.2017.557)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from crossx.backbones import Backbone
from crossx.errors import UsageError
from crossx.layers import (
    ChannelGrouping,
    PartLinear,
    attention_maps,
    attention_pool,
    channel_peaks,
    crop_boxes,
    evaluation_mode,
    join_normalized,
    object_box,
    peak_boxes,
)
from crossx.losses import concentration_loss, diversity_loss
from crossx.methods.base import Method, Objective, Phase
from crossx.methods.registry import register_method
from crossx.schema.model import MAX_IMAGE_SIZE

OBJECT_THRESHOLD = 0.1
"""Share of the largest sum of the channels that belongs to the object; of the released code."""
MAX_IMAGES = 5000
"""Limit of the images by whose peaks the channels are clustered: memory."""
KMEANS_ITERATIONS = 50
KMEANS_STARTS = 10

CLASSIFICATION, GROUPING = (
    Phase("classification", ("backbone.", "crop_trunks.", "heads.")),
    Phase("grouping", ("grouping.",)),
)


class Parts(NamedTuple):
    """What the network sees in images.

    Attributes:
        features: Unpooled map of the trunk, (B, C, h, w).
        maps: Attention maps of the parts, (B, P, h, w), each of sum 1.
    """

    features: Tensor
    maps: Tensor


@register_method("ma_cnn")
class MACNN(Method):
    """Parts are groups of channels that peak at the same positions; their crops have networks of their own.

    Classification and grouping are trained in turn, an epoch each (``phase_at``).

    Args:
        backbone: The trunk of the image. Those of the crops are its clones.
        num_classes: K.
        num_parts: P.
        part_crops: Whether to classify crops around the parts with the image; otherwise the features of the trunk
            pooled by the attention maps.
        shared_trunk: Whether all crops share one trunk; otherwise each has its own.
        object_crop: Whether a crop of the object is added to those of the parts.
        part_side: Side of the square around a part as a share of the image's shorter side.
        crop_size: Side in pixels to which the crops are resized. Default: half of the image's shorter side.
        grouping_every: Every n-th epoch trains the channel grouping, the others the classification; at least 2, or 0
            for both in each epoch.
        dis_weight: Weight of the loss by which each map is concentrated around its peak.
        div_weight: Weight of the loss by which the maps differ.
        dropout: Dropout on the features of image, parts and crops, in training only.
    """

    stops_gradients = True

    citation = """\
@inproceedings{zheng2017learning,
  title     = {Learning Multi-Attention Convolutional Neural Network for Fine-Grained Image Recognition},
  author    = {Zheng, Heliang and Fu, Jianlong and Mei, Tao and Luo, Jiebo},
  booktitle = {ICCV},
  year      = {2017}
}"""

    curve_titles: ClassVar[dict[str, str]] = {
        "data": "Classification terms",
        "dis": "Concentration of the maps",
        "div": "Overlap of the maps",
    }

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_parts: int = 4,
        part_crops: bool = True,
        shared_trunk: bool = False,
        object_crop: bool = False,
        part_side: float = 2 / 7,
        crop_size: int | None = None,
        grouping_every: int = 2,
        dis_weight: float = 1.0,
        div_weight: float = 2.0,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(backbone, num_classes)
        channels = backbone.channels[backbone.unpooled_stage]
        if not 2 <= num_parts <= min(channels, 64):
            raise UsageError(f"num_parts must be between 2 and {min(channels, 64)}, not {num_parts}.")
        for name, chosen in (("object_crop", object_crop), ("shared_trunk", shared_trunk)):
            if chosen and not part_crops:
                raise UsageError(f"{name} needs part_crops.")
        if not 0 < part_side <= 1:
            raise UsageError(f"part_side must be above 0 and at most 1, not {part_side}.")
        if crop_size is not None and not 2 <= crop_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"crop_size must be between 2 and {MAX_IMAGE_SIZE}, not {crop_size}.")
        if grouping_every < 0 or grouping_every == 1:
            raise UsageError(f"grouping_every must be 0, or 2 or more, not {grouping_every}.")
        for name, weight in (("dis_weight", dis_weight), ("div_weight", div_weight)):
            if not 0 <= weight < float("inf"):
                raise UsageError(f"{name} must be at least 0, not {weight}.")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}.")

        self.num_parts, self.object_crop = num_parts, object_crop
        self.part_side, self.crop_size = part_side, crop_size
        self.grouping_every = grouping_every
        self.dis_weight, self.div_weight = dis_weight, div_weight
        backbone.drop_head()
        self.stage = backbone.unpooled_stage
        regions = (num_parts + object_crop) * part_crops
        trunks = 1 if regions and shared_trunk else regions
        self.crop_trunks = nn.ModuleList(backbone.clone() for _ in range(trunks))
        self.grouping = ChannelGrouping(channels, num_parts)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleDict(
            {"image": nn.Linear(channels, num_classes), "parts": PartLinear(num_parts, channels, num_classes)}
        )
        if regions:
            self.heads["crops"] = PartLinear(regions, channels, num_classes)
        self.heads["joined"] = nn.Linear((1 + (regions or num_parts)) * channels, num_classes)

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of ``image``, ``parts`` and ``crops`` (means over them) and ``joined``."""
        streams = self._streams(images, self._see(images))
        logits = self._logits(streams, self._join(streams))
        # (B, P, K) -> (B, K)
        return {name: own.mean(1) if own.ndim == 3 else own for name, own in logits.items()}

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Return only the logits of ``joined``."""
        return heads["joined"]

    def linear_heads(self) -> dict[str, nn.Linear | PartLinear]:
        """Return the classifiers of the image, of each part and crop, and ``joined``."""
        return dict(self.heads.items())  # type: ignore[arg-type]

    def head_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of the image, (B, C), of its parts and crops, (B, n, C), and those joined, (B, D)."""
        streams = self._streams(images, self._see(images))
        return {**streams, "joined": self._join(streams)}

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropies of all heads, ``data_...``; those of parts and crops are means over them."""
        return {f"data_{name}": self.head_loss(logits, targets) for name, logits in heads.items()}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the sum of the cross-entropies of all heads and, weighted, of the losses of the maps.

        ``data_parts`` and ``data_crops`` are means over parts and crops. The cross-entropies do not train the grouping,
        and the losses of the maps train nothing else. In the phases of a training, the terms of the other phase are
        values without gradient.
        """
        seen = self._see(images)
        streams = self._streams(images, seen)
        # as the authors do: the networks learn from their own heads
        logits = self._logits(streams, self._join(streams).detach())
        terms = self.head_terms(logits, targets)
        maps = {
            "dis": self.dis_weight * concentration_loss(seen.maps),
            "div": self.div_weight * diversity_loss(seen.maps),
        }
        if self.phase.name == GROUPING.name:
            terms = {name: term.detach() for name, term in terms.items()}
        if self.phase.name == CLASSIFICATION.name:
            maps = {name: term.detach() for name, term in maps.items()}
        return Objective.of({**terms, **maps}, logits["joined"])

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the stage -> the attention maps of the parts, (B, P, h, w)."""
        return {self.stage: self._see(images).maps}

    def boxes(self, images: Tensor) -> Tensor | None:
        """Return the crops around the parts, in their order, and then the object's; None without crops."""
        return self._boxes(images, self._see(images)) if len(self.crop_trunks) else None

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the features of the image and its crops, or parts, concatenated, (B, D)."""
        return self._join(self._streams(images, self._see(images)))

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Group the channels by the positions of their peaks in the training images.

        The vectors of the positions in all images are clustered by k-means. Each part starts with the channels of a
        cluster.
        """
        peaks, count = [], 0
        with evaluation_mode(self):
            for images, *_ in batches:
                peaks.append(channel_peaks(self.backbone(images)[self.stage].float()).cpu())
                count += len(images)
                if count >= MAX_IMAGES:
                    break
        if not peaks:
            return
        positions = torch.cat(peaks).transpose(0, 1).flatten(1)  # (n, C, 2) -> (C, 2*n)
        groups = cluster(positions, self.num_parts)
        self.grouping.start_from(groups.to(self.grouping.weights.bias.device))

    def phase_at(self, epoch: int, epochs: int) -> Phase:
        """Return the grouping phase every ``grouping_every`` epochs, never in the last one."""
        if not self.grouping_every:
            return Phase()
        return GROUPING if (epochs - epoch) % self.grouping_every == 0 else CLASSIFICATION

    def check_image_size(self, size: int) -> None:
        """Check that the backbone accepts both images and crops; see ``Method.check_image_size``."""
        super().check_image_size(size)
        if not len(self.crop_trunks):
            return
        if self._side(size) < 2:
            raise UsageError(
                f"part_side {self.part_side} is too small: parts of images of {size} pixels have {self._side(size)}."
            )
        self._check_second_size("crop", self.crop_size or size // 2, size)

    def _side(self, size: int) -> int:
        return round(self.part_side * size)

    def _see(self, images: Tensor) -> Parts:
        features = self.backbone(images)[self.stage]
        # the grouping and the classification are trained separately, as in the paper
        fixed = features.detach()
        weights = self.grouping(fixed.mean((2, 3)))  # (B, C, h, w) -> (B, C) -> (B, P, C)
        return Parts(features, attention_maps(fixed, weights))

    def _boxes(self, images: Tensor, seen: Parts) -> Tensor:
        height, width = images.shape[2:]
        boxes = peak_boxes(seen.maps, (height, width), self._side(min(height, width)))
        if not self.object_crop:
            return boxes
        return torch.cat([boxes, object_box(seen.features, (height, width), OBJECT_THRESHOLD)], 1)

    def _streams(self, images: Tensor, seen: Parts) -> dict[str, Tensor]:
        """Return head -> its features: ``image`` (B, C), ``parts`` (B, P, C), ``crops`` (B, R, C)."""
        streams = {
            "image": seen.features.mean((2, 3)),  # (B, C, h, w) -> (B, C)
            "parts": attention_pool(seen.features, seen.maps.detach()),
        }
        if len(self.crop_trunks):
            size = self.crop_size or min(images.shape[2:]) // 2
            crops = crop_boxes(images, self._boxes(images, seen).detach(), size)  # (B, R, 3, s, s)
            count = crops.shape[1]
            # (B, R, 3, s, s) -> R x (B, 3, s, s), or 1 x (B*R, 3, s, s) for a shared trunk
            inputs = [crops.flatten(0, 1)] if len(self.crop_trunks) < count else crops.unbind(1)
            pooled = [
                trunk(own)[self.stage].mean((2, 3))
                for trunk, own in zip(self.crop_trunks, inputs, strict=True)
            ]
            # 1 x (B*R, C) -> (B, R, C), or R x (B, C) -> (B, R, C)
            streams["crops"] = (
                pooled[0].unflatten(0, (-1, count)) if len(pooled) < count else torch.stack(pooled, 1)
            )
        return {name: self.dropout(features) for name, features in streams.items()}

    def _logits(self, streams: Mapping[str, Tensor], joined: Tensor) -> dict[str, Tensor]:
        """Return the logits of each head, (B, K), or (B, P, K) for parts and crops."""
        inputs = {**streams, "joined": joined}
        return {name: self.heads[name](features) for name, features in inputs.items()}

    def _join(self, streams: Mapping[str, Tensor]) -> Tensor:
        others = streams["crops" if "crops" in streams else "parts"]
        return join_normalized([streams["image"], *others.unbind(1)])  # (B, R, C) -> R x (B, C)


def cluster(vectors: Tensor, count: int) -> Tensor:
    """Return the cluster of each row, int64 (n,), by k-means: the best of several starts, always the same.

    Args:
        vectors: (n, d).
        count: Number of clusters, of which some are empty if there are fewer different rows.
    """
    distinct, which = vectors.unique(dim=0, return_inverse=True)
    if len(distinct) <= count:
        labels: Tensor = which
        return labels
    # imported here because it takes half a second and only training needs it
    from scipy.cluster.vq import kmeans2

    points = vectors.double().numpy()
    best, least = None, float("inf")
    for seed in range(KMEANS_STARTS):
        with warnings.catch_warnings():
            # an empty cluster keeps its last centre
            warnings.filterwarnings("ignore", "One of the clusters is empty")
            centers, found = kmeans2(points, count, iter=KMEANS_ITERATIONS, minit="++", rng=seed)
        spread = float(((points - centers[found]) ** 2).sum())
        if spread < least:
            best, least = found, spread
    assert best is not None
    return torch.from_numpy(best).long()
