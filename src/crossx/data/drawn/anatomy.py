"""Shapes and colours of the birds in the synthetic dataset.

Bird coordinates: the body's centre at 0, the beak towards +x, y down, the body about 1 long. Head, wing and tail have
their own origins, so that a pose can rotate them; the head's unit is its radius.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from crossx.data.drawn.canvas import Colour, Points, ellipse, smooth, stroke

PARTS = ("beak", "crown", "face", "throat", "breast", "wing", "tail", "legs")

BLACK, WHITE = (28, 26, 30), (248, 247, 242)
RED, YELLOW, ORANGE, BLUE = (216, 32, 38), (252, 206, 36), (242, 124, 28), (48, 134, 236)
HORN, PINK = (58, 54, 56), (228, 162, 158)

PLUMAGES: Mapping[str, tuple[Colour, Colour]] = {
    "bunting": ((62, 102, 178), (176, 198, 226)),
    "thrush": ((172, 88, 48), (234, 204, 170)),
    "warbler": ((122, 134, 54), (220, 212, 142)),
    "starling": ((108, 70, 138), (202, 182, 216)),
    "finch": ((42, 128, 110), (178, 214, 190)),
    "flycatcher": ((102, 112, 126), (194, 200, 206)),
    "lark": ((180, 150, 104), (232, 216, 186)),
    "sparrow": ((126, 88, 58), (216, 192, 160)),
}
"""Colours of each family's classes: upper side, under side."""

# Body, in bird coordinates.
BODY = smooth(
    *(0.44 - 0.14j, 0.48 + 0.06j, 0.33 + 0.27j, 0.03 + 0.33j, -0.28 + 0.24j),
    *(-0.56 + 0.05j, -0.42 - 0.1j, -0.12 - 0.25j, 0.22 - 0.28j),
)
BELLY = smooth(
    *(0.62 - 0.34j, 0.7 + 0.2j, 0.3 + 0.5j, -0.3 + 0.46j),
    *(-0.66 + 0.12j, -0.3 + 0.1j, 0.05 + 0.07j, 0.3 - 0.16j),
)
BREAST = smooth(
    *(0.36 - 0.13j, 0.56 - 0.06j, 0.58 + 0.18j, 0.36 + 0.38j, 0.12 + 0.36j, 0.1 + 0.2j, 0.22 + 0.03j)
)
_GRID = [complex(0.16 + 0.085 * (x + 0.5 * (y % 2)), 0.08 * y) for y in range(5) for x in range(5)]
BREAST_MARKS: Mapping[str, tuple[Points, ...]] = {
    "spotted": tuple(ellipse(spot, 0.024) for spot in _GRID),
    "streaked": tuple(stroke(spot - 0.045j, spot + 0.045j, 0.03, 0.018) for spot in _GRID),
    "banded": (smooth(0.24 - 0.04j, 0.4 + 0.04j, 0.6 + 0.02j, 0.6 + 0.13j, 0.4 + 0.15j, 0.18 + 0.07j),),
}

# Head: origin at its centre, its radius as unit.
HEAD = smooth(
    *(1 + 0.1j, 0.8 - 0.6j, 0.1 - 1j, -0.68 - 0.76j, -1 + 0.02j, -0.7 + 0.74j, 0.05 + 1j, 0.78 + 0.66j)
)
CHEEK = ellipse(0.35 + 0.6j, 0.8, 0.4)
NECK_BACK, NECK_FRONT = -0.98 + 0.1j, 0.85 + 0.5j
CROWN = smooth(
    *(1.2 - 0.3j, 0.5 - 0.46j, -0.2 - 0.46j, -0.8 - 0.2j, -1.3 + 0.1j, -1.3 - 1.2j, -1.4j, 1.1 - 1.1j)
)
CREST = smooth(
    *(0.62 - 0.72j, 0.1 - 1.15j, -0.7 - 1.6j, -1.55 - 1.75j, -1.15 - 1.2j, -0.98 - 0.5j, -0.3 - 0.6j)
)
FACE = smooth(*(1 - 0.3j, 0.4 - 0.44j, -0.35 - 0.38j, -0.85 - 0.06j, -0.4 + 0.24j, 0.3 + 0.2j, 0.95 + 0.08j))
BROW = smooth(
    *(0.95 - 0.42j, 0.35 - 0.6j, -0.3 - 0.52j, -0.95 - 0.1j, -0.85 + 0.08j, -0.3 - 0.26j, 0.35 - 0.34j)
)
EYE_CENTRE = 0.3 - 0.1j
EYE_RING, EYE, GLINT = (
    ellipse(EYE_CENTRE, 0.44),
    ellipse(EYE_CENTRE, 0.23),
    ellipse(EYE_CENTRE + 0.07 - 0.08j, 0.08),
)
THROAT = smooth(*(1.15 + 0.26j, 0.55 + 0.3j, 0.05 + 0.46j, -0.2 + 0.9j, 0.05 + 1.4j, 0.6 + 1.55j, 1.1 + 1.0j))
BEAKS: Mapping[str, Points] = {
    "slender": smooth(0.7 - 0.16j, 1.1 - 0.1j, 1.72 + 0.1j, 1.1 + 0.2j, 0.7 + 0.26j),
    "thick": smooth(0.7 - 0.36j, 1.15 - 0.3j, 1.58 + 0.16j, 1.15 + 0.42j, 0.7 + 0.46j),
    "long": smooth(0.7 - 0.2j, 1.2 - 0.1j, 2.45 + 0.2j, 1.2 + 0.2j, 0.7 + 0.28j),
}

# Wing: origin at the shoulder.
SHOULDER = 0.2 - 0.07j
WING = smooth(
    *(0.04 - 0.02j, -0.1 - 0.13j, -0.36 - 0.13j, -0.62 + 0j, -0.9 + 0.15j),
    *(-0.62 + 0.17j, -0.3 + 0.21j, -0.06 + 0.15j),
)
COVERTS = smooth(0.1 - 0.05j, -0.1 - 0.2j, -0.4 - 0.2j, -0.42 + 0.02j, -0.26 + 0.26j, 0.2j)
QUILLS = tuple(
    stroke(complex(-0.36 - 0.04 * k, 0.055 * k - 0.03), complex(0.06 * k - 0.84, 0.11 + 0.022 * k), 0.012)
    for k in range(4)
)
WING_MARKS: Mapping[str, tuple[tuple[Points, ...], Colour]] = {
    "barred": (
        (stroke(-0.14 - 0.2j, -0.17 + 0.26j, 0.055), stroke(-0.31 - 0.2j, -0.35 + 0.28j, 0.055)),
        WHITE,
    ),
    "golden": ((smooth(-0.3 - 0.2j, -0.2 + 0.04j, -0.3 + 0.26j, -0.66 + 0.2j, -0.6 - 0.02j),), YELLOW),
    "red": (
        (smooth(0.1 - 0.1j, -0.1 - 0.2j, -0.27 - 0.15j, -0.16 + 0.02j, -0.12 + 0.2j, 0.06 + 0.16j),),
        RED,
    ),
}

# Tail: origin at its root.
TAIL_ROOT = -0.46 + 0j
TAILS: Mapping[str, Points] = {
    "plain": smooth(
        *(0.12 - 0.07j, -0.2 - 0.08j, -0.46 - 0.1j, -0.55 - 0.02j, -0.5 + 0.11j, -0.2 + 0.1j, 0.1 + 0.11j)
    ),
    "forked": np.array(
        [0.12 - 0.07j, -0.3 - 0.11j, -0.72 - 0.2j, -0.4 + 0j, -0.7 + 0.22j, -0.3 + 0.13j, 0.1 + 0.11j]
    ),
}
TAIL_LINES = (stroke(-0.1 - 0.03j, -0.7 - 0.04j, 0.012), stroke(-0.1 + 0.035j, -0.7 + 0.05j, 0.012))
TAIL_MARKS: Mapping[str, tuple[Points, ...]] = {
    "tipped": (stroke(-0.47 - 0.3j, -0.47 + 0.3j, 0.18),),
    "banded": tuple(stroke(x - 0.3j, x + 0.3j, 0.055) for x in (-0.2, -0.33, -0.46)),
}

# Legs: hip and how far the foot is in front of it; toes relative to the foot.
LEGS = ((0.16 + 0.2j, 0.05), (0.02 + 0.22j, -0.02))
TOES = (0.13 + 0.02j, 0.1 + 0.05j, -0.08 + 0.02j)
LEG_WIDTH = 0.05
LEG_COLOURS: Mapping[str, Colour] = {"pink": PINK, "orange": ORANGE, "black": BLACK, "blue": BLUE}
