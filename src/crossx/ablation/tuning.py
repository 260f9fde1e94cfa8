"""Choose the options of each variant on validation images, with the same budget for every variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from crossx.ablation.runner import Trial
from crossx.ablation.suite import Changes, Suite
from crossx.report.tables import Table, percent
from crossx.runs import read_history


def choose_alternatives(trials: Sequence[Trial], failed: Mapping[Trial, str]) -> dict[str, int]:
    """Return variant -> the alternative with the best validation accuracy, the first of equals.

    Args:
        trials: See ``plan_tuning``; those that are not in ``failed`` are trained.
        failed: Trial -> reason. A variant whose trials all failed stays unchanged.
    """
    chosen: dict[str, int] = {}
    best: dict[str, float] = {}
    for trial in trials:
        accuracy = -1.0 if trial in failed else read_validation(trial)
        if accuracy > best.get(trial.variant, float("-inf")):
            chosen[trial.variant], best[trial.variant] = trial.alternative, accuracy
    return chosen


def describe_tuning(
    suite: Suite, trials: Sequence[Trial], failed: Mapping[Trial, str], chosen: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Return one row per training of the search, for JSON: changes, validation accuracy, whether it was chosen."""
    return [
        {
            "variant": trial.variant,
            "alternative": trial.alternative,
            "changes": alternative(suite, trial.variant, trial.alternative),
            "seed": trial.seed,
            "val_top1": None if trial in failed else read_validation(trial),
            "chosen": trial.alternative == chosen[trial.variant],
        }
        | ({"failed": failed[trial]} if trial in failed else {})
        for trial in trials
    ]


def alternative(suite: Suite, variant: str, number: int) -> Changes:
    """Return the changes of a variant's alternative; none for 0."""
    return suite.tune[variant][number - 1] if number else {}


def describe_changes(changes: Changes) -> str:
    """Return changes as options of the command line: ``optim.lr 0.04``."""
    return ", ".join(
        f"{section}.{option} {value}"
        for section, options in changes.items()
        for option, value in options.items()
    )


def build_tuning_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of the rows that ``describe_tuning`` returns."""
    seeds = sorted({row["seed"] for row in rows})
    caption = (
        f"Validation accuracy of every training of the search, percent; seed {', '.join(map(str, seeds))}. "
        "The best of each variant is chosen, the first of equals."
    )
    cells = [
        [
            row["variant"],
            describe_changes(row["changes"]) or "unchanged",
            percent(row["val_top1"]) if "failed" not in row else "failed",
            "chosen" if row["chosen"] else "",
        ]
        for row in rows
    ]
    return Table(["variant", "options", "val", "choice"], cells, caption)


def read_validation(trial: Trial) -> float:
    """Return the validation accuracy of a run's final weights."""
    epochs = read_history(trial.run.path / "metrics.json")
    accuracy: float = epochs[trial.run.read_info()["selection"]["epoch"] - 1]["val/top1"]
    return accuracy
