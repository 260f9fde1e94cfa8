"""Write the results of a search: the best configuration, a table, JSON and a chart."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from crossx.explain.plotting import DARK_BLUE, DPI, SKY_BLUE, VERMILION, save_png, shorten
from crossx.report.tables import Table, percent
from crossx.runs import SCHEMA, Run, write_json, write_text
from crossx.tuning.outcome import METRIC, TrialResult, Tuned
from crossx.tuning.page import render
from crossx.tuning.space import Choices, Range, short

PANELS = 4
"""Panels per row of the chart."""


def write_results(tuned: Tuned) -> None:
    """Write the results of a search, and note the choice in the best run.

    The files are ``best.yaml``, ``results.json``, ``table.*``, ``search.png`` and ``report.html``.

    Raises:
        CrossXError: If one cannot be written.
    """
    folder, best = tuned.folder, tuned.best
    write_text(folder / "best.yaml", tuned.config.to_yaml())
    write_json(
        folder / "results.json",
        {
            "schema": SCHEMA,
            "metric": METRIC,
            "choice": tuned.sentence(),
            "space": tuned.space.describe(),
            "best": best.number,
            "seconds": tuned.seconds,
            "importances": dict(tuned.importances),
            "trials": [
                {
                    "number": trial.number,
                    "state": trial.state,
                    "values": dict(trial.values),
                    "val_top1": trial.val_top1,
                    "epochs": trial.epochs,
                    "seconds": trial.seconds,
                    "run": trial.run.name,
                    **({"reason": trial.reason} if trial.reason else {}),
                }
                for trial in tuned.trials
            ],
        },
    )
    build_table(tuned).write(folder / "table")
    plot_search(tuned, folder / "search.png")
    write_text(folder / "report.html", render(tuned, build_table(tuned)))
    for trial in tuned.trials:
        _note_choice(Run(trial.run), tuned.sentence() if trial is best else None)


def build_table(tuned: Tuned) -> Table:
    """Return the table of the trials, the best first, then by validation accuracy."""
    names = list(tuned.space.options)
    options = [name.partition(".")[2] for name in names]
    order = sorted(tuned.trials, key=lambda trial: (trial is not tuned.best, *_rank(trial)))
    rows = [
        [
            str(trial.number),
            *(short(trial.values[name]) for name in names),
            percent(trial.val_top1),
            str(trial.epochs),
            "best" if trial is tuned.best else trial.state,
        ]
        for trial in order
    ]
    caption = (
        f"Validation accuracy, percent; the options are {tuned.sentence()}. So it is higher than on new images: "
        "`crossx test` measures these."
    )
    columns = options if len(set(options)) == len(options) else names
    return Table(["trial", *columns, "val", "epochs", "state"], rows, caption)


def plot_search(tuned: Tuned, path: Path) -> None:
    """Draw the validation accuracy of the trials in order, and against each option.

    Raises:
        CrossXError: If the file cannot be written.
    """
    trials = [trial for trial in tuned.trials if trial.val_top1 is not None]
    names = list(tuned.space.options)
    rows = -(-(1 + len(names)) // PANELS)
    columns = min(PANELS, 1 + len(names))
    figure = Figure(figsize=(3.1 * columns, 2.9 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    panels = [panel for line in grid for panel in line]
    for panel, name in zip(panels, [None, *names], strict=False):
        values = None if name is None else tuned.space.options[name]
        for state, marker, colour in (("complete", "o", DARK_BLUE), ("pruned", "x", SKY_BLUE)):
            chosen = [trial for trial in trials if trial.state == state]
            if not chosen:
                continue
            panel.scatter(
                [_position(trial, name, values) for trial in chosen],
                [100 * (trial.val_top1 or 0.0) for trial in chosen],
                s=22, marker=marker, color=colour, label=state,
            )  # fmt: skip
        panel.scatter(
            [_position(tuned.best, name, values)],
            [100 * (tuned.best.val_top1 or 0.0)],
            s=90, facecolors="none", edgecolors=VERMILION, linewidths=1.6, label="best",
        )  # fmt: skip
        panel.grid(axis="y", color="0.88", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_xlabel("trial" if name is None else name, fontsize=9, parse_math=False)
        panel.tick_params(labelsize=8)
        if name is None:
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if isinstance(values, Range) and values.log:
            panel.set_xscale("log")
            panel.set_xlim(values.low / 1.2, values.high * 1.2)
            ticks = [values.low, math.sqrt(values.low * values.high), values.high]
            panel.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            panel.xaxis.set_minor_formatter(NullFormatter())
        if isinstance(values, Choices):
            labels = [shorten(short(value), 16) for value in values.values]
            turned = 25 if max(map(len, labels)) * len(labels) > 24 else 0
            panel.set_xticks(
                range(len(labels)),
                labels,
                rotation=turned,
                ha="right" if turned else "center",
                parse_math=False,
            )
            panel.set_xlim(-0.5, len(labels) - 0.5)
    for panel in panels[1 + len(names) :]:
        panel.set_axis_off()
    for line in grid:
        line[0].set_ylabel("validation top-1, %", fontsize=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, loc="outside upper right", ncols=3, frameon=False
    )
    save_png(figure, path)


def _position(trial: TrialResult, name: str | None, values: Choices | Range | None) -> float:
    if name is None:
        return trial.number
    value = trial.values[name]
    return values.values.index(value) if isinstance(values, Choices) else float(value)


def _rank(trial: TrialResult) -> tuple[int, float, int]:
    states = ("complete", "pruned", "stopped", "failed")
    return states.index(trial.state), -(trial.val_top1 or 0.0), trial.number


def _note_choice(run: Run, sentence: str | None) -> None:
    """Keep in ``run.json`` how the options of the best run were chosen, and only there."""
    info = run.read_info()
    if info and info.get("tuned") != sentence:
        write_json(run.info, {**info, "tuned": sentence})
