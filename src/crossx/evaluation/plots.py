"""Plot of the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crossx.explain.plotting import BLUE, DARK_BLUE, DPI, VERMILION, save_png, shorten

MAX_COUNTED_CLASSES = 20
MAX_NAME_LENGTH = 48
MAX_MATRIX_SIDE = 24.0
"""In inches; beyond it cells shrink, and only every n-th class is named."""

# the palest shade differs clearly from empty white cells, so that one wrong image in fifty is visible
RIGHT = LinearSegmentedColormap.from_list("right", ["#cfe3f3", BLUE, DARK_BLUE])
WRONG = LinearSegmentedColormap.from_list("wrong", ["#ffd9bf", VERMILION, "#702f00"])


def plot_confusion(confusion: NDArray[np.int64], classes: Sequence[str], path: Path, *, title: str) -> None:
    """Draw a confusion matrix as a PNG: correct predictions (the diagonal) in blue, wrong ones in vermilion.

    Colours show the share of the true class's images; up to ``MAX_COUNTED_CLASSES`` classes, cells also show counts.

    Args:
        confusion: (K, K), true classes in rows, predicted classes in columns.
        classes: The K class names.
        path: The PNG file to write.
        title: Shown above.

    Raises:
        CrossXError: If the file cannot be written.
    """
    num_classes = len(classes)
    cell = min(max(0.11, 3.6 / num_classes), MAX_MATRIX_SIDE / num_classes)
    side = cell * num_classes
    # saving crops the margins for names, title and colour bars
    figure = Figure(figsize=(side + 4, side + 4), dpi=DPI)
    axes = figure.add_axes((2 / (side + 4), 2 / (side + 4), side / (side + 4), side / (side + 4)))
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(num_classes, dtype=bool)
    for cells, colours in ((diagonal, RIGHT), (~diagonal, WRONG)):
        shown = np.ma.masked_where(~cells | (confusion == 0), shares)
        axes.imshow(shown, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
    if num_classes <= MAX_COUNTED_CLASSES:
        _write_counts(axes, confusion, shares, size=min(9.0, cell * 24))
    _name_classes(axes, classes, cell)
    # titles of a large picture must be readable when it is shown whole
    scale = max(1.0, side / 9)
    axes.set_title(title, fontsize=11 * scale, parse_math=False)
    axes.set_xlabel("predicted class", fontsize=10 * scale)
    axes.set_ylabel("true class", fontsize=10 * scale)
    _add_colour_bars(figure, axes, scale)
    save_png(figure, path, bbox_inches="tight", pad_inches=0.15)


def _write_counts(axes: Axes, confusion: NDArray[np.int64], shares: NDArray[np.float64], size: float) -> None:
    for row, column in zip(*np.nonzero(confusion), strict=True):
        colour = "white" if shares[row, column] > 0.4 else "black"
        text = str(confusion[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)


def _name_classes(axes: Axes, classes: Sequence[str], cell: float) -> None:
    size = min(9.0, max(4.0, cell * 72 * 0.6))
    step = int(np.ceil(size * 1.2 / (cell * 72)))
    ticks = range(0, len(classes), step)
    names = [shorten(classes[index], MAX_NAME_LENGTH) for index in ticks]
    axes.set_xticks(ticks, names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, names, fontsize=size, parse_math=False)
    # thin lines between cells
    axes.set_xticks(np.arange(0.5, len(classes) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(classes) - 1), minor=True)
    axes.grid(which="minor", color="0.9", linewidth=min(0.6, cell * 2))
    axes.tick_params(which="minor", length=0)
    axes.tick_params(which="major", length=2)


def _add_colour_bars(figure: Figure, axes: Axes, scale: float) -> None:
    left, bottom, width, height = axes.get_position().bounds
    inch = scale / figure.get_figwidth()
    for place, (colours, label) in enumerate(((RIGHT, "correct"), (WRONG, "wrong"))):
        x = left + width + (0.15 + 0.25 * place) * inch
        bar_axes = figure.add_axes((x, bottom, 0.2 * inch, min(height, 3.6 * inch)))
        bar = figure.colorbar(ScalarMappable(Normalize(0, 1), colours), cax=bar_axes)
        # below, as a long title of the matrix may end above the bars
        bar_axes.set_xlabel(label, fontsize=8 * scale, rotation=90)
        if place == 0:
            bar.set_ticks([])
    bar.set_label("share of the true class's images", fontsize=8 * scale)
    bar_axes.tick_params(labelsize=8 * scale)
