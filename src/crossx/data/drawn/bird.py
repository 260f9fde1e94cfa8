"""Paint a bird of the synthetic dataset, part by part, in a pose."""

from __future__ import annotations

import cmath
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import ImageChops, ImageFilter

from crossx.data.drawn import anatomy
from crossx.data.drawn.anatomy import BLACK, HORN, ORANGE, PARTS, RED, WHITE, YELLOW
from crossx.data.drawn.canvas import SUPERSAMPLING, Canvas, Colour, Pixels, Points, mix, smooth, stroke

NUMBER: Mapping[str, int] = {name: number for number, name in enumerate(PARTS, start=1)}
"""Number of each part on the canvas's part map."""
REST = len(PARTS) + 1
"""Number of the pixels of the bird that belong to no part."""


@dataclass(frozen=True)
class Pose:
    """Position and pose of a bird; angles in radians, clockwise.

    Attributes:
        unit: Length of the body, in image pixels.
        centre: Centre of the body, in image pixels.
        flip: Whether it faces left.
        tilt: Angle of the body.
        stretch: Factor along the body, below 1 for a view at an angle.
        head: Centre of the head, in bird coordinates.
        head_radius: Radius of the head, in bird coordinates.
        head_angle: Angle between head and body.
        looks_back: Whether the head is turned to the tail.
        wing_angle: Angle between wing and body.
        tail_angle: Angle between tail and body.
        leg_length: Height of the body above the feet, in bird coordinates.
    """

    unit: float
    centre: complex
    flip: bool
    tilt: float
    stretch: float
    head: complex
    head_radius: float
    head_angle: float
    looks_back: bool
    wing_angle: float
    tail_angle: float
    leg_length: float

    @classmethod
    def sample(cls, rng: np.random.Generator, size: int) -> Pose:
        """Draw a pose for an image of ``size`` x ``size`` pixels."""
        degree = math.pi / 180
        tilt, neck = rng.uniform(-42, 6) * degree, rng.uniform(-80, -28) * degree
        looks_back = bool(rng.random() < 0.12)
        nape = 0.26 - 0.12j - 0.06 * looks_back
        return cls(
            unit=size * rng.uniform(0.36, 0.54),
            centre=size * complex(rng.uniform(0.4, 0.6), rng.uniform(0.46, 0.62)),
            flip=bool(rng.random() < 0.5),
            tilt=tilt,
            stretch=rng.uniform(0.84, 1.02),
            head=nape + cmath.rect(rng.uniform(0.24, 0.32), neck - 0.3 * tilt),
            head_radius=rng.uniform(0.235, 0.265),
            head_angle=-0.75 * tilt + rng.uniform(-24, 22) * degree,
            looks_back=looks_back,
            wing_angle=rng.uniform(-12, 16) * degree,
            tail_angle=rng.uniform(-22, 26) * degree,
            leg_length=rng.uniform(0.1, 0.24),
        )

    def place(self, points: Points, scale: float = 1, angle: float = 0, origin: complex = 0) -> Points:
        """Map points to image pixels, from a frame with this scale, angle and origin in bird coordinates."""
        bird = points * cmath.rect(scale, angle) + origin
        bird = (bird.real * self.stretch + 1j * bird.imag) * cmath.rect(self.unit, self.tilt)
        return self.centre + (-bird.conj() if self.flip else bird)

    @property
    def foot(self) -> complex:
        """The point between the feet, in image pixels."""
        between = complex(self.place(np.array([0.09 + 0.2j]))[0])
        lowest = float(self.place(anatomy.BODY).imag.max())
        return complex(between.real, lowest + self.leg_length * self.unit)


class Bird:
    """A bird to paint.

    Nothing here is random and no part depends on another's attribute: birds in the same pose that differ in one
    attribute differ only in the pixels of that part.
    """

    def __init__(
        self, canvas: Canvas, pose: Pose, upper: Colour, under: Colour, attributes: Mapping[str, str]
    ) -> None:
        self._canvas, self._pose, self._attributes = canvas, pose, attributes
        self._upper, self._under = upper, under
        radius, angle, head = pose.head_radius, pose.head_angle, pose.head
        back, front = (head + z * cmath.rect(radius, angle) for z in (anatomy.NECK_BACK, anatomy.NECK_FRONT))
        neck = smooth(-0.1 - 0.22j, back, head, front, 0.47 + 0.02j, 0.2 + 0.1j)
        self._outlines = [pose.place(anatomy.BODY), pose.place(neck), self._on_head(anatomy.HEAD)]
        self._torso, self._head = canvas.mask(self._outlines), canvas.mask(self._outlines[2:])
        self._folded_wing = canvas.mask([self._on_wing(anatomy.WING)])

    def paint(self) -> None:
        """Paint the whole bird, from back to front, plain parts too."""
        self._paint_tail()
        self._paint_legs()
        self._paint_beak()
        self._paint_torso()
        self._paint_breast()
        self._paint_throat()
        self._paint_crown()
        self._paint_face()
        self._paint_wing()

    def relief(self) -> tuple[Pixels, Pixels]:
        """Return the rounded surface of torso and wing: height in pixels and coverage from 0 to 1, (S, S) each."""
        unit = self._pose.unit
        surface = ImageChops.lighter(self._torso, self._folded_wing).reduce(SUPERSAMPLING)
        height = np.zeros(surface.size, np.float32)
        for mask, blur, share in (
            (self._torso, 0.1, 0.16),
            (self._head, 0.07, 0.07),
            (self._folded_wing, 0.03, 0.05),
        ):
            soft = mask.reduce(SUPERSAMPLING).filter(ImageFilter.GaussianBlur(blur * unit))
            height += np.asarray(soft, np.float32) * np.float32(share * unit / 255)
        return height, np.asarray(surface, np.float32) / np.float32(255)

    def _on_head(self, points: Points) -> Points:
        facing = -points.conj() if self._pose.looks_back else points
        return self._pose.place(facing, self._pose.head_radius, self._pose.head_angle, self._pose.head)

    def _on_wing(self, points: Points) -> Points:
        return self._pose.place(points, 1, self._pose.wing_angle, anatomy.SHOULDER)

    def _on_tail(self, points: Points) -> Points:
        return self._pose.place(points, 1, self._pose.tail_angle, anatomy.TAIL_ROOT)

    def _paint_tail(self) -> None:
        value = self._attributes["tail"]
        colour = mix(self._upper, BLACK, 0.42)
        outline = self._on_tail(anatomy.TAILS.get(value, anatomy.TAILS["plain"]))
        self._canvas.fill([outline], colour, NUMBER["tail"])
        clip = self._canvas.mask([outline])
        self._canvas.fill(
            [self._on_tail(line) for line in anatomy.TAIL_LINES], mix(colour, BLACK, 0.35), clip=clip
        )
        self._canvas.fill(
            [self._on_tail(mark) for mark in anatomy.TAIL_MARKS.get(value, ())], WHITE, clip=clip
        )

    def _paint_legs(self) -> None:
        colour = anatomy.LEG_COLOURS[self._attributes["legs"]]
        unit, width = self._pose.unit, anatomy.LEG_WIDTH * self._pose.unit
        forward = -unit if self._pose.flip else unit
        for (hip, step), shade in zip(anatomy.LEGS, (0.25, 0.0), strict=True):
            start = complex(self._pose.place(np.array([hip]))[0])
            foot = complex(start.real + step * forward, self._pose.foot.imag)
            toes = [
                stroke(foot, foot + complex(toe.real * forward, toe.imag * unit), width, 0.6 * width)
                for toe in anatomy.TOES
            ]
            self._canvas.fill([stroke(start, foot, width), *toes], mix(colour, BLACK, shade), NUMBER["legs"])

    def _paint_beak(self) -> None:
        value = self._attributes["beak"]
        colour = {"yellow": YELLOW, "red": RED}.get(value, HORN)
        points = anatomy.BEAKS.get(value, anatomy.BEAKS["thick"])
        self._canvas.fill([self._on_head(points)], colour, NUMBER["beak"])
        tip = complex(points[np.argmax(points.real)])
        gape = stroke(0.8 + 0.05j, tip - 0.15, 0.07)
        self._canvas.fill([self._on_head(gape)], mix(colour, BLACK, 0.4))

    def _paint_torso(self) -> None:
        self._canvas.fill(self._outlines, self._upper, REST)
        soft = 0.05 * self._pose.unit
        self._canvas.fill([self._pose.place(anatomy.BELLY)], self._under, clip=self._torso, softness=soft)
        pale = mix(self._upper, self._under, 0.55)
        self._canvas.fill([self._on_head(anatomy.CHEEK)], pale, clip=self._head, softness=soft)

    def _paint_breast(self) -> None:
        value = self._attributes["breast"]
        region = [self._pose.place(anatomy.BREAST)]
        patch = ORANGE if value == "orange" else None
        self._canvas.fill(region, patch, NUMBER["breast"], clip=self._torso)
        marks = [self._pose.place(mark) for mark in anatomy.BREAST_MARKS.get(value, ())]
        clip = ImageChops.multiply(self._canvas.mask(region), self._torso)
        self._canvas.fill(marks, BLACK if value == "banded" else mix(self._upper, BLACK, 0.62), clip=clip)

    def _paint_throat(self) -> None:
        colours = {"black": BLACK, "white": WHITE, "red": RED, "yellow": YELLOW}
        colour = colours.get(self._attributes["throat"], mix(self._upper, self._under, 0.6))
        self._canvas.fill([self._on_head(anatomy.THROAT)], colour, NUMBER["throat"], clip=self._torso)

    def _paint_crown(self) -> None:
        value = self._attributes["crown"]
        crest = mix(self._upper, BLACK, 0.25)
        colours = {"black": BLACK, "red": RED, "white": WHITE, "golden": YELLOW, "crested": crest}
        if value == "crested":
            self._canvas.fill([self._on_head(anatomy.CREST)], crest, NUMBER["crown"])
        self._canvas.fill(
            [self._on_head(anatomy.CROWN)], colours.get(value), NUMBER["crown"], clip=self._head
        )

    def _paint_face(self) -> None:
        value, part = self._attributes["face"], NUMBER["face"]
        mask = BLACK if value == "masked" else mix(self._upper, self._under, 0.2)
        self._canvas.fill([self._on_head(anatomy.FACE)], mask, part, clip=self._head)
        if value == "browed":
            self._canvas.fill([self._on_head(anatomy.BROW)], WHITE, part, clip=self._head)
        elif value == "ringed":
            self._canvas.fill([self._on_head(anatomy.EYE_RING)], WHITE, part)
        self._canvas.fill([self._on_head(anatomy.EYE)], (14, 12, 14), part)
        self._canvas.fill([self._on_head(anatomy.GLINT)], WHITE, part)

    def _paint_wing(self) -> None:
        colour, clip = mix(self._upper, BLACK, 0.3), self._folded_wing
        self._canvas.fill([self._on_wing(anatomy.WING)], mix(colour, BLACK, 0.35), NUMBER["wing"])
        soft = 0.02 * self._pose.unit
        self._canvas.fill([self._on_wing(anatomy.COVERTS)], colour, clip=clip, softness=soft)
        quills = [self._on_wing(quill) for quill in anatomy.QUILLS]
        self._canvas.fill(quills, mix(colour, WHITE, 0.12), clip=clip)
        marks, mark_colour = anatomy.WING_MARKS.get(self._attributes["wing"], ((), WHITE))
        self._canvas.fill([self._on_wing(mark) for mark in marks], mark_colour, clip=clip)
