"""Overlays of maps and boxes on images. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from crossx.errors import UsageError
from crossx.explain.plotting import GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION, YELLOW
from crossx.suggestions import nearest

if TYPE_CHECKING:
    from matplotlib.colors import Colormap

COLORMAP = "inferno"
"""Perceptually uniform, readable with every common colour vision deficiency, and lighter means more in grey print too
(https://matplotlib.org/stable/users/explain/colors/colormaps.html)."""

OPACITY = 0.5
FOCUS = 0.5
"""Scaled value above which a map counts as looking at a pixel."""
BOX_COLOURS = (VERMILION, SKY_BLUE, YELLOW, GREEN, PURPLE, ORANGE)
LUMA = (0.299, 0.587, 0.114)
"""Red, green and blue in grey (ITU-R BT.601, as Pillow's mode L)."""


def overlay(
    image: NDArray[np.uint8],
    map_: NDArray[Any],
    *,
    colormap: str = COLORMAP,
    opacity: float = OPACITY,
) -> NDArray[np.uint8]:
    """Overlay a map on an image: ``(1 - opacity) grey(image) + opacity colormap(map)``.

    The map is scaled to [0, 1] by its minimum and maximum, then resized to the image bilinearly. The image is grey, so
    that all colours are the map's: a yellow bird would look like a high value.

    Args:
        image: uint8 (H, W, 3).
        map_: (h, w), of any size and scale, finite.
        colormap: Name of a matplotlib colormap.
        opacity: From 0 (only the image) to 1 (only the map).

    Returns:
        uint8 (H, W, 3).

    Raises:
        UsageError: For an unknown colormap, or an opacity outside 0 to 1.
    """
    share = check_opacity(opacity)
    grey = (image @ np.array(LUMA))[..., None]
    mixed: NDArray[np.float64] = (1 - share) * grey + share * 255 * _coloured(map_, image.shape[:2], colormap)
    return mixed.round().astype(np.uint8)


def overlay_parts(
    image: NDArray[np.uint8], maps: NDArray[Any], *, opacity: float = OPACITY
) -> NDArray[np.uint8]:
    """Colour each pixel by the map that is largest there, over the grey image.

    Each map is scaled to [0, 1] by its minimum and maximum and resized to the image bilinearly. Pixels where none
    exceeds ``FOCUS`` keep their grey, as keypoints in the part measures belong to the background there.

    Args:
        image: uint8 (H, W, 3).
        maps: (P, h, w), finite; map p has the colour ``part_colour(p)``.
        opacity: Of the colour, from 0 to 1.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UsageError: For an opacity outside 0 to 1.
    """
    share = check_opacity(opacity)
    scaled = np.stack([_resized(map_, image.shape[:2]) for map_ in maps])
    colours = np.array([matplotlib.colors.to_rgb(part_colour(number)) for number in range(len(maps))])
    picture = np.repeat((image @ np.array(LUMA))[..., None], 3, axis=2)
    shown = scaled.max(0) > FOCUS
    picture[shown] = (1 - share) * picture[shown] + share * 255 * colours[scaled.argmax(0)[shown]]
    return picture.round().astype(np.uint8)


def part_colour(number: int) -> str:
    """Return the colour of a part or box, counted from 0."""
    return BOX_COLOURS[number % len(BOX_COLOURS)]


def outline(image: NDArray[np.uint8], boxes: NDArray[Any]) -> NDArray[np.uint8]:
    """Draw numbered boxes on an image, the first on top.

    A number is in the first corner of its box where it covers no other number, so that boxes at the same place are
    told apart.

    Args:
        image: uint8 (H, W, 3).
        boxes: (n, 4), left, top, right, bottom in pixels; clipped to the image.

    Returns:
        uint8 (H, W, 3).
    """
    from matplotlib.font_manager import findfont

    height, width = image.shape[:2]
    side = min(height, width)
    shown = np.clip(boxes, 0, (width - 1, height - 1, width - 1, height - 1)).astype(int).tolist()
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.truetype(findfont("DejaVu Sans"), max(8, side // 14))
    line = max(1, round(side / 90))
    for number, box in reversed(list(enumerate(shown))):
        draw.rectangle(box, outline=part_colour(number), width=line)
    written: list[tuple[float, ...]] = []
    for number, (left, top, right, bottom) in enumerate(shown):
        text = str(number + 1)
        ground = draw.textbbox((0, 0), text, font)
        across, down = ground[2] - ground[0] + 2, ground[3] - ground[1] + 2
        corners = [
            (x, y, x + across, y + down)
            for y in (top + line, bottom - line - down)
            for x in (left + line, right - line - across)
        ]
        place = next(
            (corner for corner in corners if not any(_overlap(corner, other) for other in written)),
            corners[0],
        )
        written.append(place)
        draw.rectangle(place, fill=part_colour(number))
        draw.text((place[0] + 1 - ground[0], place[1] + 1 - ground[1]), text, "black", font)
    pixels: NDArray[np.uint8] = np.asarray(picture)
    return pixels


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Return whether two boxes have a pixel in common."""
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def layer(
    map_: NDArray[Any], size: tuple[int, int], *, colormap: str = COLORMAP, opacity: float = OPACITY
) -> NDArray[np.uint8]:
    """Draw a map as a transparent picture, to be shown over the grey image as in ``overlay``.

    Args:
        map_: See ``overlay``.
        size: (H, W) of the picture.
        colormap: See ``overlay``.
        opacity: See ``overlay``.

    Returns:
        uint8 (H, W, 4): red, green, blue, alpha.

    Raises:
        UsageError: For an unknown colormap, or an opacity outside 0 to 1.
    """
    colours = _coloured(map_, size, colormap)
    alpha = np.full((*size, 1), check_opacity(opacity))
    picture: NDArray[np.float64] = 255 * np.concatenate([colours, alpha], axis=2)
    return picture.round().astype(np.uint8)


def _coloured(map_: NDArray[Any], size: tuple[int, int], colormap: str) -> NDArray[np.float64]:
    """Return the colours (H, W, 3), from 0 to 1, of a map scaled to [0, 1] and resized."""
    colours: NDArray[np.float64] = check_colormap(colormap)(_resized(map_, size))[..., :3]
    return colours


def _resized(map_: NDArray[Any], size: tuple[int, ...]) -> NDArray[np.float64]:
    """Return a map scaled to [0, 1] and resized to ``size``."""
    values = np.asarray(map_, dtype=np.float64)
    low, high = values.min(), values.max()
    unit = (values - low) / (high - low if high > low else 1)
    down, across = (_interpolation(before, after) for before, after in zip(values.shape, size, strict=True))
    resized: NDArray[np.float64] = down @ unit @ across.T
    return resized


def _interpolation(before: int, after: int) -> NDArray[np.float64]:
    """Return the matrix (after, before) that resizes an axis linearly, with aligned outer edges."""
    centres = (np.arange(after) + 0.5) * before / after - 0.5
    return np.stack([np.interp(centres, np.arange(before), unit) for unit in np.eye(before)], axis=1)


def check_colormap(name: str) -> Colormap:
    """Return the matplotlib colormap called ``name``.

    Raises:
        UsageError: If there is none; the nearest name is suggested.
    """
    if name not in matplotlib.colormaps:
        raise UsageError(
            f"unknown colormap {name!r}.{nearest(name, list(matplotlib.colormaps))} The names are matplotlib's "
            "(https://matplotlib.org/stable/users/explain/colors/colormaps.html)."
        )
    return matplotlib.colormaps[name]


def check_opacity(value: float) -> float:
    """Return an opacity, or raise ``UsageError`` if it is not from 0 to 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"the opacity must be from 0 to 1, not {value}.")
    return value
