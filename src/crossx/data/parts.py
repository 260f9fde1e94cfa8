"""Parts of an image as points that follow its preparation."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.tv_tensors import KeyPoints

from crossx.data.index import Record

_SIDES = re.compile(r"left|right|(?<![a-z])[lr](?![a-z])", re.IGNORECASE)
_OPPOSITE = {"left": "right", "right": "left", "l": "r", "r": "l"}


class PartPoints:
    """The parts of one image, from its full size to the network's input.

    Coordinates start at the outer edge of the first pixel, whose centre is at 0.5.

    Args:
        record: The image; a part is the centre of its box.
        names: N names of parts.
        full_size: Height and width of the whole image, in which ``record`` has its boxes.
        size: Height and width at which it was decoded.
    """

    def __init__(
        self, record: Record, names: Sequence[str], full_size: tuple[int, int], size: tuple[int, int]
    ) -> None:
        boxes = [(record.parts or {}).get(name) for name in names]
        centres = [(0.0, 0.0) if box is None else (box[0] + box[2] / 2, box[1] + box[3] / 2) for box in boxes]
        self._points = torch.tensor(centres, dtype=torch.float64).view(-1, 2)
        self._visible = torch.tensor([box is not None for box in boxes])
        self._flipped = False
        self._opposites = opposites(names)
        self.move(scale=(size[1] / full_size[1], size[0] / full_size[0]), size=size)

    def move(
        self,
        *,
        size: Sequence[int],
        scale: tuple[float, float] = (1.0, 1.0),
        shift: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Map the points to ``scale * (x, y) + shift``; those outside the new image are no longer visible.

        Args:
            size: Height and width of the new image.
            scale: For x and y.
            shift: For x and y, in pixels of the new image.
        """
        self.replace(self._points * self._points.new_tensor(scale) + self._points.new_tensor(shift), size)

    def replace(self, points: Tensor, size: Sequence[int]) -> None:
        """Set the points, (N, 2); those outside an image of this height and width are no longer visible."""
        self._points = points.double()
        self._visible &= ((points >= 0) & (points < torch.tensor((size[1], size[0])))).all(1)

    def flip(self, width: int) -> None:
        """Flip the points horizontally in an image of this width; left and right parts change their names."""
        self._points[:, 0] = width - self._points[:, 0]
        self._flipped = not self._flipped

    def keypoints(self, size: Sequence[int]) -> KeyPoints:
        """Return the points as torchvision's operations take them, for an image of this height and width."""
        return KeyPoints(self._points, canvas_size=(size[0], size[1]))

    def stacked(self) -> Tensor:
        """Return x, y and visible (1 or 0) of each part, float32 (N, 3); all are 0 for one that is not visible."""
        parts = torch.cat(
            [self._points, self._points.new_ones(len(self._points), 1)], 1
        ).float()  # (N, 2) -> (N, 3)
        parts *= self._visible[:, None]
        if self._flipped:
            # without an opposite (-1), the name of a flipped part would be wrong
            order = torch.tensor(self._opposites)
            parts = parts[order] * (order >= 0)[:, None]
        return parts


def opposites(names: Sequence[str]) -> list[int]:
    """Return the index of the part that each becomes in a mirror image, -1 for one side of a part without the other.

    ``left wing`` becomes ``right wing``; likewise ``left_wing``, ``LeftWing``, ``wing_l`` or ``L wing``. Parts whose
    names have no side remain.
    """
    known = {name: index for index, name in enumerate(names)}

    def opposite(index: int, name: str) -> int:
        sided = {_mirrored(name, only_words) for only_words in (True, False)} - {name}
        found = [known[other] for other in sorted(sided) if other in known]
        if found:
            return found[0]
        # "bright spot" and "upright" have no side
        return -1 if re.search(r"(?<![a-z])(left|right)(?![a-z])", name, re.IGNORECASE) else index

    return [opposite(index, name) for index, name in enumerate(names)]


def _mirrored(name: str, only_words: bool) -> str:
    def swap(match: re.Match[str]) -> str:
        side = match[0]
        if only_words and len(side) == 1:
            return side
        other = _OPPOSITE[side.lower()]
        return other.upper() if side.isupper() else other.capitalize() if side[0].isupper() else other

    return _SIDES.sub(swap, name)
