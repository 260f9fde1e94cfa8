"""Smooth shapes on a canvas that records which pixel belongs to which part.

Points are complex numbers, x + iy with y down, so that scaling and rotation are one product. Shapes are painted
``SUPERSAMPLING`` times larger than the image and averaged down, which smooths their edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Points: TypeAlias = NDArray[np.complex128]
Pixels: TypeAlias = NDArray[np.float32]
Colour: TypeAlias = tuple[int, int, int]

SUPERSAMPLING = 3
_T = np.linspace(0, 1, 6, endpoint=False)
_CATMULL_ROM = np.stack([_T**0, _T, _T**2, _T**3], 1) @ (
    np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
)


def smooth(*points: complex) -> Points:
    """Return the closed Catmull-Rom curve through the points, six samples per segment."""
    control = np.array(points, complex)
    neighbours = np.stack([np.roll(control, 1), control, np.roll(control, -1), np.roll(control, -2)])
    result: Points = (_CATMULL_ROM @ neighbours).T.ravel()
    return result


def ellipse(centre: complex, width: float, height: float | None = None) -> Points:
    """Return the ellipse with these half axes (a circle without ``height``)."""
    tall, d = width if height is None else height, 0.5**0.5
    directions = (1, d * (1 + 1j), 1j, d * (-1 + 1j), -1, d * (-1 - 1j), -1j, d * (1 - 1j))
    return smooth(*(centre + complex(z.real * width, z.imag * tall) for z in map(complex, directions)))


def stroke(start: complex, end: complex, width: float, end_width: float | None = None) -> Points:
    """Return a straight stroke from ``start`` to ``end``, tapering from ``width`` to ``end_width``."""
    across = 0.5j * (end - start) / abs(end - start)
    last = width if end_width is None else end_width
    return np.array(
        [start - across * width, start + across * width, end + across * last, end - across * last]
    )


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blend two colours, with ``share`` of the second."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def vary(colour: Colour, rng: np.random.Generator, amount: float) -> Colour:
    """Shift each channel at random by at most ``amount`` levels."""
    red, green, blue = (min(255, max(0, round(c + amount * rng.uniform(-1, 1)))) for c in colour)
    return red, green, blue


class Canvas:
    """A transparent layer and a map of the parts painted on it. Shapes are in image pixels.

    Attributes:
        parts: The part map, 8 bit, supersampled: the number of the part, 0 for none.
    """

    def __init__(self, size: int) -> None:
        self._side = size * SUPERSAMPLING
        self._image = Image.new("RGBA", (self._side, self._side))
        self.parts = Image.new("L", (self._side, self._side))

    def mask(self, shapes: Sequence[Points]) -> Image.Image:
        """Return the union of the shapes, supersampled, for clipping."""
        return _union(shapes, self._side, self._side)

    def fill(
        self,
        shapes: Sequence[Points],
        colour: Colour | None,
        part: int = 0,
        clip: Image.Image | None = None,
        softness: float = 0,
    ) -> None:
        """Paint the union of the shapes.

        Args:
            shapes: Closed outlines, in image pixels.
            colour: Colour of the shapes; None only marks the part.
            part: The part's number on the part map; 0 leaves the map unchanged.
            clip: Mask outside which nothing is painted.
            softness: Width of a blurred edge, in image pixels.
        """
        if not shapes:
            return
        left, top, right, bottom = window = self._window(np.concatenate(shapes), 2 * softness + 1)
        if right <= left or bottom <= top:
            return
        sharp = _union(shapes, right - left, bottom - top, complex(left, top))
        soft = sharp.filter(ImageFilter.BoxBlur(softness * SUPERSAMPLING)) if softness else sharp
        if clip is not None:
            inside = clip.crop(window)
            sharp, soft = ImageChops.multiply(sharp, inside), ImageChops.multiply(soft, inside)
        if colour is not None:
            self._image.paste(colour, window, soft)
        if part:
            self.parts.paste(part, window, sharp)

    def reduced(self) -> Image.Image:
        """Return the layer at the image's size, RGBA."""
        return self._image.reduce(SUPERSAMPLING)

    def _window(self, points: Points, margin: float) -> tuple[int, int, int, int]:
        x, y = points.real, points.imag
        edges = np.array([x.min() - margin, y.min() - margin, x.max() + margin, y.max() + margin])
        left, top, right, bottom = np.clip(edges * SUPERSAMPLING, 0, self._side).astype(int).tolist()
        return left, top, right, bottom


def _union(shapes: Sequence[Points], width: int, height: int, origin: complex = 0) -> Image.Image:
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for points in shapes:
        # rounded, since the mathematics libraries of two machines may differ in the last bit
        draw.polygon(np.round(points * SUPERSAMPLING - origin, 2).view(np.float64).tolist(), fill=255)
    return mask
