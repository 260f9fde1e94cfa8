"""What the synthetic dataset is drawn with: smooth shapes on a canvas that remembers which pixel is which part.

Points are complex numbers, x + iy with y pointing down, so that a scale with a rotation is one product. Shapes
are painted ``SUPERSAMPLING`` times larger than the image and averaged down, which smooths their edges.
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
    """Return the closed Catmull-Rom curve through the points, six samples a segment."""
    control = np.array(points, complex)
    neighbours = np.stack([np.roll(control, 1), control, np.roll(control, -1), np.roll(control, -2)])
    result: Points = (_CATMULL_ROM @ neighbours).T.ravel()
    return result


def ellipse(centre: complex, width: float, height: float | None = None) -> Points:
    """Return an ellipse given by its half axes (a circle without ``height``)."""
    tall = width if height is None else height
    diagonal = 0.5**0.5
    directions = (
        1,
        diagonal * (1 + 1j),
        1j,
        diagonal * (-1 + 1j),
        -1,
        diagonal * (-1 - 1j),
        -1j,
        diagonal * (1 - 1j),
    )
    return smooth(*(centre + complex(z.real * width, z.imag * tall) for z in map(complex, directions)))


def stroke(start: complex, end: complex, width: float, end_width: float | None = None) -> Points:
    """Return a straight stroke from ``start`` to ``end``, tapering from ``width`` to ``end_width``."""
    across = 0.5j * (end - start) / abs(end - start)
    last = width if end_width is None else end_width
    return np.array(
        [start - across * width, start + across * width, end + across * last, end - across * last]
    )


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Blend two colours; ``share`` of the second."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(first, second, strict=True))
    return red, green, blue


def vary(colour: Colour, rng: np.random.Generator, amount: float) -> Colour:
    """Shift each channel at random by at most ``amount`` levels."""
    red, green, blue = (min(255, max(0, round(c + amount * rng.uniform(-1, 1)))) for c in colour)
    return red, green, blue


class Canvas:
    """A transparent layer and, as large, a map of the parts painted on it. Shapes are in image pixels.

    Attributes:
        parts: The part map, 8 bit, supersampled: a part's number, 0 where there is none.
    """

    def __init__(self, size: int) -> None:
        self._side = size * SUPERSAMPLING
        self._image = Image.new("RGBA", (self._side, self._side))
        self.parts = Image.new("L", (self._side, self._side))

    def mask(self, shapes: Sequence[Points]) -> Image.Image:
        """Return the union of the shapes, supersampled, to clip others with."""
        result = Image.new("L", (self._side, self._side))
        draw = ImageDraw.Draw(result)
        for points in shapes:
            draw.polygon(_flat(points), fill=255)
        return result

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
            colour: What to paint them with; None marks the part and paints nothing.
            part: The part's number on the part map; 0 leaves the map alone.
            clip: Mask outside of which nothing is painted.
            softness: Width of a blurred edge, in image pixels.
        """
        if not shapes:
            return
        left, top, right, bottom = window = self._window(np.concatenate(shapes), 2 * softness + 1)
        if right <= left or bottom <= top:
            return
        sharp = Image.new("L", (right - left, bottom - top))
        draw = ImageDraw.Draw(sharp)
        for points in shapes:
            draw.polygon(_flat(points, complex(left, top)), fill=255)
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
        low, high = (
            np.clip([x, y], 0, self._side).astype(int).tolist()
            for x, y in (
                ((points.real.min() - margin) * SUPERSAMPLING, (points.imag.min() - margin) * SUPERSAMPLING),
                ((points.real.max() + margin) * SUPERSAMPLING, (points.imag.max() + margin) * SUPERSAMPLING),
            )
        )
        return low[0], low[1], high[0], high[1]


def _flat(points: Points, origin: complex = 0) -> list[float]:
    # Rounding hides the last bit in which the mathematics libraries of two machines may differ.
    coordinates: list[float] = np.round(points * SUPERSAMPLING - origin, 2).view(np.float64).tolist()
    return coordinates
