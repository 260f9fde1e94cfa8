"""Charts as numbers: places in a drawing of ``WIDTH`` by ``HEIGHT``, which ``charts.html.j2`` turns into SVG.

Colours are left to the page's style sheet, so that a chart follows the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
"""Margins of the drawing."""
MAX_POINTS = 400
"""Of longer curves every n-th point is drawn."""
MAX_DOTS = 60
"""Up to so many points each has a dot, which tells its value under the pointer."""

COUNTERS = ("epoch", "step", "seconds")
"""Columns of the history that count and are no curve."""
TITLES = {
    "loss": "Loss",
    "top1": "Accuracy (top-1)",
    "lr": "Learning rate",
    "data": "Classification term",
    "c3s": "C3S term",
    "cross_layer": "Cross-layer term",
    "s": "Likeness S of the parts (Eq. 3)",
}
"""Titles of the curves known by the first words of their name; any other is titled by its name."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place in the drawing and its text."""

    place: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A point that tells its value."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: Its name in the legend.
        path: SVG path data.
        dots: Its points, if there are few.
        last: Its last value, as text.
    """

    label: str
    path: str
    dots: tuple[Dot, ...]
    last: str


@dataclass(frozen=True)
class LineChart:
    """Curves over epochs.

    Attributes:
        title: Heading.
        description: What is seen, in words.
        series: The curves.
        x_ticks: Marks of the horizontal axis.
        y_ticks: Marks of the vertical axis.
        kept: Place of the epoch whose weights were kept, where it is known.
    """

    title: str
    description: str
    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    kept: float | None


@dataclass(frozen=True)
class Bin:
    """Images whose probability lies in one bin.

    Attributes:
        low: Lower end of the bin.
        high: Upper end.
        n: Number of images.
        confidence: Mean probability of the predicted class; None where there is no image.
        accuracy: Share predicted right; None likewise.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def training_curves(history: Sequence[Mapping[str, float]], kept: int | None = None) -> list[LineChart]:
    """Draw every number of a training history, those that belong together in one chart.

    Names are ``SPLIT/WORD_WORD...`` or ``WORD...``; those with the same first word share a chart, which is named
    by the words that they have in common. A curve that repeats another one everywhere is left out.

    Args:
        history: A row an epoch.
        kept: The epoch whose weights were kept.
    """
    groups: dict[str, list[str]] = {}
    seen: set[tuple[float | None, ...]] = set()
    for name in dict.fromkeys(name for row in history for name in row if name not in COUNTERS):
        values = tuple(row.get(name) for row in history)
        if values not in seen:
            seen.add(values)
            groups.setdefault(_metric(name).split("_")[0], []).append(name)
    # what was measured on several splits is looked at first
    ordered = sorted(groups.values(), key=lambda names: len(set(map(_split, names))) == 1)
    return [_chart(history, names, kept) for names in ordered]


def thinned(rows: Sequence[Mapping[str, float]], most: int) -> list[Mapping[str, float]]:
    """Return every n-th row and the last, at most ``most`` and one."""
    step = -(-len(rows) // most) or 1
    kept = list(rows[::step])
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]


def reliability_bins(
    confidences: NDArray[np.float32], correct: NDArray[np.bool_], count: int = 15
) -> list[Bin]:
    """Sort images into equal bins of the predicted class's probability, as for the expected calibration error.

    Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), section 2.

    Args:
        confidences: (N,), probability of the predicted class.
        correct: (N,), whether the prediction is right.
        count: Number of bins; the upper end belongs to a bin.
    """
    number = np.clip(np.ceil(confidences.astype(float) * count).astype(int) - 1, 0, count - 1)
    bins = []
    for index in range(count):
        inside = number == index
        n = int(inside.sum())
        mean = float(confidences[inside].mean()) if n else None
        right = float(correct[inside].mean()) if n else None
        bins.append(Bin(index / count, (index + 1) / count, n, mean, right))
    return bins


def number_text(value: float, *, percent: bool = False) -> str:
    """Write a number for a reader: four significant digits, or percent."""
    return f"{value:.1%}" if percent else f"{value:.4g}"


@dataclass(frozen=True)
class _Axis:
    """A range of values laid over a range of places."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _chart(history: Sequence[Mapping[str, float]], names: Sequence[str], kept: int | None) -> LineChart:
    words = [_metric(name).split("_") for name in names]
    common = _shared_start(words)
    several_splits = len({_split(name) for name in names}) > 1
    percent = all(_metric(name).startswith("top") for name in names)
    rows = thinned(history, MAX_POINTS)
    curves = [[(row["epoch"], row[name]) for row in rows if name in row] for name in names]
    first, last = history[0]["epoch"], history[-1]["epoch"]
    # one epoch alone would be a range without width
    margin = 0 if last > first else 1
    across = _Axis(first - margin, last + margin, LEFT, WIDTH - RIGHT)
    heights = [y for curve in curves for _, y in curve]
    marks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(min(heights), max(heights))
    up = _Axis(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    series = []
    for name, own, curve in zip(names, words, curves, strict=True):
        label = [*([_split(name)] if several_splits else []), *own[len(common) :]]
        series.append(_series(" ".join(label) or _split(name) or name, curve, across, up, percent))
    title = _title(common)
    told = "; ".join(
        f"{line.label} from {number_text(curve[0][1], percent=percent)} to {line.last}"
        for line, curve in zip(series, curves, strict=True)
    )
    epochs = MaxNLocator(6, integer=True).tick_values(first, last)
    return LineChart(
        title=title,
        description=f"{title}, epochs {first:g} to {last:g}: {told}.",
        series=tuple(series),
        x_ticks=tuple(Tick(across.place(x), f"{x:g}") for x in epochs if first <= x <= last),
        y_ticks=tuple(Tick(up.place(y), f"{100 * y:g}%" if percent else f"{y:.4g}") for y in marks),
        kept=across.place(kept) if kept is not None and first <= kept <= last else None,
    )


def _series(
    label: str, curve: Sequence[tuple[float, float]], across: _Axis, up: _Axis, percent: bool
) -> Series:
    places = [(across.place(x), up.place(y)) for x, y in curve]
    texts = [number_text(y, percent=percent) for _, y in curve]
    dots = [
        Dot(x, y, f"{label}, epoch {epoch:g}: {text}")
        for (x, y), (epoch, _), text in zip(places, curve, texts, strict=True)
    ]
    path = "M" + "L".join(f"{x:g},{y:g}" for x, y in places)
    return Series(label, path, tuple(dots) if len(dots) <= MAX_DOTS else (), texts[-1])


def _title(words: Sequence[str]) -> str:
    for count in range(len(words), 0, -1):
        if known := TITLES.get("_".join(words[:count])):
            return ", ".join([known, *words[count:]])
    return " ".join(words)


def _shared_start(words: Sequence[Sequence[str]]) -> list[str]:
    return [
        column[0] for column in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    ]


def _split(name: str) -> str:
    return name.rpartition("/")[0]


def _metric(name: str) -> str:
    return name.rpartition("/")[2]
