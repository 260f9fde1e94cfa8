"""Draw one picture of the synthetic dataset, a bird in a scene, with its boxes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from crossx.data.drawn.anatomy import PLUMAGES
from crossx.data.drawn.bird import NUMBER, Bird, Pose
from crossx.data.drawn.canvas import SUPERSAMPLING, Canvas, vary
from crossx.data.drawn.scenery import SCENES, background, foreground, light, perch
from crossx.data.index import Box

COVERED = 255
"""Number on the part map of pixels hidden by the foreground."""
MIN_VISIBLE = 8
"""A part with fewer visible pixels gets no box ..."""
MIN_UNCOVERED = 1 / 3
"""... nor does a part whose pixels within the image are uncovered to less than this share."""


@dataclass(frozen=True)
class Picture:
    """A picture and its boxes.

    Attributes:
        image: The picture, RGB.
        box: Box of the visible bird, in pixels.
        parts: Part name to the box of its visible pixels, without hidden parts.
    """

    image: Image.Image
    box: Box
    parts: Mapping[str, Box]


def draw_picture(attributes: Mapping[str, str], rng: np.random.Generator, size: int) -> Picture:
    """Draw one bird in a scene of its own.

    Nothing random depends on the attributes: the same generator gives the same scene, pose and light.

    Args:
        attributes: Values of ``family`` and of each part in ``anatomy.PARTS``.
        rng: Source of everything that varies within a class.
        size: Side of the image, in pixels.
    """
    for_scene, for_perch, for_pose, for_colours, for_cover, for_light = rng.spawn(6)
    scene = SCENES[for_scene.integers(len(SCENES))]
    pose = Pose.sample(for_pose, size)
    upper, under = (vary(colour, for_colours, 16) for colour in PLUMAGES[attributes["family"]])
    canvas = Canvas(size)
    perch(scene, canvas, for_perch, pose.foot, size)
    bird = Bird(canvas, pose, upper, under, attributes)
    bird.paint()
    image = background(scene, for_scene, size)
    layer = canvas.reduced()
    image.paste(layer, (0, 0), layer)
    height, coverage = bird.relief()
    lit = light(np.asarray(image, np.float32), height, coverage, for_light)
    image = Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))

    in_view = np.bincount(np.asarray(canvas.parts).ravel(), minlength=COVERED + 1)
    front = Canvas(size)
    for points, colour in foreground(scene, for_cover, size):
        front.fill([points], colour)
        canvas.fill([points], None, COVERED)
    layer = front.reduced().filter(ImageFilter.BoxBlur(size * 0.004))
    image.paste(layer, (0, 0), layer)
    return Picture(image, *_boxes(np.asarray(canvas.parts), in_view))


def _boxes(parts: NDArray[np.uint8], in_view: NDArray[np.intp]) -> tuple[Box, dict[str, Box]]:
    boxes = {}
    for name, number in NUMBER.items():
        found = parts == number
        least = max(MIN_VISIBLE * SUPERSAMPLING**2, MIN_UNCOVERED * in_view[number])
        if np.count_nonzero(found) >= least:
            boxes[name] = _box(found)
    return _box((parts > 0) & (parts < COVERED)), boxes


def _box(found: NDArray[np.bool_]) -> Box:
    columns, rows = np.flatnonzero(found.any(0)), np.flatnonzero(found.any(1))  # (S, S) -> (S,)
    left, right = float(columns[0]) / SUPERSAMPLING, float(columns[-1] + 1) / SUPERSAMPLING
    top, bottom = float(rows[0]) / SUPERSAMPLING, float(rows[-1] + 1) / SUPERSAMPLING
    return left, top, right - left, bottom - top
