"""What part of an image evaluation looks at, and reading it without torch.

``transforms`` computes the network's input in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossx.data.images import ImageError, ImageSource, read_pixels
from crossx.runs import Preprocessing

CROP_FRACTION = 0.875
"""Crop size over resized size without ``resize_size``: 224 of 256, as in ImageNet evaluation."""

MAX_ASPECT = 8
"""Longer images are cropped to this aspect ratio around their centre before resizing: enlarging the shorter side of
1 x 5000 pixels to 512 would fill the memory."""

SMALLEST_CROP = 0.08
"""Smallest share of the area that ``resized_crop`` keeps (Szegedy et al. 2015, https://arxiv.org/abs/1409.4842)."""

MAX_STRETCH = 4 / 3
"""Largest ratio of the two sides of such a crop."""

DECODE_MARGIN = 2
"""JPEGs are decoded at 1/2, 1/4 or 1/8 of their size as long as their sides are this many times the resized sides.
Pillow's thumbnails have the same margin (``reducing_gap`` of ``Image.thumbnail``)."""


def read_view(
    source: ImageSource, preprocessing: Preprocessing, side: int | None = None
) -> NDArray[np.uint8]:
    """Read the part of an image that evaluation looks at, resized by Pillow.

    With ``side=image_size`` the pixels are those of the network's input, up to rounding where torch resizes it.

    Args:
        source: The file or its bytes.
        preprocessing: That of the network.
        side: Side of the result in pixels; by default ``image_size``.

    Returns:
        uint8 RGB (side, side, 3).

    Raises:
        ImageError: As ``read_image``, or if ``crop_bottom`` leaves nothing.
    """
    side = preprocessing.image_size if side is None else side
    strict = preprocessing.pipeline == "strict"
    pixels = read_pixels(source, min_side=min_decoded_side(preprocessing), pillow=strict)
    height = height_without_bottom(pixels.shape[0], preprocessing.crop_bottom)
    limits = aspect_limits(height, pixels.shape[1])
    (top, height), (left, width) = limits
    size = resized_size(preprocessing, (height, width))
    starts = [centred(length - preprocessing.image_size) for length in size]
    # the crop in pixels of the decoded image: left, top, right, bottom
    scales = [before / after for before, after in zip((height, width), size, strict=True)]
    first = [start * scale for start, scale in zip(starts, scales, strict=True)]
    last = [(start + preprocessing.image_size) * s for start, s in zip(starts, scales, strict=True)]
    kept = Image.fromarray(pixels[top : top + height, left : left + width])
    box = (first[1], first[0], min(last[1], width), min(last[0], height))
    method = Image.Resampling[preprocessing.interpolation.upper()]
    return np.asarray(kept.resize((side, side), method, box))


def resized_side(preprocessing: Preprocessing) -> int:
    """Return the length in pixels of the shorter side after resizing."""
    return preprocessing.resize_size or int(preprocessing.image_size / CROP_FRACTION)


def min_decoded_side(preprocessing: Preprocessing, *, small_crops: bool = False) -> int | None:
    """Return the minimum length of a JPEG's shorter side after decoding; None for its full size.

    Args:
        preprocessing: That of the network.
        small_crops: Whether crops of ``SMALLEST_CROP`` are taken, whose sides then keep ``image_size`` pixels.
    """
    # a banner may end between two pixels of a smaller image
    if preprocessing.pipeline == "strict" or preprocessing.crop_bottom > 0:
        return None
    least = DECODE_MARGIN * resized_side(preprocessing)
    if small_crops:
        least = max(least, math.ceil(preprocessing.image_size * math.sqrt(MAX_STRETCH / SMALLEST_CROP)))
    return least


def resized_size(preprocessing: Preprocessing, size: Sequence[int]) -> list[int]:
    """Return height and width after resizing an image of this height and width."""
    side = resized_side(preprocessing)
    if preprocessing.resize_size is not None:
        return [side, side]
    return [int(side * length / min(size)) for length in size]


def whole_size(preprocessing: Preprocessing, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a whole image of this height and width after resizing.

    Raises:
        ImageError: If ``crop_bottom`` leaves nothing.
    """
    height, width = size
    limits = aspect_limits(height_without_bottom(height, preprocessing.crop_bottom), width)
    height, width = resized_size(preprocessing, [length for _, length in limits])
    return height, width


def centred(spare: int) -> int:
    """Return the first pixel of a crop that leaves this many pixels of an axis."""
    return round(spare / 2)


def height_without_bottom(height: int, rows: int) -> int:
    """Return the height without ``data.crop_bottom``.

    Raises:
        ImageError: If nothing is left.
    """
    if height <= rows:
        reason = f"is {height} rows high and data.crop_bottom cuts off {rows}: lower it"
        raise ImageError(f"the image {reason}.", reason)
    return height - rows


def aspect_limits(height: int, width: int) -> list[tuple[int, int]]:
    """Return the first row and the number of rows to keep, and the same of the columns."""
    longest = MAX_ASPECT * min(height, width)
    return [(max(0, length - longest) // 2, min(length, longest)) for length in (height, width)]
