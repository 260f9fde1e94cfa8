"""Charts as numbers: coordinates in a drawing of ``WIDTH`` by ``HEIGHT`` that ``charts.html.j2`` turns into SVG.

The page's style sheet sets the colours, so that charts follow the reader's light or dark mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 26
"""Margins of the drawing; on the left at least that, more for long labels."""
DIGIT = 7
"""Width of a digit of a tick's label."""
MAX_CURVES = 4
"""More curves in a group are divided into charts by the last word of their names, if possible."""
MAX_POINTS = 400
"""Of longer curves only every n-th point is drawn."""
MAX_DOTS = 60
"""Up to this many points, each has a dot with its value as a tooltip."""

COUNTERS = ("epoch", "step", "phase", "seconds")
"""Columns of the history that are no curves."""
TITLES = {"loss": "Loss", "top1": "Accuracy (top-1)", "lr": "Learning rate"}
"""Titles of the curves that every training has; a method names its own terms (``Method.curve_titles``)."""


Mark = Literal["line", "dot", "ring", "halo"]


class Tick(NamedTuple):
    """A tick of an axis: its coordinate and text."""

    place: float
    text: str


class Dot(NamedTuple):
    """A point with a tooltip."""

    x: float
    y: float
    text: str


class Series(NamedTuple):
    """A curve, or points without a curve.

    Attributes:
        label: Its name.
        path: SVG path data; empty for points without a curve.
        dots: Its points, if they are few or without a curve.
        last: Its last value as text.
        mark: How the points are drawn, see ``Group``.
    """

    label: str
    path: str
    dots: tuple[Dot, ...]
    last: str
    mark: Mark = "line"


class Chart(NamedTuple):
    """Curves or points, over epochs or another number.

    Attributes:
        title: Shown above.
        description: The chart in words.
        series: The curves or points.
        x_ticks: Ticks of the horizontal axis.
        y_ticks: Ticks of the values.
        left: Left margin of the drawing.
        kept: Coordinate of the epoch whose weights were kept, if known.
        x_title: What the horizontal axis shows.
    """

    title: str
    description: str
    series: tuple[Series, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left: float
    kept: float | None = None
    x_title: str = "epoch"


class Group(NamedTuple):
    """What ``accuracy_chart`` draws alike.

    Attributes:
        label: Its name.
        curves: Points (x, accuracy, tooltip) of each curve.
        mark: ``line`` joins the points of a curve; ``dot``, ``ring`` and ``halo``, a larger ring, are at each point.
    """

    label: str
    curves: Sequence[Sequence[tuple[float, float, str]]]
    mark: Mark = "dot"


class Bin(NamedTuple):
    """The images whose probability is between ``low`` and ``high``.

    Attributes:
        low: Lower end.
        high: Upper end.
        n: Number of images.
        confidence: Mean probability of the predicted class; None without images.
        accuracy: Fraction predicted correctly; None without images.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def training_curves(
    history: Sequence[Mapping[str, float]],
    kept: int | None = None,
    titles: Mapping[str, str] = MappingProxyType({}),
) -> list[Chart]:
    """Draw every number of a training history, related ones in one chart.

    Names are ``SPLIT/WORD_WORD...`` or ``WORD...``. Those with the same first word share a chart, titled by the words
    that they have in common; more than ``MAX_CURVES`` are divided by their last word, such as the stage. A curve that
    equals the loss of its split everywhere, as a loss of one term does, is left out.

    Args:
        history: One row per epoch.
        kept: The epoch whose weights were kept.
        titles: First words of a name -> title, in addition to ``TITLES``.
    """
    groups: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in history for name in row if name not in COUNTERS):
        loss = f"{_split(name)}/loss"
        if name == loss or any(row.get(name) != row.get(loss) for row in history):
            groups.setdefault(_metric(name).split("_")[0], []).append(name)
    divided = [chart for names in groups.values() for chart in _divided(names)]
    # numbers of several splits first
    ordered = sorted(divided, key=lambda names: len(set(map(_split, names))) == 1)
    return [_chart(history, names, kept, {**titles, **TITLES}) for names in ordered]


def _divided(names: Sequence[str]) -> list[list[str]]:
    if len(names) <= MAX_CURVES:
        return [list(names)]
    by_end: dict[str, list[str]] = {}
    for name in names:
        by_end.setdefault(_metric(name).split("_")[-1], []).append(name)
    readable = all(1 < len(charts) <= MAX_CURVES for charts in by_end.values())
    return list(by_end.values()) if readable else [list(names)]


def thinned(rows: Sequence[Mapping[str, float]], most: int) -> list[Mapping[str, float]]:
    """Return every n-th row and the last one, at most ``most`` + 1 rows."""
    step = -(-len(rows) // most) or 1
    kept = list(rows[::step])
    return kept if not rows or kept[-1] is rows[-1] else [*kept, rows[-1]]


def reliability_bins(
    confidences: NDArray[np.float32], correct: NDArray[np.bool_], count: int = 15
) -> list[Bin]:
    """Group images into equal bins of the predicted class's probability, as the expected calibration error does.

    Guo et al., "On Calibration of Modern Neural Networks", 2017 (https://arxiv.org/abs/1706.04599), section 2.

    Args:
        confidences: (N,), probability of the predicted class.
        correct: (N,), whether the prediction is correct.
        count: Number of bins; a bin includes its upper end.
    """
    number = np.clip(np.ceil(confidences.astype(float) * count).astype(int) - 1, 0, count - 1)
    bins = []
    for index in range(count):
        inside = number == index
        n = int(inside.sum())
        mean = float(confidences[inside].mean()) if n else None
        accuracy = float(correct[inside].mean()) if n else None
        bins.append(Bin(index / count, (index + 1) / count, n, mean, accuracy))
    return bins


class _Axis(NamedTuple):
    """Maps values from ``low`` to ``high`` to coordinates from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def _chart(
    history: Sequence[Mapping[str, float]], names: Sequence[str], kept: int | None, titles: Mapping[str, str]
) -> Chart:
    words = [_metric(name).split("_") for name in names]
    common = _shared_start(words)
    # each label keeps a word of its own
    most = min(map(len, words)) - len(common) - 1
    ends = _shared_start([own[::-1] for own in words])[: max(0, most)][::-1]
    several_splits = len(set(map(_split, names))) > 1
    percent = all(_metric(name).startswith("top") for name in names)
    rows = thinned(history, MAX_POINTS)
    curves = [[(row["epoch"], row[name]) for row in rows if name in row] for name in names]
    first, last = history[0]["epoch"], history[-1]["epoch"]
    # a single epoch would be a range of no width
    margin = 0 if last > first else 1
    up, y_ticks, left = _upward([y for curve in curves for _, y in curve], percent=percent)
    across = _Axis(first - margin, last + margin, left, WIDTH - RIGHT)

    def text(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.4g}"

    series = []
    for name, own, curve in zip(names, words, curves, strict=True):
        split = _split(name)
        middle = own[len(common) : len(own) - len(ends)]
        label = " ".join([*([split] if several_splits else []), *middle]) or split or name
        dots = [Dot(across.place(x), up.place(y), f"{label}, epoch {x:g}: {text(y)}") for x, y in curve]
        series.append(
            Series(label, _path(dots), tuple(dots) if len(dots) <= MAX_DOTS else (), text(curve[-1][1]))
        )
    title = ", ".join([_title(common, titles), *([" ".join(ends)] if ends else [])])
    ranges = "; ".join(
        f"{line.label} from {text(curve[0][1])} to {line.last}"
        for line, curve in zip(series, curves, strict=True)
    )
    return Chart(
        title=title,
        description=f"{title}, epochs {first:g} to {last:g}: {ranges}.",
        series=tuple(series),
        x_ticks=tuple(Tick(across.place(x), text) for x, text in whole_ticks(first, last)),
        y_ticks=y_ticks,
        left=left,
        kept=across.place(kept) if kept is not None and first <= kept <= last else None,
    )


def accuracy_chart(
    title: str,
    groups: Sequence[Group],
    span: tuple[float, float],
    ticks: Sequence[tuple[float, str]],
    *,
    x_title: str = "",
) -> Chart:
    """Draw accuracies over a number.

    Args:
        title: Shown above.
        groups: At least one, each with at least one point.
        span: Ends of the horizontal axis, different numbers.
        ticks: Its ticks: number and text.
        x_title: What it shows, in one word.
    """
    heights = [y for group in groups for curve in group.curves for _, y, _ in curve]
    up, y_ticks, left = _upward(heights, percent=True)
    across = _Axis(*span, left, WIDTH - RIGHT)
    series = []
    for group in groups:
        drawn = [[Dot(across.place(x), up.place(y), text) for x, y, text in curve] for curve in group.curves]
        path = "".join(map(_path, drawn)) if group.mark == "line" else ""
        dots = () if group.mark == "line" else tuple(dot for curve in drawn for dot in curve)
        series.append(Series(group.label, path, dots, "", group.mark))
    return Chart(
        title=title,
        description=f"{title}: from {min(heights):.1%} to {max(heights):.1%}. The numbers are in the table.",
        series=tuple(series),
        x_ticks=tuple(Tick(across.place(x), text) for x, text in ticks),
        y_ticks=y_ticks,
        left=left,
        x_title=x_title,
    )


def whole_ticks(first: float, last: float) -> list[tuple[float, str]]:
    """Return ticks at whole numbers from ``first`` to ``last``, number and text."""
    ticks = MaxNLocator(6, integer=True).tick_values(first, last)
    return [(float(x), f"{x:g}") for x in ticks if first <= x <= last]


def _upward(heights: Sequence[float], *, percent: bool) -> tuple[_Axis, tuple[Tick, ...], float]:
    """Return the vertical axis, its ticks, and the left margin that their labels need."""
    low, high = min(heights), max(heights)
    scale = 1.0 if percent else max(abs(low), abs(high)) or 1.0
    if high - low < 1e-3 * scale:
        # a constant has no range: all ticks would be the same
        low, high = low - 0.05 * scale, high + 0.05 * scale
        if percent:
            low, high = max(0.0, low), min(1.0, high)
    marks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    axis = _Axis(marks[0], marks[-1], HEIGHT - BOTTOM, TOP)
    labels = [f"{100 * y:g}%" if percent else _short(y) for y in marks]
    ticks = tuple(Tick(axis.place(y), label) for y, label in zip(marks, labels, strict=True))
    return axis, ticks, max(LEFT, 12 + DIGIT * max(map(len, labels)))


def _path(dots: Sequence[Dot]) -> str:
    return "M" + "L".join(f"{dot.x:g},{dot.y:g}" for dot in dots)


def _short(value: float) -> str:
    """Format a tick with few digits: ``2.5e-5`` for 0.000025."""
    text = f"{value:.6g}"
    mantissa, exponent, power = text.partition("e")
    return f"{mantissa}e{int(power)}" if exponent else text


def _title(words: Sequence[str], titles: Mapping[str, str]) -> str:
    for count in range(len(words), 0, -1):
        if known := titles.get("_".join(words[:count])):
            return ", ".join([known, *words[count:]])
    return " ".join(words)


def _shared_start(words: Sequence[Sequence[str]]) -> list[str]:
    columns = zip(*words, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _split(name: str) -> str:
    return name.rpartition("/")[0]


def _metric(name: str) -> str:
    return name.rpartition("/")[2]
