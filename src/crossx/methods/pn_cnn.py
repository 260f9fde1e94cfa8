"""PN-CNN: pose-normalized features (Branson et al., BMVC 2014, https://arxiv.org/abs/1406.2952)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossx.backbones import Backbone
from crossx.distributed import batch_mean
from crossx.errors import UsageError
from crossx.layers.similarity import Similarity, fit_similarity, transformed, warp_regions
from crossx.methods.base import Method, Objective
from crossx.methods.registry import register_method
from crossx.schema.model import MAX_IMAGE_SIZE

Stage: TypeAlias = Literal["previous", "last"]
Source: TypeAlias = Literal["true", "predicted"]

NABIRDS_PARTS = (
    "bill",
    "crown",
    "nape",
    "left eye",
    "right eye",
    "belly",
    "breast",
    "back",
    "tail",
    "left wing",
    "right wing",
)
HEAD_WORDS = ("beak", "bill", "crown", "eye", "face", "forehead", "nape", "throat")
"""Words in the names of the parts of a bird's head."""
MAX_PARTS = 64
ITERATIONS = 10
"""Alternations between aligning the shapes of the training images and averaging them."""
MAX_STRETCH = 2.0
"""How many times larger or smaller than usual a region may be: keypoints may be predicted in one spot."""


class Keypoints(NamedTuple):
    """Predicted keypoints of images.

    Attributes:
        scores: Logits of the spatial positions, (B, N, h, w).
        visibility: Logits, (B, N).
        points: x and y in pixels of the image, (B, N, 2).
    """

    scores: Tensor
    visibility: Tensor
    points: Tensor


@register_method("pn_cnn")
class PNCNN(Method):
    """Classifies the whole image together with regions that are aligned by their keypoints.

    Args:
        backbone: The trunk, shared by the image and its regions.
        num_classes: K.
        part_names: Names of the keypoints. Training sets them to those of the dataset. Default: those of NABirds.
        head_parts: The parts that align the head; the others align the body. Default: by the words in their names.
        part_layer: Stage whose pooled map describes a region; the image is described by `last`.
        train_with: Align the regions in training by the `true` keypoints or by the `predicted` ones.
        region_size: Side of the aligned regions in pixels. Default: half of the image's shorter side.
        margin: Side of a region as a multiple of the extent of its keypoints.
        keypoint_weight: Weight of the loss of the keypoints.
    """

    citation = """\
@inproceedings{branson2014bird,
  title     = {Bird Species Categorization Using Pose Normalized Deep Convolutional Nets},
  author    = {Branson, Steve and Van Horn, Grant and Belongie, Serge and Perona, Pietro},
  booktitle = {BMVC},
  year      = {2014}
}"""

    curve_titles: ClassVar[dict[str, str]] = {
        "data": "Classification term",
        "keypoints": "Keypoint term",
        "visibility": "Visibility term",
    }
    uses_parts = True
    supports_soft_targets = False

    references: Tensor
    usual_scales: Tensor
    members: Tensor

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        part_names: Sequence[str] | None = None,
        head_parts: Sequence[str] | None = None,
        part_layer: Stage = "previous",
        train_with: Source = "true",
        region_size: int | None = None,
        margin: float = 1.5,
        keypoint_weight: float = 1.0,
    ) -> None:
        super().__init__(backbone, num_classes)
        names = NABIRDS_PARTS if part_names is None else tuple(part_names)
        if not 1 <= len(names) <= MAX_PARTS or len(set(names)) < len(names):
            raise UsageError(f"part_names must be 1 to {MAX_PARTS} different names, not {list(names)[:10]}.")
        if head_parts is None:
            head_parts = [name for name in names if any(word in name.lower() for word in HEAD_WORDS)]
        if missing := [name for name in head_parts if name not in names]:
            raise UsageError(f"head_parts: {missing[0]!r} is not one of part_names: {', '.join(names)}.")
        if region_size is not None and not 2 <= region_size <= MAX_IMAGE_SIZE:
            raise UsageError(f"region_size must be between 2 and {MAX_IMAGE_SIZE}, not {region_size}.")
        if not 1 <= margin <= 10:
            raise UsageError(f"margin must be between 1 and 10, not {margin}.")
        if keypoint_weight <= 0:
            raise UsageError(f"keypoint_weight must be above 0, not {keypoint_weight}.")

        self.part_layer, self.train_with = part_layer, train_with
        self.region_size, self.margin, self.keypoint_weight = region_size, margin, keypoint_weight
        head = [name in head_parts for name in names]
        groups = [group for group in (head, [not own for own in head]) if any(group)]
        self.register_buffer("members", torch.tensor(groups).float(), persistent=False)
        # until `prepare`, the keypoints of a region are expected on a circle
        angles = torch.arange(len(names)) * (2 * torch.pi / len(names))
        circle = torch.stack([angles.cos(), angles.sin()], 1) / margin
        self.register_buffer("references", circle.repeat(len(groups), 1, 1))
        self.register_buffer("usual_scales", torch.full((len(groups),), 0.25))
        backbone.drop_head()
        channels = backbone.channels
        self.keypoints = nn.Conv2d(channels["previous"], len(names), 1)
        self.visibility = nn.Linear(channels["last"], len(names))
        self.classifier = nn.Linear(len(groups) * channels[part_layer] + channels["last"], num_classes)

    def head_logits(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (B, K) of ``joined``, the only head."""
        return {"joined": self.classifier(self.embeddings(images))}

    def linear_heads(self) -> dict[str, nn.Linear]:
        """Return ``joined``; see ``Method``."""
        return {"joined": self.classifier}

    def objective(self, images: Tensor, targets: Tensor) -> Objective:
        """Return the cross-entropy with regions aligned by the predicted keypoints, which it does not train."""
        logits = self(images)
        return Objective.of({"data": self.criterion(logits, targets)}, logits)

    def part_objective(self, images: Tensor, targets: Tensor, parts: Tensor) -> Objective:
        """Return the sum of the cross-entropy and, weighted, of the losses of the keypoints.

        ``keypoints`` is the cross-entropy of the spatial positions of the visible keypoints, ``visibility`` the binary
        cross-entropy, both averaged over the parts.
        """
        maps = self.backbone(images)
        found = self._find(maps, images)
        true = parts[..., :2], parts[..., 2]
        points, visible = true if self.train_with == "true" else self._predicted(found)
        logits = self.classifier(self._join(maps["last"], images, self.warps(points, visible, images)))
        with torch.autocast(images.device.type, enabled=False):
            scores = found.scores.float()
            places = bilinear_targets(parts[..., :2], images.shape[2:], (scores.shape[2], scores.shape[3]))
            log_shares = scores.flatten(2).log_softmax(2)  # (B, N, h, w) -> (B, N, h*w)
            misses = -(places.flatten(2) * log_shares).sum(2) * parts[..., 2]
            unseen = F.binary_cross_entropy_with_logits(found.visibility.float(), parts[..., 2])
        terms = {
            "data": self.criterion(logits, targets),
            "keypoints": self.keypoint_weight * batch_mean(misses.mean(), len(images)),
            "visibility": self.keypoint_weight * batch_mean(unseen, len(images)),
        }
        return Objective.of(terms, logits)

    def activation_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``last`` -> the channel mean of the image's last map, (B, 1, h, w)."""
        return {"last": self.backbone(images)["last"].mean(1, keepdim=True)}  # (B, C, h, w) -> (B, 1, h, w)

    def boxes(self, images: Tensor) -> Tensor:
        """Return the boxes around the aligned regions, head and body; see ``Method.boxes``."""
        found = self._find(self.backbone(images), images)
        warps = self.warps(*self._predicted(found), images)
        corners = warps(images.new_tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]]).float())  # (B, R, 4, 2)
        return torch.cat([corners.amin(2), corners.amax(2)], 2)

    def embeddings(self, images: Tensor) -> Tensor:
        """Return the features of the regions and of the image, concatenated, (B, D)."""
        maps = self.backbone(images)
        found = self._find(maps, images)
        return self._join(maps["last"], images, self.warps(*self._predicted(found), images))

    @torch.no_grad()
    def prepare(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Set the reference shape of each region to the mean shape of its keypoints in the training images.

        The shapes are aligned by similarities, reflected where that fits better, and averaged (generalised Procrustes
        analysis). The scale of a region is the mean over the images, in sides of the image.
        """
        found = [
            (parts[0][..., :2] / images.shape[-1], parts[0][..., 2]) for images, _, *parts in batches if parts
        ]
        if not found:
            return
        # on the CPU, since not every device has float64
        points, visible = (torch.cat(column).cpu().double() for column in zip(*found, strict=True))
        for region, members in enumerate(self.members.cpu().double()):
            weights = visible * members
            used = weights.sum(1) >= 2
            if not used.any():
                continue
            shape, scale = mean_shape(points[used], weights[used], self.margin)
            self.references[region] = shape.float()
            self.usual_scales[region] = scale.float()

    def check_image_size(self, size: int) -> None:
        """Check that the backbone accepts both images and regions; see ``Method.check_image_size``."""
        super().check_image_size(size)
        self._check_second_size("region", self.region_size or size // 2, size)

    def warps(self, points: Tensor, visible: Tensor, images: Tensor) -> Similarity:
        """Return where each region is in the image, of batch shape (B, R), without gradient.

        With a single keypoint the region has the usual size around it; without any it is the whole image.

        Args:
            points: (B, N, 2), in pixels.
            visible: (B, N), 1 or 0.
            images: (B, 3, H, W).
        """
        height, width = images.shape[2:]
        points, visible = points.detach().float(), visible.detach().float()
        weights = visible[:, None] * self.members  # (B, N) and (R, N) -> (B, R, N)
        # not len(), which would be exported as a constant
        references, points = self.references.expand(points.shape[0], -1, -1, -1), points[:, None]
        upright, mirrored = fit_either_way(references, points, weights)
        warps, residuals = upright
        reflects = (mirrored[1] < residuals)[..., None]
        matrix = torch.where(reflects[..., None], mirrored[0].matrix, warps.matrix)
        shift = torch.where(reflects, mirrored[0].shift, warps.shift)
        usual = self.usual_scales * min(height, width)
        scale = Similarity(matrix, shift).scale
        limited = scale.maximum(usual / MAX_STRETCH).minimum(usual * MAX_STRETCH)
        # of a region in a single spot, or of one keypoint, the direction is unknown
        known = scale > usual * 1e-3
        unit = torch.eye(2, device=matrix.device)
        turn = torch.where(known[..., None, None], matrix / scale.clamp(min=1e-12)[..., None, None], unit)
        matrix = turn * torch.where(known, limited, usual)[..., None, None]
        count = weights.sum(2)
        total = count.clamp(min=1)[..., None, None]
        middle = (weights[..., None] * references).sum(2, keepdim=True) / total  # (B, R, 1, 2)
        target = (weights[..., None] * points).sum(2, keepdim=True) / total
        shift = (target - transformed(matrix, middle))[:, :, 0]
        seen = (count > 0)[..., None]
        centre = shift.new_tensor([width / 2, height / 2])
        return Similarity(
            torch.where(seen[..., None], matrix, torch.diag(centre)), torch.where(seen, shift, centre)
        )

    def _find(self, maps: Mapping[str, Tensor], images: Tensor) -> Keypoints:
        """Predict the keypoints: the mean position under the softmax of their scores."""
        scores = self.keypoints(maps["previous"])
        visibility = self.visibility(maps["last"].mean((2, 3)))  # (B, C, h, w) -> (B, C) -> (B, N)
        height, width = scores.shape[2:]
        shares = scores.float().flatten(2).softmax(2).unflatten(2, (height, width))
        rows, columns = (
            (torch.arange(count, device=images.device) + 0.5) * (side / count)
            for count, side in zip((height, width), images.shape[2:], strict=True)
        )
        points = torch.stack([(shares.sum(2) * columns).sum(2), (shares.sum(3) * rows).sum(2)], 2)
        return Keypoints(scores, visibility, points)

    def _predicted(self, found: Keypoints) -> tuple[Tensor, Tensor]:
        return found.points, (found.visibility > 0).float()

    def _join(self, last: Tensor, images: Tensor, warps: Similarity) -> Tensor:
        size = self.region_size or min(images.shape[2:]) // 2
        regions = warp_regions(images, warps, size)
        count = regions.shape[1]
        maps = self.backbone(regions.flatten(0, 1))[self.part_layer]  # (B, R, 3, s, s) -> (B*R, C, h, w)
        parts = maps.mean((2, 3)).unflatten(0, (-1, count))  # (B*R, C, h, w) -> (B, R, C)
        return torch.cat([parts.flatten(1), last.mean((2, 3))], 1)  # (B, R*C) and (B, C') -> (B, R*C + C')


def fit_either_way(
    references: Tensor, points: Tensor, weights: Tensor
) -> tuple[tuple[Similarity, Tensor], tuple[Similarity, Tensor]]:
    """Fit similarities from reference shapes to points, without and with a reflection of the shape.

    Args:
        references: (..., N, 2).
        points: (..., N, 2).
        weights: (..., N).
    """
    upright = fit_similarity(references, points, weights)
    sign = references.new_tensor([-1.0, 1.0])
    turned, residual = fit_similarity(references * sign, points, weights)
    # scales the columns, so that the map is that of the unreflected shape
    return upright, (Similarity(turned.matrix * sign, turned.shift), residual)


def mean_shape(points: Tensor, weights: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Average shapes that differ by similarities and reflections.

    Args:
        points: (n, N, 2).
        weights: (n, N), 1 where a point is known, else 0; two or more in each row.
        margin: Half the side of the square around 0 that the mean shape touches is ``1 / margin``.

    Returns:
        The mean shape, (N, 2), and the mean scale of the shapes, a scalar.
    """
    seen = weights[..., None]
    # starts from the image that shows the most parts, not from the mean of birds that look to the left and right
    first = weights.sum(1).argmax()
    known = weights[first]
    shape = (points[first] - (known[:, None] * points[first]).sum(0) / known.sum()) * known[:, None]
    shape = shape / shape.square().sum().sqrt().clamp(min=1e-9)
    for _ in range(ITERATIONS):
        (warps, residuals), (mirrored, others) = fit_either_way(
            shape.expand_as(points), points, weights * known
        )
        flipped = others < residuals
        matrix = torch.where(flipped[:, None, None], mirrored.matrix, warps.matrix)
        shift = torch.where(flipped[:, None], mirrored.shift, warps.shift)
        scale = Similarity(matrix, shift).scale
        usable = ((weights * known).sum(1) >= 2) & (scale > 1e-6)
        # the inverse of a similarity is its transpose over the squared scale
        back = (points - shift[:, None]) @ matrix / scale.square().clamp(min=1e-12)[:, None, None]
        share = seen * usable[:, None, None]
        count = share.sum(0)
        shape = (share * back).sum(0) / count.clamp(min=1)
        known = (count[:, 0] > 0).to(weights)
        shape = (shape - (shape * known[:, None]).sum(0) / known.sum().clamp(min=1)) * known[:, None]
        length = shape.square().sum().sqrt().clamp(min=1e-9)
        shape = shape / length
    extent = shape.abs().amax().clamp(min=1e-9) * margin
    used = usable.to(scale)
    return shape / extent, extent * (scale * used).sum() / used.sum().clamp(min=1) * length


def bilinear_targets(points: Tensor, image_size: Sequence[int], map_size: tuple[int, int]) -> Tensor:
    """Return the shares of a map's positions (B, N, h, w) whose mean position is the point.

    Each row and column is shared by its two nearest centres; points beyond the outermost ones are moved onto them.

    Args:
        points: x and y in pixels, (B, N, 2).
        image_size: Height and width in pixels.
        map_size: h and w.
    """
    shares = []
    for axis, count, side in ((1, map_size[0], image_size[0]), (0, map_size[1], image_size[1])):
        position = (points[..., axis] * (count / side) - 0.5).clamp(0, count - 1)
        positions = torch.arange(count, device=points.device)
        shares.append((1 - (position[..., None] - positions).abs()).clamp(min=0))  # (B, N, count)
    return shares[0][..., None] * shares[1][..., None, :]
