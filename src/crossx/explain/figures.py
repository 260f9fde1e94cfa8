"""Figures of maps with one row per image."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from crossx.errors import UsageError
from crossx.explain.maps import Explanation, Kind, explain_images
from crossx.explain.overlays import BOX_COLOURS as BOX_COLOURS
from crossx.explain.overlays import COLORMAP, OPACITY, check_colormap, check_opacity, outline, overlay
from crossx.explain.overlays import LUMA as LUMA
from crossx.explain.overlays import layer as layer
from crossx.explain.plotting import DPI, save_png
from crossx.methods.base import Method
from crossx.methods.weights import load_method
from crossx.runs import ModelSpec

CELL = 1.5
"""Side of an image in inches."""
GAP, TEXT, HEADS, BAR = 0.06, 2.3, 0.55, 0.75
"""Inches between images, for the text left of a row, for the column titles, for the colour bar."""
MAX_COLUMNS = 10
"""Maps per line."""
TEXT_WIDTH = 32
"""Characters per line of the text left of a row; longer names are cut."""


@dataclass(frozen=True)
class FigureRow:
    """One image of a figure.

    Attributes:
        image: uint8 (H, W, 3), as the network saw it.
        explanation: Its maps.
        text: The text left of it.
    """

    image: NDArray[np.uint8]
    explanation: Explanation
    text: str


class MapFigure(Figure):
    """A figure that notebooks display without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        # half the resolution of a file, since a notebook stores every picture that it shows
        buffer = io.BytesIO()
        save_png(self, buffer, dpi=DPI / 2)
        return buffer.getvalue()


def figure(
    network: Method | str | Path,
    images: Tensor,
    spec: ModelSpec | None = None,
    *,
    names: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    maps: Kind = "activation",
    classes: int | Sequence[int] | Tensor | None = None,
    colormap: str = COLORMAP,
    opacity: float = OPACITY,
) -> Figure:
    """Draw where a network looks, as in Fig. 5: one row per image, one column per stage and part.

    Args:
        network: A trained method, or a run folder or a checkpoint file in one.
        images: (B, 3, H, W), normalised; ``Predictor.inputs`` makes them from files.
        spec: Class names and normalisation of a method; a run has its own. Without one, the normalisation is the
            backbone's and classes are numbered.
        names: Names of the images.
        labels: Names of their true classes.
        maps: See ``explain_images``.
        classes: See ``explain_images``.
        colormap: See ``overlay``.
        opacity: See ``overlay``.

    Returns:
        A matplotlib figure, displayed as the last value of a notebook cell; ``savefig`` writes it.

    Raises:
        UsageError: For options that ``explain_images`` or ``overlay`` rejects, or not one name or label per image.
        CrossXError: If there is no such run.
    """
    check_colormap(colormap)
    check_opacity(opacity)
    if len(images) == 0:
        raise UsageError("figure needs at least one image.")
    for what, given in (("names", names), ("labels", labels)):
        if given is not None and len(given) != len(images):
            raise UsageError(
                f"figure takes one of {what} for each of the {len(images)} images, not {len(given)}."
            )
    if isinstance(network, Method):
        method = network
    else:
        method, spec = load_method(network)
    numbered = tuple(f"class {number}" for number in range(method.num_classes))
    class_names = spec.display_names if spec else numbered
    shown = dict(zip(spec.classes if spec else numbered, class_names, strict=True))
    statistics = method.backbone.data_config
    mean, std = (
        (spec.preprocessing.mean, spec.preprocessing.std) if spec else (statistics["mean"], statistics["std"])
    )
    explanations = explain_images(
        method, images, maps=maps, classes=classes, temperature=spec.temperature if spec else 1.0
    )
    rows = []
    for number, image in enumerate(to_pixels(images, mean, std)):
        name, label = (
            names[number] if names else "",
            shown.get(labels[number], labels[number]) if labels else None,
        )
        text = caption(explanations[number], class_names, name=name, label=label)
        rows.append(FigureRow(image, explanations[number], text))
    return draw(rows, colormap=colormap, opacity=opacity)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Undo the normalisation: (B, 3, H, W) -> uint8 (B, H, W, 3)."""
    scaled = images.detach().float().cpu().permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    pixels: NDArray[np.uint8] = (255 * scaled).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels


def caption(
    explanation: Explanation,
    classes: Sequence[str],
    *,
    name: str = "",
    label: str | None = None,
    rejected: bool = False,
) -> str:
    """Return the text of a row: name, prediction with probability, true class, and the class of other class maps."""
    prediction = explanation.prediction
    lines = [name] if name else []
    probability = f"{explanation.probabilities[prediction]:.0%}"
    if rejected:
        lines += ["none of the classes;", f"nearest, {probability}:", classes[prediction]]
    else:
        lines += [f"predicted, {probability}:", classes[prediction]]
    if label is not None and rejected:
        lines += ["it is:", label]
    elif label is not None:
        lines += ["right"] if label == classes[prediction] else ["wrong, it is:", label]
    if explanation.target != prediction:
        lines += ["class maps of:", classes[explanation.target]]
    return "\n".join(_shortened(line) for line in lines)


def draw(
    rows: Sequence[FigureRow],
    *,
    colormap: str = COLORMAP,
    opacity: float = OPACITY,
    cell: float = CELL,
    across: int = 1,
) -> MapFigure:
    """Draw rows with the same kinds of maps: one column per stage and part, class maps below activation maps.

    More than ``MAX_COLUMNS`` maps continue on the next line. Regions that a method looks at again are numbered on the
    image, 1 is the best. Class maps of other heads than the activation maps are on lines with titles of their own.

    Args:
        rows: At least one.
        colormap: See ``overlay``.
        opacity: See ``overlay``.
        cell: Side of an image in inches; the figure grows with the number of rows and columns.
        across: Rows next to each other.

    Raises:
        UsageError: For an unknown colormap, or an opacity outside 0 to 1.
    """
    layout = _layout(rows[0].explanation.maps)
    grid = _Grid(layout, -(-len(rows) // across), min(across, len(rows)), cell)
    for number, row in enumerate(rows):
        down, block = divmod(number, across)
        boxes = row.explanation.boxes
        image = row.image if boxes is None else outline(row.image, boxes)
        for index, line in enumerate(layout.lines):
            at = _Place(block, down, index)
            if index == 0:
                grid.write(row.text, at, 0, size=8)
                grid.show(image, at, 0, "image" if layout.headed or down == 0 else "")
            elif line.label:
                grid.write(line.label, at, 1, size=9)
            for column, name in enumerate(line.names, start=1):
                if (map_ := row.explanation.maps.get(name)) is not None:
                    picture = overlay(row.image, map_, colormap=colormap, opacity=opacity)
                    title = line.titles.get(name, "") if layout.headed or down == 0 else ""
                    grid.show(picture, at, column, title)
    grid.add_colour_bar(check_colormap(colormap))
    return grid.figure


def rows_that_fit(maps: Iterable[str], cell: float, width: float, height: float) -> tuple[int, int]:
    """Return how many rows with these maps ``draw`` fits across and down a page, at least 1 each.

    Args:
        maps: Names of the maps of a row.
        cell: See ``draw``.
        width: Width of the page in inches.
        height: Its height.
    """
    one = _Grid(_layout(maps), 1, 1, cell)
    return max(1, int((width - BAR) / one.block_width)), max(1, int((height - HEADS) / one.row_height))


class _Line(NamedTuple):
    """A line of maps in a row: their names, their titles (name -> text), and the text left of them."""

    names: list[str]
    titles: dict[str, str]
    label: str


class _Layout(NamedTuple):
    """The lines of a row, and whether every line of the figure has titles, not only those of the first row."""

    lines: list[_Line]
    headed: bool

    @property
    def columns(self) -> int:
        return 1 + max(len(line.names) for line in self.lines)


def _layout(maps: Iterable[str]) -> _Layout:
    """Arrange the maps of an image: those of a kind next to each other, the kinds below each other.

    Every line has titles of its own if there are too many columns, or if kinds have no column in common.
    """
    names = list(maps)
    kinds = list(dict.fromkeys(map(_kind, names)))
    columns = list(dict.fromkeys(name.removeprefix(_kind(name)) for name in names))
    # class maps that are below none of the activation maps would only move to the right of them
    apart = len(kinds) > 1 and len(columns) == len(names)
    if len(columns) > MAX_COLUMNS or apart:
        wrapped = [
            [kind + column for column in chunk]
            for kind in kinds
            for chunk in _chunks([column for column in columns if kind + column in names])
        ]
        return _Layout([_Line(chunk, {name: _title(name) for name in chunk}, "") for chunk in wrapped], True)
    # the title is above the first map of a column, which may be a class map
    first = {column: next(kind + column for kind in kinds if kind + column in names) for column in columns}
    titles = {name: _title(name) for name in first.values()}
    lines = [_Line([kind + column for column in columns], titles, kind.strip()) for kind in kinds]
    return _Layout(lines or [_Line([], {}, "")], False)


def _chunks(columns: Sequence[str]) -> list[list[str]]:
    """Divide columns into lines of at most ``MAX_COLUMNS``, if possible between stages."""
    stages = [
        list(group) for _, group in itertools.groupby(columns, lambda name: name.partition(" part ")[0])
    ]
    chunks: list[list[str]] = [[]]
    for stage in stages:
        lines = -(-len(stage) // MAX_COLUMNS)
        for piece in (
            stage[index * len(stage) // lines : (index + 1) * len(stage) // lines] for index in range(lines)
        ):
            if len(chunks[-1]) + len(piece) > MAX_COLUMNS:
                chunks.append([])
            chunks[-1] += piece
    return chunks


class _Place(NamedTuple):
    """A line of a row: the row's block across, its number down, and the line in it."""

    block: int
    down: int
    line: int


class _Grid:
    """A figure of square cells in columns and lines, with room for text left of them and for a colour bar.

    Args:
        layout: The lines of a row.
        down: Rows below each other.
        across: Rows next to each other.
        cell: Side of a cell in inches.
    """

    def __init__(self, layout: _Layout, down: int, across: int, cell: float) -> None:
        self.cell, self.pitch, self.lines = cell, cell + GAP, len(layout.lines)
        self.line_height = self.pitch + (HEADS if layout.headed else 0)
        self.row_height = self.lines * self.line_height
        self.block_width = TEXT + layout.columns * self.pitch
        self.width = across * self.block_width + BAR
        self.height = down * self.row_height + (0 if layout.headed else HEADS)
        self.figure = MapFigure(figsize=(self.width, self.height), dpi=DPI)

    def show(self, picture: NDArray[np.uint8], at: _Place, column: int, title: str) -> None:
        axes = self._axes(self._left(at, column), at, self.cell)
        axes.imshow(picture)
        axes.set_axis_off()
        axes.set_title(title, fontsize=9, pad=4, parse_math=False)

    def write(self, text: str, at: _Place, column: int, size: float) -> None:
        """Write left of a cell."""
        x, y = self._left(at, column) - 2 * GAP, self._bottom(at) + self.cell / 2
        self.figure.text(
            x / self.width, y / self.height, text,
            fontsize=size, ha="right", va="center", linespacing=1.3, parse_math=False,
        )  # fmt: skip

    def add_colour_bar(self, colours: Colormap) -> None:
        axes = self._axes(self.width - BAR + GAP, _Place(0, 0, 0), 0.1)
        bar = self.figure.colorbar(ScalarMappable(Normalize(0, 1), colours), cax=axes)
        bar.set_ticks([0, 1], labels=["lowest", "highest"])
        axes.tick_params(labelsize=7, length=2)

    def _axes(self, left: float, at: _Place, width: float) -> Axes:
        x, y, w, h = left, self._bottom(at), width, self.cell
        return self.figure.add_axes((x / self.width, y / self.height, w / self.width, h / self.height))

    def _left(self, at: _Place, column: int) -> float:
        return at.block * self.block_width + TEXT + column * self.pitch

    def _bottom(self, at: _Place) -> float:
        lines = at.down * self.lines + at.line
        return self.height - HEADS - lines * self.line_height - self.cell


def _shortened(text: str) -> str:
    """Cut the middle of a long text: file names differ at the end, class names at the start."""
    half = TEXT_WIDTH // 2
    return text if len(text) <= TEXT_WIDTH else f"{text[:half]}…{text[1 - half :]}"


def _title(name: str) -> str:
    kind = _kind(name)
    return f"{kind.strip()}\n{name.removeprefix(kind)}".strip().replace(" part ", "\npart ")


def _kind(name: str) -> str:
    """Return the prefix of a map's name: ``CAM ``, ``Grad-CAM `` or nothing for activation maps."""
    return name[: name.find("CAM ") + len("CAM ")] if "CAM " in name else ""
