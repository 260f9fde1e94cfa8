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
VIEW_NAMES = {
    "flip": "flipped",
    "upside_down": "upside down",
    "quarter_turn": "quarter turn",
    "tilt": "tilted",
    "zoom": "zoomed",
}
FIXED_NAMES = {"rows": "rows", "columns": "columns", "ring": "ring", "other_images": "other images"}
VIEWS_TITLE = "filled: moves with the image; hollow: stays in place"


def plot_parts(
    stages: Mapping[str, Mapping[str, Any]], names: Sequence[str], path: Path, *, title: str, map_name: str
) -> None:
    """Draw the measures of each map of each stage, as a PNG.

    On the left the share of activation over chance per part (the line at 1), if there are parts; on the right whether
    the maps move with the image, and their correlation with fixed maps. Maps differ in colour and marker; error
    bars are intervals over images. The title of a stage gives its other measures.

    Args:
        stages: Stage name -> result of ``summarize_stage``; without views, of ``summarize_parts`` and ``size``.
        names: The K parts.
        path: The PNG file to write.
        title: Shown above.
        map_name: What the method calls a map, the title of the legend.

    Raises:
        CrossXError: If the file cannot be written.
    """
    drawn = {"shares": bool(names), "views": all(_has_views(measured) for measured in stages.values())}
    columns = [name for name, wanted in drawn.items() if wanted]
    widths = {"shares": max(6.5, 1.5 + 0.7 * (len(names) + 1)), "views": 6.5}
    figure = Figure(
        figsize=(1.5 + sum(widths[name] for name in columns), 0.9 + 2.5 * len(stages)),
        dpi=DPI,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = figure.subplots(
        len(stages),
        len(columns),
        sharex="col",
        sharey="col",
        squeeze=False,
        width_ratios=[widths[name] for name in columns],
    )
    for row, (stage, measured) in zip(panels, stages.items(), strict=True):
        for axes, column in zip(row, columns, strict=True):
            if column == "shares":
                _draw_shares(axes, measured["excitations"], names)
            else:
                _draw_views(axes, measured["excitations"])
        row[0].set_title(_headline(stage, measured), fontsize=9, loc="left", parse_math=False)
    has_object = all(measured["excitations"][0]["object"] for measured in stages.values())
    labels = {
        "shares": [*names, *([OBJECT] if has_object else [])],
        "views": [*VIEW_NAMES.values(), *FIXED_NAMES.values()],
    }
    for axes, column in zip(panels[-1], columns, strict=True):
        axes.set_xticks(
            range(len(labels[column])), labels[column], rotation=35, ha="right", fontsize=9, parse_math=False
        )
        axes.set_xlim(-0.6, len(labels[column]) - 0.4)
    for axes in panels[:, 0] if drawn["shares"] else ():
        axes.yaxis.set_major_locator(_ticks(*axes.get_ylim()))
        axes.set_ylabel("share of activation\n/ share of area", fontsize=8)
    for axes in panels[:, -1] if drawn["views"] else ():
        axes.set_ylabel("correlation r", fontsize=8)
    # of the stage with the most maps
    handles, numbers = max(
        (axes.get_legend_handles_labels() for axes in panels[:, 0]), key=lambda found: len(found[0])
    )
    if len(handles) > 1:
        figure.legend(
            handles, numbers, title=map_name, fontsize=8, title_fontsize=8, loc="outside right upper"
        )
    save_png(figure, path)


def _ticks(low: float, high: float) -> LogLocator:
    """Return ticks for a logarithmic axis, so few that their labels do not overlap."""
    decades = math.log10(high / low)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 1.5 else (1.0, 3.0) if decades < 3 else (1.0,)
    return LogLocator(subs=subs)


def _has_views(measured: Mapping[str, Any]) -> bool:
    return all("other_images" in excitation for excitation in measured["excitations"])


def _draw_views(axes: Axes, excitations: Sequence[Mapping[str, Any]]) -> None:
    """Draw r with the moved map (filled) and with the map in place (hollow) of each view, then r with fixed maps."""
    axes.axhline(0, color=CHANCE, linewidth=1, zorder=1)
    axes.axvline(len(VIEW_NAMES) - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.set_ylim(-1.05, 1.05)
    _style(axes)
    axes.set_title(VIEWS_TITLE, fontsize=8, loc="right")
    for p, excitation in enumerate(excitations):
        numbers = [excitation[name] for name in (*VIEW_NAMES, *FIXED_NAMES)]
        places = np.arange(len(numbers)) + _offset(p, len(excitations))
        values = np.array([number["value"] for number in numbers])
        low, high = np.array([number["interval"] for number in numbers]).T
        style: dict[str, Any] = {"color": COLOURS[p % len(COLOURS)], "markersize": 5}
        marker = MARKERS[p % len(MARKERS)]
        axes.errorbar(
            places,
            values,
            yerr=np.maximum(0, [values - low, high - values]),
            fmt=marker,
            elinewidth=1.4,
            label=str(p + 1),
            **style,
        )
        in_place = [excitation[name]["frame"] for name in VIEW_NAMES]
        axes.plot(places[: len(in_place)], in_place, linestyle="", marker=marker, fillstyle="none", **style)


def _draw_shares(axes: Axes, excitations: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    axes.axhline(1, color=CHANCE, linewidth=1, zorder=1)
    axes.axvline(len(names) - 0.5, color="0.85", linewidth=0.8, zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _style(axes)
    for p, excitation in enumerate(excitations):
        numbers = [excitation["share"][name] for name in names]
        if excitation["object"] is not None:
            numbers.append(excitation["object"])
        values = np.array([_positive(number["over_chance"]) for number in numbers])
        ends = [number["over_chance_interval"] or (math.nan, math.nan) for number in numbers]
        low, high = np.array([[_positive(end) for end in pair] for pair in ends]).T
        axes.errorbar(
            np.arange(len(numbers)) + _offset(p, len(excitations)),
            values,
            yerr=np.maximum(0, [values - low, high - values]),
            fmt=MARKERS[p % len(MARKERS)],
            color=COLOURS[p % len(COLOURS)],
            markersize=5,
            elinewidth=1.4,
            label=str(p + 1),
        )


def _style(axes: Axes) -> None:
    axes.grid(axis="y", color="0.92", linewidth=0.6)
    axes.tick_params(axis="y", labelsize=8)
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)


def _offset(number: int, count: int) -> float:
    """Return where an excitation is drawn, relative to its tick."""
    return min(0.18, 0.7 / count) * (number - (count - 1) / 2)


def _positive(value: float | None) -> float:
    """Return a value for a logarithmic axis, NaN if it is 0 or undefined."""
    return value if value is not None and value > 0 else math.nan


def _headline(stage: str, measured: Mapping[str, Any]) -> str:
    height, width = measured["size"]
    text = f"{stage} ({height} x {width} positions)"
    consistency, diversity = measured["consistency"], measured["diversity"]
    if diversity is not None:
        text += f"   correlation {diversity['correlation']['value']:.2f}"
    if consistency is not None:
        text += f"   NMI {consistency['nmi']:.3f} (chance {consistency['chance']:.3f})"
    if nmi := (measured.get("keypoints") or {}).get("nmi"):
        text += f"   keypoint NMI {nmi['value']:.3f} (chance {nmi['chance']:.3f}, frame {nmi['frame']:.3f})"
    return text
