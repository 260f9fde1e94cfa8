"""What a search has found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossx.errors import counted
from crossx.runs import Run
from crossx.training.config import Config
from crossx.tuning.space import Space

METRIC = "val/top1"
"""What is searched for, and what prunes."""


@dataclass(frozen=True)
class TrialResult:
    """One trial of a search.

    Attributes:
        number: Counted from 1; trial 1 is the unchanged configuration if the space has it.
        state: ``complete``, ``pruned``, ``failed``, or ``stopped`` (not finished).
        values: ``section.option`` -> value.
        val_top1: Validation accuracy of its final weights if it is complete, else the best of its epochs so far.
        epochs: Trained epochs.
        seconds: Duration of its training.
        run: Its run folder.
        reason: Why it failed.
    """

    number: int
    state: str
    values: Mapping[str, Any]
    val_top1: float | None
    epochs: int
    seconds: float
    run: Path
    reason: str = ""


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        best: The trial with the highest validation accuracy, the first of equals.
        config: Its configuration, without ``output``.
        trials: All trials, in order.
        space: What was searched.
        folder: The folder of the search.
        images: Number of validation images that chose; None if unknown.
        unchanged: The values of the configuration that was searched from; None if the space does not have them.
        seconds: Time that the search took, all calls together.
        importances: Option -> its share in what distinguishes the best complete trials, by Optuna's PED-ANOVA, the
            largest first; empty with too few complete trials.
    """

    best: TrialResult
    config: Config
    trials: Sequence[TrialResult]
    space: Space
    folder: Path
    images: int | None
    unchanged: Mapping[str, Any] | None
    seconds: float
    importances: Mapping[str, float]

    @property
    def run(self) -> Run:
        """The run of the best trial."""
        return Run(self.best.run)

    def sentence(self) -> str:
        """Say how the options were chosen."""
        states = [trial.state for trial in self.trials]
        pruned = f", {states.count('pruned')} of them pruned" if "pruned" in states else ""
        images = f"{self.images:,} validation images" if self.images else "validation images"
        return f"the best of {counted(len(states), 'trial')} of `crossx tune`{pruned}, by the accuracy on {images}"


def best_of(trials: Sequence[TrialResult]) -> TrialResult | None:
    """Return the complete trial with the highest validation accuracy, the first of equals; None if none is complete."""
    complete = (trial for trial in trials if trial.state == "complete")
    return max(complete, key=lambda trial: (trial.val_top1 or 0.0, -trial.number), default=None)
