"""The HTML page of a search, self-contained as that of ``crossx report``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from importlib import metadata

from crossx.evaluation.intervals import Interval, share_interval
from crossx.explain.plotting import shorten
from crossx.report import charts
from crossx.report.charts import Chart, Group
from crossx.report.page import page_environment
from crossx.report.tables import Table, points
from crossx.runs import read_history
from crossx.tuning.outcome import METRIC, TrialResult, Tuned
from crossx.tuning.space import Choices, Range, short

STATES = ("complete", "pruned", "failed", "stopped")
LABELS = 50
"""Characters that the labels of a chart's choices have together."""
MARGIN = 0.04
"""Share of an axis that is left free at each end."""


def render(tuned: Tuned, trials: Table) -> str:
    """Return the page as HTML.

    Args:
        tuned: The search.
        trials: The table of its trials.
    """
    measured = [trial for trial in tuned.trials if trial.val_top1 is not None]
    return (
        page_environment("crossx.tuning")
        .get_template("search.html.j2")
        .render(
            tuned=tuned,
            best=tuned.best,
            gain=_gain(tuned),
            interval=_interval(tuned.best.val_top1 or 0.0, tuned.images),
            counts=_counts(tuned),
            seconds=_time(tuned.seconds),
            values=_values(tuned),
            history=_history(measured, tuned.best),
            epochs=_epochs(measured, tuned.best),
            options=[_option(measured, tuned, name) for name in tuned.space.options],
            budget=_budget(tuned),
            left_out=_left_out(tuned),
            failed=[trial for trial in tuned.trials if trial.state == "failed"],
            longest=max(_planned(trial, tuned) for trial in tuned.trials),
            trials=trials,
            charts=charts,
            version=metadata.version("crossx"),
        )
    )


def _gain(tuned: Tuned) -> str | None:
    """Return by how much the best trial is above the unchanged configuration; None if that is not complete."""
    for trial in tuned.trials:
        if trial.values == tuned.unchanged and trial.state == "complete":
            return points((tuned.best.val_top1 or 0.0) - (trial.val_top1 or 0.0))
    return None


def _interval(accuracy: float, images: int | None) -> Interval | None:
    """Return the exact interval of an accuracy; the standard error would be 0 for 100%."""
    return share_interval(round(accuracy * images), images) if images else None


def _counts(tuned: Tuned) -> dict[str, int]:
    states = [trial.state for trial in tuned.trials]
    return {state: states.count(state) for state in STATES if state in states}


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _values(tuned: Tuned) -> Table:
    columns = ["option", "best trial", *(["configuration"] if tuned.unchanged else []), "searched"]
    rows = [
        [
            name,
            short(tuned.best.values[name]),
            *([short(tuned.unchanged[name])] if tuned.unchanged else []),
            _described(values),
        ]
        for name, values in tuned.space.options.items()
    ]
    return Table(columns, rows, "The options that were searched")


def _described(values: Choices | Range) -> str:
    if isinstance(values, Choices):
        return ", ".join(map(short, values.values))
    spacing = ", logarithmic" if values.log else f", in steps of {values.step:g}" if values.step else ""
    return f"{short(values.low)} to {short(values.high)}{spacing}"


def _by_state(
    trials: Sequence[TrialResult], best: TrialResult, position: Callable[[TrialResult], float]
) -> list[Group]:
    """Return the accuracies of complete and pruned trials, and of the best one."""
    groups = []
    for state in ("complete", "pruned"):
        if chosen := [trial for trial in trials if trial.state == state]:
            curve = [_point(trial, position) for trial in chosen]
            groups.append(Group(state, [curve], "dot" if state == "complete" else "ring"))
    return [*groups, Group("best", [[_point(best, position)]], "halo")]


def _point(trial: TrialResult, position: Callable[[TrialResult], float]) -> tuple[float, float, str]:
    values = ", ".join(f"{name} {short(value)}" for name, value in trial.values.items())
    accuracy = trial.val_top1 or 0.0
    return position(trial), accuracy, f"trial {trial.number}, {trial.state}: {accuracy:.1%}; {values}"


def _history(trials: Sequence[TrialResult], best: TrialResult) -> Chart:
    """Draw the accuracy of the trials in order, and the best complete one so far as steps."""
    steps: list[tuple[float, float, str]] = []
    for trial in trials:
        highest = steps[-1][1] if steps else 0.0
        if steps:
            steps.append((trial.number, highest, ""))
        if trial.state == "complete":
            steps.append((trial.number, max(highest, trial.val_top1 or 0.0), ""))
    groups = [
        *_by_state(trials, best, lambda trial: trial.number),
        Group("best so far", [steps], "line"),
    ]
    first, last = trials[0].number, trials[-1].number
    ticks = charts.whole_ticks(first, last)
    return charts.accuracy_chart("Trials in order", groups, (first - 0.5, last + 0.5), ticks, x_title="trial")


def _epochs(trials: Sequence[TrialResult], best: TrialResult) -> Chart | None:
    """Draw the accuracy of each trial after each epoch; None if no trial was validated twice."""
    curves = {}
    for trial in trials:
        path = trial.run / "metrics.json"
        rows = read_history(path) if path.is_file() else []
        curve = [(float(row["epoch"]), float(row[METRIC]), "") for row in rows if METRIC in row]
        if len(curve) > 1:
            curves[trial.number] = curve
    groups = []
    for label in ("complete", "pruned", "best"):
        chosen = [best] if label == "best" else [trial for trial in trials if trial.state == label]
        if drawn := [curves[trial.number] for trial in chosen if trial.number in curves]:
            groups.append(Group(label, drawn, "line"))
    if not groups:
        return None
    epochs = [x for group in groups for curve in group.curves for x, _, _ in curve]
    span = (min(epochs), max(epochs))
    return charts.accuracy_chart("After each epoch", groups, span, charts.whole_ticks(*span), x_title="epoch")


def _option(trials: Sequence[TrialResult], tuned: Tuned, name: str) -> Chart:
    """Draw the accuracy of the trials over the values of an option."""
    searched = tuned.space.options[name]

    def position(value: float) -> float:
        if isinstance(searched, Choices):
            return searched.values.index(value)
        return math.log10(value) if searched.log else float(value)

    if isinstance(searched, Choices):
        length = max(3, LABELS // len(searched.values))
        ticks = [(float(index), shorten(short(value), length)) for index, value in enumerate(searched.values)]
        span = (-0.5, len(searched.values) - 0.5)
    else:
        low, high = position(searched.low), position(searched.high)
        margin = MARGIN * (high - low)
        middle = (low + high) / 2
        values = [searched.low, 10**middle if searched.log else middle, searched.high]
        ticks = [
            (position(value), f"{value:g}" if searched.whole else short(float(value))) for value in values
        ]
        span = (low - margin, high + margin)
    groups = _by_state(trials, tuned.best, lambda trial: position(trial.values[name]))
    return charts.accuracy_chart(name, groups, span, ticks)


def _budget(tuned: Tuned) -> Table:
    rows = []
    for state in (*_counts(tuned), "all"):
        chosen = [trial for trial in tuned.trials if state in (trial.state, "all")]
        epochs, seconds = sum(trial.epochs for trial in chosen), sum(trial.seconds for trial in chosen)
        rows.append([state, str(len(chosen)), str(epochs), _time(seconds)])
    return Table(
        ["trials", "number", "epochs", "training"], rows, "Trials, epochs and time of their training"
    )


def _left_out(tuned: Tuned) -> tuple[int, int] | None:
    """Return the epochs that pruning left out, and those that the pruned trials would have had; None without any."""
    pruned = [trial for trial in tuned.trials if trial.state == "pruned"]
    planned = sum(_planned(trial, tuned) for trial in pruned)
    return (planned - sum(trial.epochs for trial in pruned), planned) if pruned else None


def _planned(trial: TrialResult, tuned: Tuned) -> int:
    epochs: int = trial.values.get("trainer.max_epochs", tuned.config.trainer.max_epochs)
    return epochs
