"""NTS-Net (Yang et al., ECCV 2018, https://arxiv.org/abs/1809.00287): Navigator, Teacher, Scrutinizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.errors import UsageError, check_choice, first_line
from crossx.layers import Navigator, crop_boxes, select_boxes
from crossx.losses import RankingLoss
from crossx.methods.base import Method, Objective, register_method
from crossx.schema import MAX_IMAGE_SIZE

PartsReduction: TypeAlias = Literal["mean", "sum"]


class Regions(NamedTuple):
    """Regions chosen in a batch of images, best first, and the features of both.

    Attributes:
        image: Pooled features of the images, (B, C).
        parts: Pooled features of the regions' crops, (B, n, C).
        scores: The Navigator's scores of the regions, (B, n).
    """

    image: Tensor
    parts: Tensor
    scores: Tensor


@register_method("nts")
class NTSNet(Method):
    """A Navigator proposes regions, a Teacher judges their crops, a Scrutinizer classifies the best with the image.

    Args:
        backbone: The trunk; images and crops go through the same.
        num_classes: K.
        num_proposals: M, the regions that the Navigator learns from in training.
        num_crops: K of the paper, the best regions, which are classified together with the image.
        crop_size: Side of the crops in pixels; by default half of the image's shorter side, the paper's 224 of 448.
        anchor_sizes: Anchor size of each of the Navigator's three levels, in pixels of an image of 448 pixels; they
            grow and shrink with the image.
        iou_threshold: Intersection over union from which on a region is left out beside a better one.
        margin: By how much the better of two regions is to score higher.
        dropout: On the pooled features of image and crops, in training. Released code: 0.5, and in evaluation too.
        parts_reduction: ``mean`` of the crops' cross-entropies over the M regions (released code), or their ``sum``.

    Raises:
        UsageError: For an option that cannot work.
    """

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
    ) -> None:
        super().__init__(backbone, num_classes)
        if not 1 <= num_crops <= num_proposals:
            raise UsageError(
                f"num_crops must be from 1 to num_proposals, {num_proposals}, not {num_crops}: the crops are the best "
                "of the proposals."
            )
        if crop_size is not None and not 2 <= crop_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"crop_size must lie between 2 and {MAX_IMAGE_SIZE}, not {crop_size}.")
        if len(anchor_sizes) != 3 or min(anchor_sizes) <= 0:
            raise UsageError(f"anchor_sizes takes 3 numbers above 0, not {list(anchor_sizes)}.")
        if not 0 < iou_threshold <= 1:
            raise UsageError(f"iou_threshold must be above 0 and at most 1, not {iou_threshold}.")
        if margin < 0:
            raise UsageError(f"margin takes no negative number: {margin}.")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, not {dropout}.")
        check_choice("parts_reduction", parts_reduction, get_args(PartsReduction))
        self.num_proposals, self.num_crops = num_proposals, num_crops
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

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return head name -> logits (B, K): ``raw`` of the image, ``parts`` the mean of the crops', and ``joined``."""
        regions = self._look(images, self.num_crops)
        return {
            "raw": self.raw(regions.image),
            "parts": self.teacher(regions.parts).mean(1),
            "joined": self.scrutinizer(self._join(regions)),
        }

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Return the Scrutinizer's logits alone, ``joined``."""
        return heads["joined"]

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the sum of ``raw``, ``joined`` and ``parts``, cross-entropies, and ``ranking``.

        ``parts`` is taken over all M regions, ``joined`` sees the best K. The Teacher's losses that order the regions
        have neither label smoothing nor class weights.
        """
        regions = self._look(images, self.num_proposals)
        joined = self.scrutinizer(self._join(regions))
        parts = self.teacher(regions.parts).flatten(0, 1)
        of_parts = targets.repeat_interleave(self.num_proposals, 0)
        losses = F.cross_entropy(parts.detach().float(), of_parts, reduction="none")
        terms = {
            "raw": self.criterion(self.raw(regions.image), targets),
            "joined": self.criterion(joined, targets),
            "parts": self.parts_weight * self.criterion(parts, of_parts),
            "ranking": self.ranking(regions.scores, losses.view_as(regions.scores)),
        }
        return Objective.of(terms, joined)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> the channel mean of the image's last map, (B, 1, h, w)."""
        return {"last": self.backbone(images)["last"].mean(1, keepdim=True)}

    def boxes(self, images: Tensor) -> Tensor:
        """Return the regions that the prediction looks at again; see ``Method.boxes``."""
        return self._propose(self.backbone(images)["last"], images, self.num_crops)[0]

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the features of the crops and of the image, joined, (B, D)."""
        return self._join(self._look(images, self.num_crops))

    def check_image_size(self, size: int) -> None:
        """Check that the backbone takes the crops, too; see ``Method.check_image_size``."""
        super().check_image_size(size)
        anchors = self.navigator.num_anchors(self.backbone.map_size(size))
        if anchors < self.num_proposals:
            raise UsageError(
                f"num_proposals {self.num_proposals}: images of {size} pixels have {anchors} anchors to choose from."
            )
        crop = self.crop_size or size // 2
        try:
            self.backbone.map_size(crop)
        except UsageError as error:
            raise UsageError(
                f"method 'nts' cuts crops of {crop} pixels, which backbone {self.backbone.name!r} does not take "
                f"({first_line(error.__cause__ or error)}). Use --model.crop_size {size}, or for a ViT "
                "--model.backbone_args.dynamic_img_size true."
            ) from error

    def _look(self, images: Tensor, count: int) -> Regions:
        maps = self.backbone(images)["last"]
        boxes, scores = self._propose(maps, images, count)
        size = self.crop_size or min(images.shape[2:]) // 2
        crops = crop_boxes(images, boxes, size).flatten(0, 1)
        parts = self.backbone(crops)["last"].mean((2, 3)).unflatten(0, (-1, count))
        return Regions(self.dropout(maps.mean((2, 3))), self.dropout(parts), scores)

    def _propose(self, maps: Tensor, images: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the best regions of the images, (B, n, 4), and their scores (B, n), of their last maps."""
        boxes, scores = self.navigator(maps.detach(), images.shape[2:])
        best = select_boxes(boxes, scores, count, self.iou_threshold)
        return boxes[best], scores.gather(1, best)

    def _join(self, regions: Regions) -> Tensor:
        return torch.cat([regions.parts[:, : self.num_crops].flatten(1), regions.image], 1)
