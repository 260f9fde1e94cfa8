"""Bar chart of the accuracy of each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crossx.evaluation.metrics import ClassRow, worst_first
from crossx.explain.plotting import DARK_BLUE, DPI, SKY_BLUE, VERMILION, save_png, shorten

BAR, WORST, MEAN = SKY_BLUE, VERMILION, DARK_BLUE
MAX_NAMED = 20
"""Up to this many classes are all named; of more, only the ``NAMED_WORST`` worst."""
NAMED_WORST = 12
MAX_NAME_LENGTH = 48


def plot_class_accuracy(rows: Sequence[ClassRow], path: Path, *, title: str) -> None:
    """Draw the accuracy of each class as a PNG, worst class first, with the mean over classes.

    With more than ``MAX_NAMED`` classes, the left half shows all without names and the right half the worst by name.

    Args:
        rows: At least one class, each with at least one image.
        path: The PNG file to write.
        title: Shown above.

    Raises:
        CrossXError: If the file cannot be written.
    """
    ranked = worst_first(rows)
    mean = sum(map(_percent, ranked)) / len(ranked)
    named = ranked if len(ranked) <= MAX_NAMED else ranked[:NAMED_WORST]
    figure = Figure(figsize=(9, max(2.6, 0.9 + 0.24 * len(named))), dpi=DPI, layout="constrained")
    if named is ranked:
        _draw_named(figure.subplots(), named, mean, BAR)
    else:
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _draw_all(left, ranked, mean, len(named))
        _draw_named(right, named, mean, WORST)
    figure.suptitle(title, fontsize=11, parse_math=False)
    save_png(figure, path)


def _draw_all(axes: Axes, ranked: Sequence[ClassRow], mean: float, worst: int) -> None:
    colours = [WORST] * worst + [BAR] * (len(ranked) - worst)
    axes.bar(range(len(ranked)), [_percent(row) for row in ranked], width=1.0, color=colours)
    axes.axhline(mean, color=MEAN, linewidth=1, linestyle="--", label=f"mean {mean:.1f}%")
    axes.set_xlim(-0.5, len(ranked) - 0.5)
    axes.set_ylim(0, 100)
    axes.set_xticks([])
    axes.set_xlabel(f"{len(ranked)} classes, worst first", fontsize=9)
    axes.set_ylabel("accuracy, %", fontsize=9)
    axes.legend(loc="lower right", fontsize=8)
    _trim(axes)


def _draw_named(axes: Axes, rows: Sequence[ClassRow], mean: float, colour: str) -> None:
    axes.barh(range(len(rows)), [_percent(row) for row in rows], height=0.7, color=colour)
    axes.axvline(mean, color=MEAN, linewidth=1, linestyle="--")
    for y, row in enumerate(rows):
        text = f"{round(_percent(row) * row.n / 100)} of {row.n}"
        axes.annotate(text, (0, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    names = [shorten(row.name, MAX_NAME_LENGTH) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"accuracy, % (dashed: mean over classes, {mean:.1f}%)", fontsize=9)
    _trim(axes)


def _percent(row: ClassRow) -> float:
    return 100 * (row.accuracy or 0.0)


def _trim(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
