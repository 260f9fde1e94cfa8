"""Maps laid over images, and figures of them with a row an image and a column a map."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from crossx.errors import UsageError, nearest
from crossx.explain.maps import Explanation, Kind, explain_images, min_max, resize
from crossx.methods.base import Method
from crossx.methods.checkpoint import load_method
from crossx.runs import ModelSpec

COLORMAP = "inferno"
"""Perceptually uniform, told apart with every common colour vision deficiency, and lighter means more in grey print
too (https://matplotlib.org/stable/users/explain/colors/colormaps.html)."""

OPACITY = 0.5
DPI = 150
CELL = 1.5
"""Side of an image in inches."""
GAP, TEXT, HEADS, BAR = 0.06, 2.3, 0.55, 0.75
"""Inches between images, for the text left of a row, for the heads above the columns, for the colour bar."""
TEXT_WIDTH = 30
"""Letters a line of the text left of a row."""


@dataclass(frozen=True)
class Row:
    """One image of a figure.

    Attributes:
        image: uint8 (H, W, 3), as the network saw it.
        explanation: Its maps.
        text: What stands left of it.
    """

    image: NDArray[np.uint8]
    explanation: Explanation
    text: str


class MapFigure(Figure):
    """A figure that a notebook shows without pyplot, and that no pyplot state holds on to."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        save_png(self, buffer)
        return buffer.getvalue()


def overlay(
    image: NDArray[np.uint8],
    map_: NDArray[Any],
    *,
    colormap: str = COLORMAP,
    opacity: float = OPACITY,
) -> NDArray[np.uint8]:
    """Lay a map over an image: ``(1 - opacity) image + opacity colormap(map)``.

    The map is brought to [0, 1] by its lowest and highest place, then resized to the image bilinearly.

    Args:
        image: uint8 (H, W, 3).
        map_: (h, w), of any size and scale, finite.
        colormap: Name of a matplotlib colormap.
        opacity: From 0, the image alone, to 1, the map alone.

    Returns:
        uint8 (H, W, 3).

    Raises:
        UsageError: For an unknown colormap, or an opacity outside 0 to 1.
    """
    colours, share = check_colormap(colormap), check_opacity(opacity)
    values = min_max(torch.from_numpy(np.array(map_, dtype=np.float32)))
    height, width = image.shape[:2]
    resized = resize(values[None, None], (height, width))[0, 0].numpy()
    mixed: NDArray[np.float64] = (1 - share) * image + share * 255 * colours(resized)[..., :3]
    return mixed.round().astype(np.uint8)


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
    """Draw where a network looks, as Fig. 5 does: a row an image, a column a map.

    Args:
        network: A trained method, or a run folder or a checkpoint file in one.
        images: (B, 3, H, W), normalised; ``Predictor.inputs`` makes them of files.
        spec: What belongs to a method given as such: class names and normalisation. A run has its own. Without one
            the normalisation is the backbone's and classes have numbers.
        names: What to call the images.
        labels: The names of their true classes.
        maps: See ``explain_images``.
        classes: See ``explain_images``.
        colormap: See ``overlay``.
        opacity: See ``overlay``.

    Returns:
        A matplotlib figure that shows itself as the last value of a notebook's cell; ``savefig`` writes it.

    Raises:
        UsageError: For options that ``explain_images`` or ``overlay`` refuses, or not one name or label an image.
        CrossXError: If there is no such run.
    """
    check_colormap(colormap)
    check_opacity(opacity)
    for what, given in (("names", names), ("labels", labels)):
        if given is not None and len(given) != len(images):
            raise UsageError(
                f"figure takes one of {what} for each of the {len(images)} images, not {len(given)}."
            )
    if isinstance(network, Method):
        method = network
    else:
        method, spec = load_method(network)
    class_names = spec.classes if spec else [f"class {number}" for number in range(method.num_classes)]
    statistics = method.backbone.data_config
    mean, std = (
        (spec.preprocessing.mean, spec.preprocessing.std) if spec else (statistics["mean"], statistics["std"])
    )
    explanations = explain_images(method, images, maps=maps, classes=classes)
    rows = [
        Row(
            image,
            explanation,
            describe(
                explanation,
                class_names,
                name=names[number] if names else "",
                label=labels[number] if labels else None,
            ),
        )
        for number, (image, explanation) in enumerate(
            zip(to_pixels(images, mean, std), explanations, strict=True)
        )
    ]
    return draw(rows, colormap=colormap, opacity=opacity)


def to_pixels(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> NDArray[np.uint8]:
    """Undo the normalisation: (B, 3, H, W) to uint8 (B, H, W, 3)."""
    scaled = images.detach().float().cpu().permute(0, 2, 3, 1) * torch.tensor(std) + torch.tensor(mean)
    pixels: NDArray[np.uint8] = (255 * scaled).round().clamp(0, 255).to(torch.uint8).numpy()
    return pixels


def describe(
    explanation: Explanation, classes: Sequence[str], *, name: str = "", label: str | None = None
) -> str:
    """Return the text of a row: name, prediction with its probability, true class, class explained."""
    prediction = explanation.prediction
    lines = [name] if name else []
    lines.append(f"predicted: {classes[prediction]} ({explanation.probabilities[prediction]:.0%})")
    if label is not None:
        lines.append("right" if label == classes[prediction] else f"wrong, it is: {label}")
    if any("CAM " in map_ for map_ in explanation.maps):
        lines.append(f"class maps of: {classes[explanation.target]}")
    return "\n".join(textwrap.fill(line, TEXT_WIDTH, break_on_hyphens=False) for line in lines)


def draw(
    rows: Sequence[Row], *, colormap: str = COLORMAP, opacity: float = OPACITY, cell: float = CELL
) -> MapFigure:
    """Draw rows whose explanations have the same maps.

    Args:
        rows: At least one.
        colormap: See ``overlay``.
        opacity: See ``overlay``.
        cell: Side of an image in inches; the figure grows with the number of rows and columns.

    Raises:
        UsageError: For an unknown colormap, or an opacity outside 0 to 1.
    """
    names = list(rows[0].explanation.maps)
    columns = 1 + len(names)
    width, height = TEXT + columns * (cell + GAP) + BAR, HEADS + len(rows) * (cell + GAP)
    drawn = MapFigure(figsize=(width, height), dpi=DPI)
    for number, row in enumerate(rows):
        bottom = height - HEADS - (number + 1) * (cell + GAP) + GAP
        drawn.text(
            (TEXT - 2 * GAP) / width, (bottom + cell / 2) / height, row.text,
            fontsize=8, ha="right", va="center", linespacing=1.4, parse_math=False,
        )  # fmt: skip
        shown = [row.image] + [
            overlay(row.image, map_, colormap=colormap, opacity=opacity)
            for map_ in row.explanation.maps.values()
        ]
        for column, picture in enumerate(shown):
            left = TEXT + column * (cell + GAP)
            axes = drawn.add_axes((left / width, bottom / height, cell / width, cell / height))
            axes.imshow(picture)
            axes.set_axis_off()
            if number == 0:
                axes.set_title(_head(["image", *names][column]), fontsize=9, pad=4)
    _add_colour_bar(drawn, check_colormap(colormap), width, height, cell)
    return drawn


def save_png(drawn: Figure, target: Any) -> None:
    """Write a figure as PNG to a path or an opened file."""
    with warnings.catch_warnings():
        # Names in a script that no font here has become boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        drawn.savefig(target, format="png")


def check_colormap(name: str) -> Colormap:
    """Return the matplotlib colormap called ``name``.

    Raises:
        UsageError: If there is none; the nearest name is suggested.
    """
    if name not in matplotlib.colormaps:
        raise UsageError(
            f"unknown colormap {name!r}.{nearest(name, list(matplotlib.colormaps))} The names are matplotlib's "
            "(https://matplotlib.org/stable/users/explain/colors/colormaps.html)."
        )
    return matplotlib.colormaps[name]


def check_opacity(value: float) -> float:
    """Return an opacity from 0 to 1.

    Raises:
        UsageError: If it is not.
    """
    if not 0 <= value <= 1:
        raise UsageError(f"the opacity must be from 0 to 1, not {value}.")
    return value


def _head(name: str) -> str:
    """Break a map's name: what, stage, part."""
    return name.replace("CAM ", "CAM\n").replace(" part ", "\npart ")


def _add_colour_bar(drawn: Figure, colours: Colormap, width: float, height: float, cell: float) -> None:
    bottom = height - HEADS - cell
    axes = drawn.add_axes(((width - BAR + GAP) / width, bottom / height, 0.1 / width, cell / height))
    bar = drawn.colorbar(ScalarMappable(Normalize(0, 1), colours), cax=axes)
    bar.set_ticks([0, 1], labels=["lowest", "highest"])
    axes.tick_params(labelsize=7, length=2)
