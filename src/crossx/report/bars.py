"""Accuracies as a bar chart."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from crossx.explain.plotting import DARK_BLUE, DPI, SKY_BLUE, VERMILION, save_png

BAR, DOT, REFERENCE = SKY_BLUE, DARK_BLUE, VERMILION


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: Written below it.
        values: Its accuracies, fractions, one a seed; their mean is its height.
        interval: Its error bar, fractions; None for none.
    """

    name: str
    values: Sequence[float]
    interval: Sequence[float] | None = None


def plot_bars(bars: Sequence[Bar], path: Path, *, title: str, note: str = "", line: str = "") -> None:
    """Draw accuracies in percent: a bar a variant, a dot a seed, a dashed line at one bar's height.

    The axis begins below the smallest value, not at 0, as in Fig. 3 and 4 of Cross-X, and says so.

    Args:
        bars: At least one.
        path: The PNG file to write.
        title: Printed above.
        note: Printed below: what the error bars are.
        line: Name of the bar that has the line; empty for none.

    Raises:
        CrossXError: If the file cannot be written.
    """
    means = [100 * sum(bar.values) / len(bar.values) for bar in bars]
    ends = [100 * value for bar in bars for value in (*bar.values, *(bar.interval or ()))]
    low, high = min(ends), max(ends)
    floor = max(0.0, low - max(1.0, 0.4 * (high - low)))
    figure = Figure(figsize=(max(5.0, 1.15 * len(bars) + 1.5), 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    places = range(len(bars))
    axes.bar(places, [mean - floor for mean in means], bottom=floor, width=0.62, color=BAR)
    for bar, mean in zip(bars, means, strict=True):
        if bar.name == line:
            axes.axhline(mean, color=REFERENCE, linewidth=1, linestyle="--", zorder=1.5)
    for place, bar, mean in zip(places, bars, means, strict=True):
        if bar.interval is not None:
            below, above = mean - 100 * bar.interval[0], 100 * bar.interval[1] - mean
            axes.errorbar(place, mean, [[below], [above]], color="0.25", capsize=4, linewidth=1.2)
        spread = [place + 0.09 * (index - (len(bar.values) - 1) / 2) for index in range(len(bar.values))]
        axes.scatter(spread, [100 * value for value in bar.values], s=16, color=DOT, zorder=3)
        top = max([mean, *(100 * value for value in bar.values), *(100 * v for v in bar.interval or ())])
        axes.annotate(
            f"{mean:.1f}", (place, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(places, [_broken(bar.name) for bar in bars], fontsize=9, parse_math=False)
    axes.set_ylim(floor, high + max(1.0, 0.12 * (high - floor)))
    axes.set_ylabel("top-1 accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(textwrap.fill(title, 60 + 8 * len(bars)), fontsize=11, parse_math=False)
    begins = f"The axis begins at {floor:.1f}%. " if floor else ""
    figure.supxlabel(textwrap.fill(f"{begins}{note}", 50 + 14 * len(bars)), fontsize=8, color="0.3")
    save_png(figure, path)


def _broken(name: str) -> str:
    """Break a long name after its plus and minus signs."""
    lines = [""]
    for part in name.replace("+", "+\n").replace("-", "-\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > 12:
            lines.append(part)
        else:
            lines[-1] += part
    return "\n".join(lines)
