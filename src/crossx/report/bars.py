"""Bar chart of accuracies."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from crossx.explain.plotting import DARK_BLUE, DPI, SKY_BLUE, VERMILION, save_png


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: Label below it.
        values: Accuracies as fractions, one per seed; the bar shows their mean.
        interval: Error bar, as fractions; None for none.
    """

    name: str
    values: Sequence[float]
    interval: Sequence[float] | None = None


def plot_bars(bars: Sequence[Bar], path: Path, *, title: str, note: str = "", line: str = "") -> None:
    """Draw accuracies in percent: one bar per variant, one dot per seed, a dashed line at the height of one bar.

    The axis starts below the smallest value, not at 0, as in Fig. 3 and 4 of Cross-X, and says so.

    Args:
        bars: At least one.
        path: The PNG file to write.
        title: Shown above.
        note: Shown below: what the error bars are.
        line: Name of the bar with the line; empty for none.

    Raises:
        CrossXError: If the file cannot be written.
    """
    means = [100 * sum(bar.values) / len(bar.values) for bar in bars]
    points = [[100 * value for value in bar.values] for bar in bars]
    ends = [[100 * end for end in bar.interval or ()] for bar in bars]
    shown = [value for values in (*points, *ends) for value in values]
    low, high = min(shown), max(shown)
    floor = max(0.0, low - max(1.0, 0.4 * (high - low)))
    figure = Figure(figsize=(max(5.0, 1.15 * len(bars) + 1.5), 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="0.88", linewidth=0.8)
    axes.bar(range(len(bars)), [mean - floor for mean in means], bottom=floor, width=0.62, color=SKY_BLUE)
    for x, bar in enumerate(bars):
        mean = means[x]
        if bar.name == line:
            axes.axhline(mean, color=VERMILION, linewidth=1, linestyle="--", zorder=1.5)
        if ends[x]:
            below, above = mean - ends[x][0], ends[x][1] - mean
            axes.errorbar(x, mean, [[below], [above]], color="0.25", capsize=4, linewidth=1.2)
        spread = [x + 0.09 * (index - (len(points[x]) - 1) / 2) for index in range(len(points[x]))]
        axes.scatter(spread, points[x], s=16, color=DARK_BLUE, zorder=3)
        top = max([mean, *points[x], *ends[x]])
        axes.annotate(
            f"{mean:.1f}", (x, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=9
        )
    axes.set_xticks(range(len(bars)), [_broken(bar.name) for bar in bars], fontsize=9, parse_math=False)
    axes.set_ylim(floor, high + max(1.0, 0.12 * (high - floor)))
    axes.set_ylabel("top-1 accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(textwrap.fill(title, 60 + 8 * len(bars)), fontsize=11, parse_math=False)
    start = f"The axis starts at {floor:.1f}%. " if floor else ""
    figure.supxlabel(textwrap.fill(f"{start}{note}", 50 + 14 * len(bars)), fontsize=8, color="0.3")
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
