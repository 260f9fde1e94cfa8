"""NTS-Net (Yang et al., ECCV 2018, https://arxiv.org/abs/1809.00287): Navigator, Teacher, Scrutinizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.errors import UsageError, check_positive
from crossx.layers import Navigator, OwnStatistics, crop_boxes, select_boxes
from crossx.losses import RankingLoss
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method
from crossx.schema.model import MAX_IMAGE_SIZE

PartsReduction: TypeAlias = Literal["mean", "sum"]
CropStatistics: TypeAlias = Literal["shared", "own"]


class RegionFeatures(NamedTuple):
    """Pooled features of images and of their best regions, best first.

    Attributes:
        image: Features of the images, (B, C).
        parts: Features of the regions' crops, (B, n, C).
        scores: Scores of the regions by the Navigator, (B, n).
    """

    image: Tensor
    parts: Tensor
    scores: Tensor


@register_method("nts")
class NTSNet(Method):
    """A Navigator proposes regions, a Teacher judges their crops, a Scrutinizer classifies the image with the best.

    Args:
        backbone: The trunk, shared by images and crops.
        num_classes: K.
        num_proposals: M, the number of regions that the Navigator learns from in training.
        num_crops: K in the paper, the number of best regions that are classified together with the image.
        crop_size: Side of the crops in pixels. Default: half of the shorter side of what the trunk sees of the image
            (224 of 448 in the paper).
        anchor_sizes: Anchor size of each of the Navigator's three levels, in pixels for an image of 448 pixels; they
            scale with the image.
        iou_threshold: IoU with a better region at or above which a region is suppressed.
        margin: Margin by which the better of two regions should score higher.
        dropout: Dropout on the pooled features of image and crops, in training only. The released code applies its 0.5
            in evaluation too.
        parts_reduction: ``mean`` (released code) or ``sum`` of the cross-entropies of the M crops.
        crop_statistics: Running statistics of the trunk's batch norms for crops: those of the images too (``shared``,
            released code), or their ``own``. Shared ones fit neither: crops are smaller and show other things.
        navigator_lr_factor: Learning rate of the Navigator relative to that of other new layers, the classifiers. If
            these are fitted (``optim.fit_heads``), it alone starts at random.
        view_size: Side in pixels to which images are resized for the trunk, while regions are cropped from the images
            themselves, with more detail. Default: that of the images.
    """

    stops_gradients = True

    citation = """\
@inproceedings{yang2018learning,
  title     = {Learning to Navigate for Fine-grained Classification},
  author    = {Yang, Ze and Luo, Tiange and Wang, Dong and Hu, Zhiqiang and Gao, Jun and Wang, Liwei},
  booktitle = {ECCV},
  year      = {2018}
}"""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_proposals: int = 6,
        num_crops: int = 4,
        crop_size: int | None = None,
        anchor_sizes: Sequence[float] = (48.0, 96.0, 192.0),
        iou_threshold: float = 0.25,
        margin: float = 1.0,
        dropout: float = 0.5,
        parts_reduction: PartsReduction = "mean",
        crop_statistics: CropStatistics = "shared",
        navigator_lr_factor: float = 1.0,
        view_size: int | None = None,
    ) -> None:
        super().__init__(backbone, num_classes)
        if not 1 <= num_crops <= num_proposals:
            raise UsageError(
                f"num_crops must be between 1 and num_proposals, {num_proposals}, not {num_crops}: "
                "the crops are the best proposals."
            )
        if crop_size is not None and not 2 <= crop_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"crop_size must be between 2 and {MAX_IMAGE_SIZE}, not {crop_size}.")
        if len(anchor_sizes) != 3 or min(anchor_sizes) <= 0:
            raise UsageError(f"anchor_sizes must be 3 numbers above 0, not {list(anchor_sizes)}.")
        if not 0 < iou_threshold <= 1:
            raise UsageError(f"iou_threshold must be above 0 and at most 1, not {iou_threshold}.")
        if margin < 0:
            raise UsageError(f"margin must be at least 0, not {margin}.")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}.")
        check_positive("navigator_lr_factor", navigator_lr_factor)

        self.num_proposals, self.num_crops = num_proposals, num_crops
        self.navigator_lr_factor = navigator_lr_factor
        self.crop_size, self.iou_threshold = crop_size, iou_threshold
        self.parts_weight = num_proposals if parts_reduction == "sum" else 1
        backbone.drop_head()
        channels = backbone.channels["last"]
        self.navigator = Navigator(channels, backbone.strides["last"], anchor_sizes)
        self.dropout = nn.Dropout(dropout)
        self.raw = nn.Linear(channels, num_classes)
        self.teacher = nn.Linear(channels, num_classes)
        self.scrutinizer = nn.Linear((num_crops + 1) * channels, num_classes)
        self.ranking = RankingLoss(margin)
        self.crop_statistics = OwnStatistics(backbone) if crop_statistics == "own" else None

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of ``raw`` (the image), ``parts`` (the mean over the crops) and ``joined`` (both)."""
        logits = self._logits(self.head_features(images))
        return {**logits, "parts": logits["parts"].mean(1)}  # (B, n, K) -> (B, K)

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Return only the logits of the Scrutinizer, ``joined``."""
        return heads["joined"]

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the sum of the cross-entropies ``raw``, ``joined`` and ``parts`` and of the ``ranking`` loss.

        ``parts`` covers all M regions, ``joined`` the best K. The Teacher's losses that rank the regions use neither
        label smoothing nor class weights.
        """
        regions = self._region_features(images, self.num_proposals)
        logits = self._logits(self._inputs(regions))
        parts = logits["parts"].detach().float().flatten(0, 1)  # (B, M, K) -> (B*M, K)
        part_targets = targets.repeat_interleave(self.num_proposals, 0)  # (B, ...) -> (B*M, ...)
        losses = F.cross_entropy(parts, part_targets, reduction="none")
        terms = {
            **self.head_terms(logits, targets),
            "ranking": self.ranking(regions.scores, losses.view_as(regions.scores)),  # (B*M,) -> (B, M)
        }
        return Objective.of(terms, logits["joined"])

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return the classifiers of the image, ``raw``, of each crop, ``parts``, and of both, ``joined``."""
        return {"raw": self.raw, "parts": self.teacher, "joined": self.scrutinizer}

    def head_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return what the heads see: (B, C), (B, n, C) and (B, (n + 1) C); see ``Method``."""
        return self._inputs(self._region_features(images, self.num_crops))

    @torch.no_grad()
    def start_from_fitted(self) -> None:
        """Let ``joined`` start as ``raw``, with weights of 0 for the crops.

        The Navigator is untrained when the heads are fitted, and a Scrutinizer that was fitted on its arbitrary crops
        predicts worse than the image alone (docs/methods/nts.md).
        """
        self.scrutinizer.weight.zero_()
        self.scrutinizer.weight[:, -self.raw.in_features :] = self.raw.weight  # the image is last
        self.scrutinizer.bias.copy_(self.raw.bias)

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropies ``raw``, ``joined`` and, of each crop, ``parts``."""
        return {
            "raw": self.criterion(heads["raw"], targets),
            "joined": self.criterion(heads["joined"], targets),
            "parts": self.parts_weight * self.head_loss(heads["parts"], targets),
        }

    def lr_factors(self) -> dict[str, float]:
        """Return the factor of the Navigator."""
        return {"navigator.": self.navigator_lr_factor}

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> the channel mean of the image's last map, (B, 1, h, w)."""
        maps = self.backbone(self.view(images))["last"]
        return {"last": maps.mean(1, keepdim=True)}  # (B, C, h, w) -> (B, 1, h, w)

    def boxes(self, images: Tensor) -> Tensor:
        """Return the regions that are classified with the image; see ``Method.boxes``."""
        view = self.view(images)
        return self._propose(self.backbone(view)["last"], images, view, self.num_crops)[0]

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the features of the crops and of the image, concatenated, (B, D)."""
        return self._join(self._region_features(images, self.num_crops))

    def check_image_size(self, size: int) -> None:
        """Check that the backbone accepts both images and crops; see ``Method.check_image_size``."""
        super().check_image_size(size)
        size = self.view_size or size
        anchors = self.navigator.num_anchors(self.backbone.map_size(size))
        if anchors < self.num_proposals:
            raise UsageError(
                f"num_proposals {self.num_proposals} is too large: images of {size} pixels have {anchors} anchors."
            )
        self._check_second_size("crop", self.crop_size or size // 2, size)

    def _region_features(self, images: Tensor, count: int) -> RegionFeatures:
        view = self.view(images)
        maps = self.backbone(view)["last"]
        boxes, scores = self._propose(maps, images, view, count)
        size = self.crop_size or min(view.shape[2:]) // 2
        crops = crop_boxes(images, boxes, size).flatten(0, 1)  # (B, n, 3, s, s) -> (B*n, 3, s, s)
        statistics = self.crop_statistics
        crop_maps = (statistics(self.backbone, crops) if statistics else self.backbone(crops))["last"]
        parts = crop_maps.mean((2, 3))  # (B*n, C, h, w) -> (B*n, C)
        parts = parts.unflatten(0, (-1, count))  # -> (B, n, C)
        image = maps.mean((2, 3))  # (B, C, h, w) -> (B, C)
        return RegionFeatures(self.dropout(image), self.dropout(parts), scores)

    def _propose(self, maps: Tensor, images: Tensor, view: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the best regions, (B, n, 4), and their scores, (B, n), from the last maps (B, C, h, w) of the view."""
        boxes, scores = self.navigator(maps.detach(), view.shape[2:])
        best = select_boxes(boxes, scores, count, self.iou_threshold)
        if self.view_size is not None:  # from pixels of the view to whole pixels of the image
            (height, width), (rows, columns) = images.shape[2:], view.shape[2:]
            scale = torch.tensor([width / columns, height / rows], device=boxes.device).repeat(2)
            boxes = (boxes * scale).round()
        return boxes[best], scores.gather(1, best)  # (N, 4) -> (B, n, 4); (B, N) -> (B, n)

    def _join(self, regions: RegionFeatures) -> Tensor:
        # (B, n, C) and (B, C) -> (B, (num_crops + 1)*C)
        return torch.cat([regions.parts[:, : self.num_crops].flatten(1), regions.image], 1)

    def _inputs(self, regions: RegionFeatures) -> dict[str, Tensor]:
        return {"raw": regions.image, "parts": regions.parts, "joined": self._join(regions)}

    def _logits(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: head(inputs[name]) for name, head in self.linear_heads().items()}
