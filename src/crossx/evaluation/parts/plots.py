"""Plot of what the excitations look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from crossx.explain.plotting import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    ORANGE,
    PURPLE,
    SKY_BLUE,
    VERMILION,
    save_png,
)

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY_BLUE, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One more than colours, so that combinations repeat late."""
OBJECT = "whole object"
CHANCE = "0.45"


def plot_parts(
    stages: Mapping[str, Mapping[str, Any]], names: Sequence[str], path: Path, *, title: str
) -> None:
    """Draw the share of activation over chance per part, for each excitation of each stage, as a PNG.

    Excitations differ in colour and marker; error bars are intervals over images, the line at 1 is chance. The title of
    a stage gives its other measures.

    Args:
        stages: Stage name -> result of ``summarize_parts`` and ``size``.
        names: The K parts.
        path: The PNG file to write.
        title: Shown above.

    Raises:
        CrossXError: If the file cannot be written.
    """
    width = max(8.0, 2.0 + 0.7 * (len(names) + 1))
    figure = Figure(figsize=(width, 0.9 + 2.3 * len(stages)), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = figure.subplots(len(stages), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (stage, measured) in zip(panels, stages.items(), strict=True):
        _draw_stage(axes, measured["excitations"], names)
        axes.set_title(_headline(stage, measured), fontsize=9, loc="left", parse_math=False)
    has_object = all(measured["excitations"][0]["object"] for measured in stages.values())
    labels = [*names, *([OBJECT] if has_object else [])]
    panels[-1].set_xticks(range(len(labels)), labels, rotation=35, ha="right", fontsize=9, parse_math=False)
    panels[-1].set_xlim(-0.6, len(labels) - 0.4)
    handles, excitations = panels[0].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(
            handles, excitations, title="excitation", fontsize=8, title_fontsize=8, loc="outside right upper"
        )
    figure.supylabel("share of activation / share of area", fontsize=9)
    save_png(figure, path)


def _draw_stage(axes: Axes, excitations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    axes.axhline(1, color=CHANCE, linewidth=1, zorder=1)
    axes.axvline(len(names) - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.tick_params(axis="y", labelsize=8)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    step = min(0.18, 0.7 / len(excitations))
    for p, excitation in enumerate(excitations):
        numbers = [excitation["share"][name] for name in names]
        if excitation["object"] is not None:
            numbers.append(excitation["object"])
        values = np.array([_positive(number["over_chance"]) for number in numbers])
        ends = [number["over_chance_interval"] or (math.nan, math.nan) for number in numbers]
        low, high = np.array([[_positive(end) for end in pair] for pair in ends]).T
        axes.errorbar(
            np.arange(len(numbers)) + step * (p - (len(excitations) - 1) / 2),
            values,
            yerr=np.maximum(0, [values - low, high - values]),
            fmt=MARKERS[p % len(MARKERS)],
            color=COLOURS[p % len(COLOURS)],
            markersize=5,
            elinewidth=1.4,
            label=str(p + 1),
        )


def _positive(value: float | None) -> float:
    """Return a value for a logarithmic axis, NaN if it is 0 or undefined."""
    return value if value is not None and value > 0 else math.nan


def _headline(stage: str, measured: Mapping[str, Any]) -> str:
    height, width = measured["size"]
    text = f"{stage} ({height} x {width} positions)"
    consistency, diversity = measured["consistency"], measured["diversity"]
    if consistency is None:
        return text
    overlap = diversity["overlap"]
    return (
        f"{text}   NMI {consistency['nmi']:.3f} (chance {consistency['chance']:.3f})   "
        f"focus overlap {overlap['value']:.2f} (chance {overlap['chance']:.2f})   "
        f"correlation {diversity['correlation']['value']:.2f}"
    )
