"""RA-CNN: recurrent attention (Fu et al., CVPR 2017, https://doi.org/10.1109/CVPR.2017.476)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.distributed import at_least_float32, batch_mean
from crossx.errors import UsageError
from crossx.layers import evaluation_mode, join_normalized, zoom
from crossx.losses import scale_ranking_loss
from crossx.methods.base import Method, Objective, Phase
from crossx.methods.registry import register_method
from crossx.schema.model import MAX_IMAGE_SIZE

log = logging.getLogger(__name__)

MAX_SCALES = 5
MAX_UNITS = 8192
MAX_INPUTS = 512 * 14 * 14
"""Inputs of the attention proposal network: VGG-19's conv5_4, pooled to 14 x 14. Larger maps are pooled to fit."""
LENGTH = 128.0
"""Length of its normalised input: learning rates then fit maps of every size and every backbone."""
START_SIDE = 0.5
"""Side of the region that the attention starts from, as a share of what it is cut from."""
START_RATE, START_MOMENTUM, START_BETA = 0.03, 0.9, 0.1
"""SGD of the pretraining, and the distance from which its smooth L1 loss is linear."""

CLASSIFICATION = Phase("classification", ("backbone.", "finer.", "heads."))
ATTENTION = Phase("attention", ("proposals.",))


class Scales(NamedTuple):
    """What the scales see, coarse to fine.

    Attributes:
        features: Pooled features, S x (B, C).
        regions: Region of each finer scale in shares of the image's sides: left, top, right, bottom, (B, S - 1, 4).
    """

    features: list[Tensor]
    regions: Tensor


class AttentionProposal(nn.Module):
    """Propose a square region from a map: two linear layers with tanh between and sigmoids at the end.

    The outputs are the side of the region, between ``min_side`` and 1, and its centre, at which the region is inside
    of what the map shows, in shares of the sides. At first all regions have nearly the side ``START_SIDE``.

    Args:
        channels: C of the maps.
        map_size: (h, w) of the maps. If they have more than ``MAX_INPUTS`` values, they are max-pooled.
        units: Width of the first layer.
        min_side: The smallest side.
    """

    def __init__(self, channels: int, map_size: tuple[int, int], units: int, min_side: float) -> None:
        super().__init__()
        height, width = map_size
        factor = 1
        while channels * math.ceil(height / factor) * math.ceil(width / factor) > MAX_INPUTS and factor < max(
            map_size
        ):
            factor += 1
        self.grid = math.ceil(height / factor), math.ceil(width / factor)
        self.min_side = min_side
        self.hidden = nn.Linear(channels * self.grid[0] * self.grid[1], units)
        self.output = nn.Linear(units, 3)
        # small, so that inputs of this length leave tanh linear
        nn.init.normal_(self.hidden.weight, std=0.1 / LENGTH)
        nn.init.zeros_(self.hidden.bias)
        share = (self.start_side - min_side) / (1 - min_side)
        nn.init.zeros_(self.output.bias)
        nn.init.constant_(self.output.bias[2:], math.log(share / (1 - share)))

    @property
    def start_side(self) -> float:
        """The side that it starts from; not the smallest, at which the sigmoid would be flat."""
        return max(START_SIDE, self.min_side + 0.1 * (1 - self.min_side))

    def forward(self, maps: Tensor) -> Tensor:
        """Return left, top, right, bottom, (B, 4), in shares of the sides, for maps (B, C, h, w)."""
        if maps.shape[-2:] != self.grid:
            maps = F.adaptive_max_pool2d(maps, self.grid)
        # no autocast: half precision has too few digits for a position
        with torch.autocast(maps.device.type, enabled=False):
            inputs = F.normalize(at_least_float32(maps.flatten(1))) * LENGTH  # (B, C, h, w) -> (B, C*h*w)
            outputs = self.output(self.hidden(inputs.to(self.hidden.weight.dtype)).tanh())
            outputs = at_least_float32(outputs).sigmoid()  # (B, 3)
            side = self.min_side + (1 - self.min_side) * outputs[:, 2:]
            corner = (1 - side) * outputs[:, :2]
            return torch.cat([corner, corner + side], 1)


@register_method("ra_cnn")
class RACNN(Method):
    """Scales that zoom in: each finer trunk sees the region that the coarser one proposes.

    Classification and attention are trained in turn, an epoch each (``phase_at``).

    Args:
        backbone: The trunk of the first scale; the finer ones are its clones.
        num_classes: K.
        num_scales: S.
        crop_size: Side of the zoomed regions in pixels. Default: half of the shorter side of what the first trunk sees
            of the image (224 of 448 in the paper).
        margin: Margin by which a finer scale should be more confident of the true class than the coarser one.
        min_side: Smallest side of a region, as a share of the side of what it is cut from.
        attention_units: Width of the attention proposal networks.
        attention_every: Every n-th epoch trains the attention, the others the classification; at least 2.
        attention_lr_factor: Learning-rate factor of the attention's epochs. Large steps move its regions away from the
            object.
        pretraining_batches: Batches, at most those of one epoch, on which the attention is trained towards the
            strongest responses before the first epoch; 0 leaves its regions near the centre.
        view_size: Side in pixels to which images are resized for the first trunk, while regions are cut from the images
            themselves, with more detail. Default: that of the images.
    """

    stops_gradients = True

    curve_titles: ClassVar[dict[str, str]] = {
        "data": "Classification terms",
        "ranking": "Ranking of the scales",
        "confidence": "Probability of the true class",
        "side": "Side of the regions, share of the image",
    }

    citation = """\
@inproceedings{fu2017look,
  title     = {Look Closer to See Better: Recurrent Attention Convolutional Neural Network
               for Fine-grained Image Recognition},
  author    = {Fu, Jianlong and Zheng, Heliang and Mei, Tao},
  booktitle = {CVPR},
  year      = {2017}
}"""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        num_scales: int = 3,
        crop_size: int | None = None,
        margin: float = 0.05,
        min_side: float = 1 / 3,
        attention_units: int = 1024,
        attention_every: int = 2,
        attention_lr_factor: float = 0.01,
        pretraining_batches: int = 500,
        view_size: int | None = None,
    ) -> None:
        super().__init__(backbone, num_classes)
        if not 2 <= num_scales <= MAX_SCALES:
            raise UsageError(f"num_scales must be between 2 and {MAX_SCALES}, not {num_scales}.")
        if crop_size is not None and not 2 <= crop_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"crop_size must be between 2 and {MAX_IMAGE_SIZE}, not {crop_size}.")
        if not 0 <= margin <= 1:
            raise UsageError(f"margin must be between 0 and 1, not {margin}.")
        if not 0.1 <= min_side <= 0.9:
            raise UsageError(f"min_side must be between 0.1 and 0.9, not {min_side}.")
        if not 1 <= attention_units <= MAX_UNITS:
            raise UsageError(f"attention_units must be between 1 and {MAX_UNITS}, not {attention_units}.")
        if attention_every < 2:
            raise UsageError(f"attention_every must be at least 2, not {attention_every}.")
        if not 0 < attention_lr_factor <= 100:
            raise UsageError(
                f"attention_lr_factor must be above 0 and at most 100, not {attention_lr_factor}."
            )
        if pretraining_batches < 0:
            raise UsageError(f"pretraining_batches must be at least 0, not {pretraining_batches}.")

        self.crop_size, self.margin = crop_size, margin
        self.attention_every, self.pretraining_batches = attention_every, pretraining_batches
        self.attention = replace(ATTENTION, lr_factor=attention_lr_factor)
        backbone.drop_head()
        self.stage = backbone.unpooled_stage
        channels = backbone.channels[self.stage]
        view = backbone.image_size
        self._check_crops(view)
        self.finer = nn.ModuleList(backbone.clone() for _ in range(num_scales - 1))
        self.proposals = nn.ModuleList(
            AttentionProposal(channels, backbone.map_size(size, self.stage), attention_units, min_side)
            for size in [view, *[crop_size or view // 2] * (num_scales - 2)]
        )
        self.heads = nn.ModuleDict(
            {
                **{f"scale_{scale}": nn.Linear(channels, num_classes) for scale in range(1, num_scales + 1)},
                "joined": nn.Linear(num_scales * channels, num_classes),
            }
        )

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of each scale, ``scale_1`` (the image) to the finest, and of ``joined`` (all)."""
        features = self._scales(images).features
        return self._logits(features, join_normalized(features))

    def combine_heads(self, heads: Mapping[str, Tensor]) -> Tensor:
        """Return only the logits of ``joined``."""
        return heads["joined"]

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the sum of the cross-entropies of all heads, ``data_...``, and of the ``ranking`` loss of the scales.

        In the phases of a training, the terms of the other phase have no gradient. The measures are the mean
        probability of the true class at each scale and the mean side of the regions as a share of the image's.
        """
        features, regions = self._scales(images)
        # each trunk learns from its own scale alone
        logits = self._logits(features, join_normalized(features).detach())
        terms = self.head_terms(logits, targets)
        shares = targets if targets.is_floating_point() else F.one_hot(targets, self.num_classes)
        # S x (B, K) -> (B, S, K)
        scales = torch.stack([own for name, own in logits.items() if name != "joined"], 1)
        confidence = (at_least_float32(scales).softmax(2) * shares[:, None]).sum(2)  # -> (B, S)
        ranking = scale_ranking_loss(confidence, self.margin)
        if self.phase.name == ATTENTION.name:
            terms = {name: term.detach() for name, term in terms.items()}
        if self.phase.name == CLASSIFICATION.name:
            ranking = ranking.detach()
        sides = (regions[..., 2] - regions[..., 0]).detach()
        measures = {**_numbered("confidence", confidence.detach(), 1), **_numbered("side", sides, 2)}
        return Objective.of({**terms, "ranking": ranking}, logits["joined"], measures)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the stage -> the channel mean of the first scale's map, (B, 1, h, w)."""
        maps = self.backbone(self.view(images))[self.stage]
        return {self.stage: maps.mean(1, keepdim=True)}  # (B, C, h, w) -> (B, 1, h, w)

    def boxes(self, images: Tensor) -> Tensor:
        """Return the regions of the finer scales, coarse to fine; see ``Method.boxes``."""
        return _pixels(self._scales(images).regions, images)

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the normalised features of all scales, concatenated, (B, S C)."""
        return join_normalized(self._scales(images).features)

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return the classifiers of the scales and ``joined``."""
        return dict(self.heads.items())  # type: ignore[arg-type]

    def head_features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of each scale, (B, C), and those joined, (B, S C); see ``Method``."""
        features = self._scales(images).features
        return dict(zip(self.heads, [*features, join_normalized(features)], strict=True))

    def head_terms(self, heads: Mapping[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Return the cross-entropies of all heads, ``data_...``."""
        return {f"data_{name}": self.criterion(logits, targets) for name, logits in heads.items()}

    def prepare(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Train the attention, by one step per batch, towards the region with the strongest response of each map.

        That region, not the proposed one, is what the next scale sees.

        Logs how far the centres were from those regions on the last half of the batches, before their steps, next to
        the distance of the best constant.
        """
        if not self.pretraining_batches:
            return
        optimizer = torch.optim.SGD(self.proposals.parameters(), lr=START_RATE, momentum=START_MOMENTUM)
        trunks = [self.backbone, *self.finer][:-1]
        centres: list[Tensor] = []
        with evaluation_mode(self), torch.enable_grad():
            for images, *_ in islice(batches, self.pretraining_batches):
                optimizer.zero_grad()
                view = self.view(images)
                size = self._crop_size(view)
                for trunk, proposal in zip(trunks, self.proposals, strict=True):
                    assert isinstance(proposal, AttentionProposal)
                    with torch.no_grad():
                        maps = trunk(view)[self.stage]
                        wanted = strongest_region(maps, proposal.start_side)
                        images = view = zoom(images, _pixels(wanted, images), size)
                    region = proposal(maps)
                    F.smooth_l1_loss(region, wanted, beta=START_BETA).backward()
                    pair = torch.stack([region.detach(), wanted])  # (2, B, 4)
                    centres.append((pair[..., :2] + pair[..., 2:]) / 2)
                optimizer.step()
        self.proposals.zero_grad()
        for scale in range(len(trunks)):
            own = centres[scale :: len(trunks)]
            found, wanted = torch.cat(own[len(own) // 2 :], 1)  # n/B x (2, B, 2) -> (2, n, 2)
            log.info(
                "attention of scale %d: centres %.3f of the side from the strongest responses, a constant %.3f",
                scale + 1,
                (found - wanted).abs().mean(),
                (wanted.median(0).values - wanted).abs().mean(),
            )

    def phase_at(self, epoch: int, epochs: int) -> Phase:
        """Return the attention phase every ``attention_every`` epochs, never in the first or the last one."""
        attends = epoch > 0 and (epochs - epoch) % self.attention_every == 0
        return self.attention if attends else CLASSIFICATION

    def check_image_size(self, size: int) -> None:
        """Check that the backbone accepts both images and zoomed regions; see ``Method.check_image_size``."""
        super().check_image_size(size)
        self._check_crops(self.view_size or size)

    def _check_crops(self, view: int) -> None:
        self._check_second_size("crop", self.crop_size or max(2, view // 2), view)

    def _crop_size(self, view: Tensor) -> int:
        return self.crop_size or max(2, min(view.shape[2:]) // 2)

    def _scales(self, images: Tensor) -> Scales:
        view = self.view(images)
        size = self._crop_size(view)
        maps = self.backbone(view)[self.stage]
        features, regions = [maps.mean((2, 3))], []  # (B, C, h, w) -> (B, C)
        corner, side = torch.zeros(1, 2, device=images.device), torch.ones(1, 2, device=images.device)
        for trunk, proposal in zip(self.finer, self.proposals, strict=True):
            # the attention's input is no concern of the classification
            region = proposal(maps if self.phase.name == ATTENTION.name else maps.detach())
            images = zoom(images, _pixels(region, images), size)
            maps = trunk(images)[self.stage]
            features.append(maps.mean((2, 3)))  # (B, C, h, w) -> (B, C)
            # from shares of what it was cut from to shares of the image
            region = corner.repeat(1, 2) + region * side.repeat(1, 2)
            corner, side = region[:, :2], region[:, 2:] - region[:, :2]
            regions.append(region)
        return Scales(features, torch.stack(regions, 1))

    def _logits(self, features: Sequence[Tensor], joined: Tensor) -> dict[str, Tensor]:
        """Return the logits of the heads from the features of the scales, S x (B, C), and those joined, (B, S*C)."""
        logits = {
            f"scale_{scale}": self.heads[f"scale_{scale}"](own) for scale, own in enumerate(features, 1)
        }
        return {**logits, "joined": self.heads["joined"](joined)}


def strongest_region(maps: Tensor, side: float) -> Tensor:
    """Return the square region of maps (B, C, h, w) with the highest mean response.

    It is searched at whole spatial positions: windows of about ``side`` times the map's sides.

    Returns:
        (B, 4): left, top, right, bottom in shares of the sides; a square of ``side`` inside of 0 and 1.
    """
    height, width = maps.shape[2:]
    rows, columns = (max(1, round(side * length)) for length in (height, width))
    means = F.avg_pool2d(maps.float().mean(1, keepdim=True), (rows, columns), 1)[:, 0]  # -> (B, h', w')
    best = means.flatten(1).argmax(1)  # -> (B,)
    count = means.shape[2]
    centre = torch.stack([(best % count + columns / 2) / width, (best // count + rows / 2) / height], 1)
    centre = centre.clamp(side / 2, 1 - side / 2)
    return torch.cat([centre - side / 2, centre + side / 2], 1)


def _pixels(regions: Tensor, images: Tensor) -> Tensor:
    """Return regions (..., 4) in shares of the sides of images (B, C, H, W) as pixels."""
    height, width = images.shape[2:]
    return regions * torch.tensor([width, height, width, height], dtype=regions.dtype, device=regions.device)


def _numbered(name: str, values: Tensor, first: int) -> dict[str, Tensor]:
    """Return the means over the batch of values (B, n), numbered from ``first``."""
    means = [batch_mean(mean, len(values)) for mean in values.mean(0)]
    return {f"{name}_{number}": mean for number, mean in enumerate(means, first)}
