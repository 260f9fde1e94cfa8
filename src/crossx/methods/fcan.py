"""FCAN: fully convolutional attention, learnt by REINFORCE (Liu et al. 2016, https://arxiv.org/abs/1603.06765)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.distributed import at_least_float32, batch_mean
from crossx.errors import UsageError, check_positive
from crossx.layers import OwnStatistics, crop_boxes, square_corners
from crossx.losses import reinforce_loss
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method
from crossx.schema.model import MAX_IMAGE_SIZE

Reward: TypeAlias = Literal["greedy", "final"]
Baseline: TypeAlias = Literal["learnt", "none"]
CropStatistics: TypeAlias = Literal["shared", "own"]

MAX_PARTS = 16
WIDTH = 64
"""Channels of the attention of each part."""


class Glimpses(NamedTuple):
    """The image and its parts, as the classifiers see them.

    Attributes:
        image: Pooled features of the images, (B, C).
        parts: Pooled features of the crops, (B, P, C).
        attention: Logarithms of the attention maps, float32 (B, P, h, w).
        positions: Spatial position that each part is cropped at, row by row, int64 (B, P).
    """

    image: Tensor
    parts: Tensor
    attention: Tensor
    positions: Tensor


@register_method("fcan")
class FCAN(Method):
    """Crops parts at positions of attention maps, which learn from rewards, and averages what all classifiers say.

    Args:
        backbone: The trunk, shared by images and crops.
        num_classes: K.
        num_parts: P, the number of parts.
        crop_share: Side of the parts as a share of the image's shorter side.
        crop_size: Side of the crops in pixels, to which parts are resized. Default: the parts' own side.
        reward: ``greedy``: 1 for each part whose classifier is correct and has a smaller loss than that of the part
            before, if any. ``final``: 1 for all parts if the prediction is correct. Otherwise 0.
        baseline: What is subtracted from the rewards: the ``learnt`` mean reward of the part, or nothing (``none``).
        parts_weight: Weight of the mean cross-entropy of the parts.
        attention_weight: Weight of the policy gradient.
        crop_statistics: Running statistics of the trunk's batch norms for crops: their ``own``, or those of the images
            too (``shared``).
        view_size: Side in pixels to which images are resized for the trunk, while parts are cropped from the images
            themselves, with more detail. Default: that of the images.
    """

    stops_gradients = True

    citation = """\
@inproceedings{liu2016fully,
  title     = {Fully Convolutional Attention Networks for Fine-Grained Recognition},
  author    = {Liu, Xiao and Xia, Tian and Wang, Jiang and Yang, Yi and Zhou, Feng and Lin, Yuanqing},
  booktitle = {arXiv preprint arXiv:1603.06765},
  year      = {2016}
}"""

    curve_titles: ClassVar[dict[str, str]] = {
        "image": "Classification of the image",
        "parts": "Classification of the parts",
        "attention": "Policy gradient",
        "baseline": "Error of the baseline",
        "reward": "Mean reward",
        "entropy": "Entropy of the attention maps",
    }

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_parts: int = 3,
        crop_share: float = 0.5,
        crop_size: int | None = None,
        reward: Reward = "greedy",
        baseline: Baseline = "learnt",
        parts_weight: float = 1.0,
        attention_weight: float = 3.0,
        crop_statistics: CropStatistics = "own",
        view_size: int | None = None,
    ) -> None:
        super().__init__(backbone, num_classes)
        if not 1 <= num_parts <= MAX_PARTS:
            raise UsageError(f"num_parts must be between 1 and {MAX_PARTS}, not {num_parts}.")
        if not 0 < crop_share <= 1:
            raise UsageError(f"crop_share must be above 0 and at most 1, not {crop_share}.")
        if crop_size is not None and not 2 <= crop_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"crop_size must be between 2 and {MAX_IMAGE_SIZE}, not {crop_size}.")
        for name, weight in (("parts_weight", parts_weight), ("attention_weight", attention_weight)):
            check_positive(name, weight)

        self.num_parts, self.crop_share, self.crop_size = num_parts, crop_share, crop_size
        self.reward, self.parts_weight, self.attention_weight = reward, parts_weight, attention_weight
        backbone.drop_head()
        channels = backbone.channels["last"]
        self.attention = nn.Sequential(
            nn.Conv2d(channels, num_parts * WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(num_parts * WIDTH, num_parts, 3, padding=1, groups=num_parts),
        )
        self.image = nn.Linear(channels, num_classes)
        self.parts = nn.ModuleList(nn.Linear(channels, num_classes) for _ in range(num_parts))
        # of the logistic function, so that it stays within the rewards at any learning rate
        self.baseline = nn.Parameter(torch.zeros(num_parts)) if baseline == "learnt" else None
        self.crop_statistics = OwnStatistics(backbone) if crop_statistics == "own" else None

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of ``image`` and of ``part1`` to ``partP``."""
        return self._classify(self._look(images))

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Return the logarithms of the mean of the image's probabilities and the parts' average."""
        image, *parts = (logits.float().log_softmax(1) for logits in heads.values())
        average = torch.stack(parts).logsumexp(0) - math.log(len(parts))
        return torch.logaddexp(image, average) - math.log(2)

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return the classifiers of the image and of the parts; see ``Method``."""
        parts = {f"part{number}": head for number, head in enumerate(self.parts, start=1)}
        return {"image": self.image, **parts}  # type: ignore[dict-item]

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropies ``image`` and, averaged over the parts and weighted, ``parts``."""
        image, *parts = heads.values()
        mean = torch.stack([self.criterion(logits, targets) for logits in parts]).mean()
        return {"image": self.criterion(image, targets), "parts": self.parts_weight * mean}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the sum of the cross-entropies, of the policy gradient and of the error of the baseline.

        The losses that decide the rewards use neither label smoothing nor class weights. The measures are the mean
        reward, and the mean entropy of the attention maps as a share of the largest one.
        """
        glimpses = self._look(images)
        heads = self._classify(glimpses)
        logits = self.combine_heads(heads)
        rewards = self._rewards(heads, logits, targets)
        attention = glimpses.attention.flatten(2)  # (B, P, h, w) -> (B, P, h*w)
        log_probs = attention.gather(2, glimpses.positions[..., None])[..., 0]  # -> (B, P)
        expected = rewards.new_zeros(()) if self.baseline is None else self.baseline.sigmoid()
        surrogate, error = reinforce_loss(log_probs, rewards, expected)
        terms = {**self.head_terms(heads, targets), "attention": self.attention_weight * surrogate}
        if self.baseline is not None:
            terms["baseline"] = error
        entropy = -(attention.exp() * attention).sum(2) / math.log(max(attention.shape[2], 2))
        measures = {"reward": rewards.mean(), "entropy": entropy.detach().mean()}
        return Objective.of(
            terms, logits, {name: batch_mean(value, len(images)) for name, value in measures.items()}
        )

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> the channel mean of the image's map, (B, 1, h, w), and ``attention`` -> (B, P, h, w)."""
        maps = self.backbone(self.view(images))["last"]
        # (B, C, h, w) -> (B, 1, h, w)
        return {"last": maps.mean(1, keepdim=True), "attention": self._attend(maps).exp()}

    def boxes(self, images: Tensor) -> Tensor:
        """Return the parts, in their order; see ``Method.boxes``."""
        attention = self._attend(self.backbone(self.view(images))["last"])
        return self._boxes_at(self._choose(attention), attention, images)

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the features of the image and of the parts, concatenated, (B, D)."""
        glimpses = self._look(images)
        # (B, C) and (B, P, C) -> (B, C + P*C)
        return torch.cat([glimpses.image, glimpses.parts.flatten(1)], 1)

    def check_image_size(self, size: int) -> None:
        """Check that the backbone accepts both images and crops; see ``Method.check_image_size``."""
        super().check_image_size(size)
        view = self.view_size or size
        self._check_second_size("crop", self.crop_size or self._side(size), view)

    def _look(self, images: Tensor) -> Glimpses:
        maps = self.backbone(self.view(images))["last"]
        attention = self._attend(maps)
        positions = self._choose(attention)
        size = self.crop_size or self._side(min(images.shape[2:]))
        crops = crop_boxes(images, self._boxes_at(positions, attention, images), size)
        crops = crops.flatten(0, 1)  # (B, P, 3, s, s) -> (B*P, 3, s, s)
        statistics = self.crop_statistics
        crop_maps = (statistics(self.backbone, crops) if statistics else self.backbone(crops))["last"]
        parts = crop_maps.mean((2, 3)).unflatten(0, (-1, self.num_parts))  # (B*P, C, h, w) -> (B, P, C)
        return Glimpses(maps.mean((2, 3)), parts, attention, positions)

    def _attend(self, maps: Tensor) -> Tensor:
        """Return the log-softmax of the attention over the positions of maps (B, C, h, w), float32 (B, P, h, w)."""
        # no autocast: in half precision, many positions would have equal scores
        with torch.autocast(maps.device.type, enabled=False):
            # features of length 1: the steps of the attention do not depend on the backbone's scale. The trunk learns
            # from the classifiers only, since the policy gradient is noisy
            inputs = F.normalize(at_least_float32(maps.detach())).to(self.parts[0].weight.dtype)  # type: ignore[arg-type]
            scores: Tensor = at_least_float32(self.attention(inputs))
            return scores.flatten(2).log_softmax(2).view_as(scores)

    def _choose(self, attention: Tensor) -> Tensor:
        """Return one position per part, (B, P): the best in evaluation, a sample of the attention in training."""
        scores = attention.detach().flatten(2)  # (B, P, h, w) -> (B, P, h*w)
        if self.training:
            # the maximum after Gumbel noise is a sample; torch.multinomial would stop at scores that are not finite
            scores = scores - torch.empty_like(scores).exponential_().log()
        return scores.argmax(2)

    def _boxes_at(self, positions: Tensor, attention: Tensor, images: Tensor) -> Tensor:
        """Return squares around positions (B, P), moved into the image, (B, P, 4) in whole pixels."""
        side = self._side(min(images.shape[2:]))
        left_top = square_corners(positions, attention.shape[2:], images.shape[2:], side).round()
        return torch.cat([left_top, left_top + side], 2)

    def _side(self, size: int) -> int:
        """Return the side of the parts of an image whose shorter side is ``size``."""
        return max(2, round(self.crop_share * size))

    def _classify(self, glimpses: Glimpses) -> dict[str, Tensor]:
        features = dict(zip(self.linear_heads(), (glimpses.image, *glimpses.parts.unbind(1)), strict=True))
        return {name: head(features[name]) for name, head in self.linear_heads().items()}

    @torch.no_grad()
    def _rewards(self, heads: Mapping[str, Tensor], logits: Tensor, targets: Tensor) -> Tensor:
        """Return 1 or 0 for each part, (B, P), or for all of them, (B, 1)."""
        classes = targets if targets.ndim == 1 else targets.argmax(1)
        if self.reward == "final":
            return (logits.argmax(1) == classes).float()[:, None]
        parts = torch.stack(list(heads.values())[1:], 1).float()  # P x (B, K) -> (B, P, K)
        losses = torch.stack(
            [F.cross_entropy(part, targets, reduction="none") for part in parts.unbind(1)], 1
        )
        falls = torch.cat([torch.ones_like(losses[:, :1]), losses[:, 1:] < losses[:, :-1]], 1)
        return (parts.argmax(2) == classes[:, None]).float() * falls
