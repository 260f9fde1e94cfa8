"""Backgrounds, perches, foreground foliage and light of the synthetic dataset."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from crossx.data.drawn.canvas import Canvas, Colour, Pixels, Points, ellipse, mix, smooth, stroke, vary


@dataclass(frozen=True)
class Scene:
    """A kind of background.

    Attributes:
        top: Colour of the gradient's upper end.
        bottom: Colour of its lower end.
        blobs: Colours of the blobs out of focus.
        leaves: Colours of leaves and grass.
        perches: Kinds of perch.
        horizon: Whether the gradient has a step, as between sky and land.
        flat: Height of the blobs relative to their width.
    """

    top: Colour
    bottom: Colour
    blobs: tuple[Colour, ...]
    leaves: tuple[Colour, ...]
    perches: tuple[str, ...]
    horizon: bool = False
    flat: float = 1.0


FOREGROUNDS = ("nothing", "nothing", "nothing", "leaves", "twig", "grass")
_SHADE, _SUN = (20, 24, 28), (255, 248, 232)
GREENS = ((74, 124, 52), (104, 150, 62), (52, 98, 50), (132, 170, 80))
AUTUMN = ((196, 112, 40), (214, 150, 58), (158, 76, 40), (120, 110, 50))
SCENES = (
    Scene(  # Sky with clouds.
        top=(96, 158, 222),
        bottom=(206, 228, 240),
        blobs=((244, 248, 252), (230, 238, 246)),
        leaves=GREENS,
        perches=("branch", "wire"),
        flat=0.35,
    ),
    Scene(  # Forest.
        top=(70, 104, 60),
        bottom=(34, 62, 44),
        blobs=(*GREENS, (170, 196, 110), (40, 70, 44)),
        leaves=GREENS,
        perches=("branch", "post"),
    ),
    Scene(  # Meadow.
        top=(206, 222, 226),
        bottom=(112, 154, 70),
        blobs=(*GREENS, (206, 190, 90)),
        leaves=GREENS,
        perches=("ground", "post", "stone"),
        horizon=True,
    ),
    Scene(  # Lake.
        top=(176, 204, 218),
        bottom=(88, 138, 160),
        blobs=((140, 178, 194), (190, 214, 222), (96, 140, 160)),
        leaves=GREENS,
        perches=("stone", "post", "branch"),
        horizon=True,
        flat=0.15,
    ),
    Scene(  # Autumn.
        top=(226, 188, 120),
        bottom=(140, 94, 56),
        blobs=(*AUTUMN, (236, 206, 140)),
        leaves=AUTUMN,
        perches=("branch", "ground", "stone"),
    ),
    Scene(  # Snow.
        top=(214, 222, 234),
        bottom=(240, 243, 248),
        blobs=((196, 208, 224), (252, 252, 254), (170, 184, 202)),
        leaves=((96, 110, 90),),
        perches=("branch", "ground", "post"),
        flat=0.7,
    ),
    Scene(  # Dusk.
        top=(92, 84, 142),
        bottom=(244, 176, 134),
        blobs=((238, 150, 128), (150, 106, 150), (250, 206, 150)),
        leaves=((48, 44, 62),),
        perches=("branch", "wire"),
        flat=0.3,
    ),
    Scene(  # Dunes.
        top=(222, 206, 172),
        bottom=(188, 160, 116),
        blobs=((206, 184, 140), (164, 140, 104), (232, 220, 190)),
        leaves=((150, 140, 80),),
        perches=("ground", "stone"),
        horizon=True,
        flat=0.4,
    ),
)


def background(scene: Scene, rng: np.random.Generator, size: int) -> Image.Image:
    """Paint a blurred background, ``size`` x ``size`` pixels."""
    top, bottom = vary(scene.top, rng, 14), vary(scene.bottom, rng, 14)
    ramp = np.linspace(0, 1, size, dtype=np.float32)
    if scene.horizon:
        ramp = np.clip((ramp - rng.uniform(0.3, 0.7)) * 8 + 0.5, 0, 1).astype(np.float32) * 0.8 + ramp * 0.2
    column = np.array(top) + ramp[:, None] * (np.array(bottom) - np.array(top))
    image = Image.fromarray(np.repeat(column.round().astype(np.uint8)[:, None], size, axis=1))
    _discs(image, rng, int(rng.integers(14, 30)), scene, 0.4 if scene.horizon else -0.1)
    image = image.filter(ImageFilter.BoxBlur(size * float(rng.uniform(0.015, 0.05))))
    _discs(image, rng, int(rng.integers(0, 9)))
    return image.filter(ImageFilter.BoxBlur(size * 0.006))


def _discs(
    image: Image.Image, rng: np.random.Generator, count: int, scene: Scene | None = None, top: float = 0
) -> None:
    """Paint translucent discs below ``top``: the scene's blobs, or faint spots of light if there is no scene."""
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(count):
        x, y = image.width * rng.uniform(-0.1, 1.1), image.width * rng.uniform(top, 1.1)
        if scene:
            wide = image.width * rng.uniform(0.05, 0.2)
            tall, opacity = wide * scene.flat, int(rng.integers(90, 230))
            colour = vary(scene.blobs[rng.integers(len(scene.blobs))], rng, 16)
        else:
            wide = tall = image.width * rng.uniform(0.02, 0.07)
            colour, opacity = _SUN, int(rng.integers(12, 46))
        draw.ellipse((x - wide, y - tall, x + wide, y + tall), fill=(*colour, opacity))


def perch(scene: Scene, canvas: Canvas, rng: np.random.Generator, foot: complex, size: int) -> None:
    """Paint the perch under ``foot``, the point between the bird's feet in image pixels."""
    kind = scene.perches[rng.integers(len(scene.perches))]
    _PERCHES[kind](scene, canvas, rng, foot, size)


def _branch(scene: Scene, canvas: Canvas, rng: np.random.Generator, foot: complex, size: int) -> None:
    bark = vary((106, 82, 62), rng, 22)
    width, slope = size * rng.uniform(0.05, 0.085), rng.uniform(-0.12, 0.12)

    def height(x: float) -> float:
        return foot.imag + 0.42 * width + slope * (x - foot.real)

    for x in rng.uniform(0, size, 5):
        for points, colour in _leaf(scene, rng, complex(x, height(x)), size, 0.09, 0.17):
            canvas.fill([points], colour)
    xs = np.linspace(-0.1, 1.1, 7) * size
    bends = size * rng.uniform(-0.012, 0.012, 7)
    line = np.array([complex(x, height(x) + bend) for x, bend in zip(xs, bends, strict=True)])
    thickness = width * np.linspace(0.7, 1.25, 7)[:: 1 if rng.random() < 0.5 else -1]
    bands = ((0.0, 1.0, mix(bark, _SHADE, 0.4)), (-0.12, 0.76, bark), (-0.26, 0.3, mix(bark, _SUN, 0.25)))
    for offset, share, colour in bands:
        upper = line + 1j * thickness * (offset - share / 2)
        lower = line + 1j * thickness * (offset + share / 2)
        canvas.fill([np.concatenate([upper, lower[::-1]])], colour)


def _wire(scene: Scene, canvas: Canvas, rng: np.random.Generator, foot: complex, size: int) -> None:
    slope, width = rng.uniform(-0.1, 0.1), size * rng.uniform(0.014, 0.024)
    along = size * (1 + slope * 1j)
    middle = foot + 0.3j * width
    canvas.fill([stroke(middle - 1.2 * along, middle + 1.2 * along, width)], vary((64, 62, 66), rng, 14))


def _post(scene: Scene, canvas: Canvas, rng: np.random.Generator, foot: complex, size: int) -> None:
    wood, half = vary((136, 114, 90), rng, 22), size * rng.uniform(0.11, 0.17)
    top = foot - 0.01j * size
    canvas.fill([stroke(top, top + 1.2j * size, 2 * half)], wood)
    starts = [top + half * share for share in rng.uniform(-0.9, 0.9, 4)]
    grooves = [stroke(start, start + 1.2j * size, 0.012 * size) for start in starts]
    canvas.fill(grooves, mix(wood, _SHADE, 0.35))
    canvas.fill([ellipse(top, half, 0.03 * size)], mix(wood, _SUN, 0.3))


def _stone(scene: Scene, canvas: Canvas, rng: np.random.Generator, foot: complex, size: int) -> None:
    grey = mix(vary((140, 138, 134), rng, 20), scene.bottom, 0.25)
    wide, tall = size * rng.uniform(0.26, 0.42), size * rng.uniform(0.16, 0.3)
    centre = foot + 1j * (tall - 0.02 * size)
    bumps = [1.0, *rng.uniform(0.88, 1.1, 8)]
    rim = [cmath.rect(bump, 2 * math.pi * k / 9 - math.pi / 2) for k, bump in enumerate(bumps)]
    outline = smooth(*(centre + complex(wide * z.real, tall * z.imag) for z in rim))
    clip = canvas.mask([outline])
    canvas.fill([outline], mix(grey, _SHADE, 0.3))
    canvas.fill([outline - size * (0.03 + 0.07j)], grey, clip=clip, softness=0.02 * size)
    glow = ellipse(foot + 0.03j * size, wide * 0.6, tall * 0.2)
    canvas.fill([glow], mix(grey, _SUN, 0.3), clip=clip, softness=0.03 * size)


def _ground(scene: Scene, canvas: Canvas, rng: np.random.Generator, foot: complex, size: int) -> None:
    soil = vary(scene.bottom, rng, 16)
    heights = foot.imag + size * rng.uniform(-0.035, 0.01, 6)
    rise = [complex(x * size, y) for x, y in zip(np.linspace(-0.2, 1.2, 6), heights, strict=True)]
    canvas.fill([smooth(*rise, 1.3 * size * (1 + 1j), size * (-0.3 + 1.3j))], soil)
    shadow = ellipse(foot + 0.02j * size, 0.26 * size, 0.03 * size)
    canvas.fill([shadow], mix(soil, _SHADE, 0.4), softness=0.02 * size)
    for points, colour in _grass(scene, rng, size, int(rng.integers(8, 18)), 0.12, foot.imag / size + 0.04):
        canvas.fill([points], colour)


_PERCHES = {"branch": _branch, "wire": _wire, "post": _post, "stone": _stone, "ground": _ground}


def foreground(scene: Scene, rng: np.random.Generator, size: int) -> list[tuple[Points, Colour]]:
    """Return the shapes that hide parts of the bird, from back to front: none, leaves, a twig or grass."""
    kind = FOREGROUNDS[rng.integers(len(FOREGROUNDS))]
    if kind == "nothing":
        return []
    if kind == "grass":
        return _grass(scene, rng, size, int(rng.integers(4, 9)), rng.uniform(0.35, 0.6), 1.03)
    start = complex(rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9)) * size
    along = cmath.rect(size * rng.uniform(0.2, 0.6), rng.uniform(0, 2 * math.pi))
    shapes: list[tuple[Points, Colour]] = []
    if kind == "twig":
        twig = stroke(start - along, start + along, 0.028 * size, 0.018 * size)
        shapes.append((twig, vary((92, 70, 52), rng, 20)))
    for _ in range(int(rng.integers(2, 5))):
        base = start + along * rng.uniform(-0.5, 0.5)
        shapes += _leaf(scene, rng, base, size, 0.1, 0.22)
    return shapes


def _leaf(
    scene: Scene, rng: np.random.Generator, base: complex, size: int, least: float, most: float
) -> list[tuple[Points, Colour]]:
    colour = vary(scene.leaves[rng.integers(len(scene.leaves))], rng, 20)
    reach = cmath.rect(size * rng.uniform(least, most), rng.uniform(0, 2 * math.pi))
    blade = smooth(base, base + reach * (0.35 + 0.26j), base + reach, base + reach * (0.35 - 0.26j))
    half = smooth(base, base + reach * (0.35 + 0.24j), base + reach * 0.96, base + reach * 0.5)
    return [(blade, colour), (half, mix(colour, _SHADE, 0.22))]


def _grass(
    scene: Scene, rng: np.random.Generator, size: int, count: int, height: float, root: float
) -> list[tuple[Points, Colour]]:
    """Return ``count`` blades about ``height`` tall, rooted at ``root`` or below (both as shares of the image)."""
    blades = []
    for _ in range(count):
        base = complex(rng.uniform(-0.05, 1.05), rng.uniform(root, max(root, 1.03)))
        tip = base + complex(rng.uniform(-0.5, 0.5), -1) * height * rng.uniform(0.5, 1.2)
        bend = (base + tip) / 2 + rng.uniform(-0.06, 0.06) * height
        width = 0.012 * (1 + height)
        outline = smooth(base - width, bend - 0.7 * width, tip, bend + 0.7 * width, base + width)
        blades.append((outline * size, vary(scene.leaves[rng.integers(len(scene.leaves))], rng, 24)))
    return blades


def light(pixels: Pixels, height: Pixels, coverage: Pixels, rng: np.random.Generator) -> Pixels:
    """Apply light, dapples and grain to an image.

    Args:
        pixels: (S, S, 3), 0 to 255.
        height: (S, S), height of the bird's rounded surface in pixels.
        coverage: (S, S), 1 on that surface, 0 elsewhere.
        rng: Source of the light's direction, strength and colour, and of dapples and grain.

    Returns:
        (S, S, 3), not yet clipped to [0, 255].
    """
    size = len(height)
    down, right = np.gradient(height)
    slope = rng.uniform(0.35, 0.6) * (down + rng.uniform(-1, 1) * right)
    shade = np.clip(slope, -0.45, 0.3) * coverage
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
    dapples = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255 - 0.5
    strength = rng.uniform(0.72, 1.12) * (1 + shade) * (1 + rng.uniform(0, 0.4) * dapples)
    warmth = rng.uniform(-0.09, 0.09)
    lit = pixels * strength[..., None] * np.array([1 + warmth, 1, 1 - warmth])
    grain = rng.integers(-3, 4, (size, size, 1))
    return np.asarray((lit - 118) * rng.uniform(0.82, 1.08) + 118 + grain, np.float32)
