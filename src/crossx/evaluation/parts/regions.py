"""Object parts in the crop that the network sees, and the spatial positions of a map that they cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crossx.data.images import read_size
from crossx.data.index import Box, Record
from crossx.data.transforms import eval_crop_place
from crossx.runs import Preprocessing

KEYPOINT_RADIUS = 0.1
"""Radius of the disc around a keypoint, as a share of the longer side of the object's box (of the crop's side without a
box): the tolerance of PCK@0.1 (Yang and Ramanan, "Articulated human detection with flexible mixtures
of parts", PAMI 2013)."""

MIN_SAMPLES = 64
"""Minimum number of points along a map's side at which discs are sampled for ``coverage``."""


@dataclass(frozen=True)
class CropRegions:
    """K regions in each of N crops, in shares of the crop's side from its top left corner.

    A region is a box, or a disc around a keypoint (a box without width and height). It can reach beyond the crop.

    Attributes:
        boxes: float (N, K, 4): left, top, right, bottom.
        radii: float (N,): radius of the discs.
        visible: bool (N, K): whether the region exists and its centre is in the crop; others are ignored.
    """

    boxes: Tensor
    radii: Tensor
    visible: Tensor

    def __getitem__(self, images: slice) -> CropRegions:
        """Return the regions of some of the crops."""
        return CropRegions(self.boxes[images], self.radii[images], self.visible[images])

    @property
    def centres(self) -> Tensor:
        """float (N, K, 2): x and y."""
        return (self.boxes[..., :2] + self.boxes[..., 2:]) / 2

    def coverage(self, height: int, width: int) -> Tensor:
        """Return the share of each position of a map that a region covers, (N, K, height, width).

        Exact for boxes; discs are sampled at ``MIN_SAMPLES`` points or more along each side.
        """
        left, top, right, bottom = self.boxes.unbind(-1)
        of_boxes = _overlap(top, bottom, height)[..., :, None] * _overlap(left, right, width)[..., None, :]
        if not self._are_points.any():
            return of_boxes * self.visible[..., None, None]
        fine = [math.ceil(MIN_SAMPLES / side) for side in (height, width)]
        in_discs = self._in_discs(height * fine[0], width * fine[1]).to(of_boxes)
        # (N, K, height * y, width * x) -> (N, K, height, y, width, x) -> (N, K, height, width)
        of_discs = in_discs.unflatten(3, (width, fine[1])).unflatten(2, (height, fine[0])).mean((3, 5))
        chosen = torch.where(self._are_points[..., None, None], of_discs, of_boxes)
        return chosen * self.visible[..., None, None]

    def contain(self, height: int, width: int) -> Tensor:
        """Return whether the centre of each position of a map is in a region, bool (N, K, height, width)."""
        left, top, right, bottom = self.boxes[..., None].unbind(-2)
        y, x = _centres(height, self.boxes), _centres(width, self.boxes)
        in_rows, in_columns = (top <= y) & (y < bottom), (left <= x) & (x < right)
        in_boxes = in_rows[..., :, None] & in_columns[..., None, :]
        in_discs = self._in_discs(height, width)
        chosen = torch.where(self._are_points[..., None, None], in_discs, in_boxes)
        return chosen & self.visible[..., None, None]

    @property
    def _are_points(self) -> Tensor:
        return (self.boxes[..., :2] == self.boxes[..., 2:]).all(-1)

    def _in_discs(self, height: int, width: int) -> Tensor:
        x, y = self.centres[..., None].unbind(-2)
        squares_y = (_centres(height, self.boxes) - y).square()
        squares_x = (_centres(width, self.boxes) - x).square()
        squares = squares_y[..., :, None] + squares_x[..., None, :]  # (N, K, height, width)
        return squares <= self.radii.square()[:, None, None, None]


def find_regions(
    records: Sequence[Record], names: Sequence[str], preprocessing: Preprocessing
) -> tuple[CropRegions, CropRegions]:
    """Locate parts and objects in the evaluation crops of images.

    Args:
        records: N images; their headers are read for their size.
        names: K names of parts.
        preprocessing: The preprocessing that makes the crops.

    Returns:
        The parts, and the objects as one region per crop (not visible without a box).

    Raises:
        ImageError: If an image's header cannot be read.
    """
    boxes = torch.full((len(records), len(names) + 1, 4), math.nan, dtype=torch.float64)
    radii = torch.full((len(records),), KEYPOINT_RADIUS, dtype=torch.float64)
    for number, record in enumerate(records):
        place = eval_crop_place(preprocessing, *read_size(record.path))
        given = [*((record.parts or {}).get(name) for name in names), record.box]
        for column, box in enumerate(given):
            if box is not None:
                boxes[number, column] = place(_corners(box)).flatten() / preprocessing.image_size
        if record.box is not None:
            left, top, right, bottom = boxes[number, -1].tolist()
            radii[number] *= max(right - left, bottom - top)
    centres = (boxes[..., :2] + boxes[..., 2:]) / 2
    # a missing box is NaN, and comparisons with NaN are false
    visible = ((centres >= 0) & (centres < 1)).all(-1)
    boxes, radii = boxes.nan_to_num().float(), radii.float()
    return CropRegions(boxes[:, :-1], radii, visible[:, :-1]), CropRegions(
        boxes[:, -1:], radii, visible[:, -1:]
    )


def _corners(box: Box) -> Tensor:
    x, y, width, height = box
    return torch.tensor([[x, y], [x + width, y + height]], dtype=torch.float64)


def _centres(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def _overlap(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Return the share of each of ``count`` equal pieces of [0, 1] between low and high, (..., count)."""
    ends = torch.arange(count + 1, device=low.device, dtype=low.dtype) / count
    lengths = torch.minimum(high[..., None], ends[1:]) - torch.maximum(low[..., None], ends[:-1])
    return lengths.clamp(min=0) * count
