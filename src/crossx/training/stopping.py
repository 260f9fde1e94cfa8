"""When a training ends before its last epoch: patience, and the epochs that fit into a time limit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crossx.errors import counted
from crossx.training.optim import ONE_CYCLE_RISE, warmup_steps
from crossx.training.sections import OptimConfig, TrainerConfig

SLACK = 0.05
"""By how much of an epoch the estimated time may exceed the limit: the last steps are then cut."""
WORTH_MORE = 1.1
"""How many times the planned epochs must fit before the plan is lengthened."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """Counts the validations since the last better one.

    A plateau says nothing while something is still to come that usually helps. So the count begins when every phase
    of the method has begun, the backbone is no longer frozen and the warm-up is over, and it starts over when the
    schedule drops the learning rate.

    Args:
        optim: The options, ``patience`` of which is the number of validations.
        phases: Name of the phase of each epoch.
        steps_per_epoch: Optimiser steps in one epoch.
    """

    optim: OptimConfig
    phases: Sequence[str]
    steps_per_epoch: int

    @property
    def starts(self) -> list[int]:
        """Epochs, counted from 0, at which the count starts; increasing."""
        optim, epochs = self.optim, len(self.phases)
        rise = warmup_steps(optim, self.steps_per_epoch) / self.steps_per_epoch
        if optim.schedule == "one_cycle":
            rise = rise or ONE_CYCLE_RISE * epochs
        last_begun = max((self.phases.index(name) for name in set(self.phases)), default=0)
        first = max(last_begun, optim.freeze_backbone_epochs, math.ceil(rise))
        drops: Sequence[int] = []
        if optim.schedule == "multistep":
            drops = optim.milestones
        elif optim.schedule == "step" and optim.step_size > optim.patience:
            # drops that come more often than that would put off the end forever
            drops = range(optim.step_size, epochs, optim.step_size)
        return [first, *(epoch for epoch in drops if epoch > first)]

    def waited(self, rows: Sequence[Mapping[str, Any]], metric: str) -> int:
        """Return the number of validations since the first best one after the last start.

        Args:
            rows: One row of metrics per epoch, which have ``metric`` if the epoch was validated.
            metric: A metric to maximise.
        """
        begun = [start for start in self.starts if start < len(rows)]
        values = [row[metric] for row in rows[begun[-1] :] if metric in row] if begun else []
        return len(values) - 1 - values.index(max(values)) if values else 0

    def is_exhausted(self, rows: Sequence[Mapping[str, Any]], metric: str) -> bool:
        """Whether the training ends after these epochs."""
        return 0 < self.optim.patience <= self.waited(rows, metric)


def epochs_in_time(planned: int, most: int, ends: Sequence[float], limit: float) -> int:
    """Return how many epochs a training has if it is to end by itself within a time.

    The first epoch is slower than the others (files are not cached, kernels are chosen), so it counts only while it is
    the only one.

    Args:
        planned: Epochs of the present plan, kept if they fit and not clearly more do.
        most: Epochs at most.
        ends: Seconds since the start at the end of each epoch so far, at least one.
        limit: Seconds that the training may take.
    """
    done, spent = len(ends), ends[-1]
    each = spent if done == 1 else (spent - ends[0]) / (done - 1)
    if each <= 0:
        return planned
    fitting = min(most, done + max(0, math.floor((limit - spent) / each + SLACK)))
    return planned if planned <= fitting < max(planned + 1, WORTH_MORE * planned) else fitting


def announce_end(
    by: str,
    trainer: TrainerConfig,
    epoch: int,
    patience: Patience,
    rows: Sequence[Mapping[str, Any]],
    metric: str,
) -> None:
    """Log which option ends a training before its last epoch.

    Args:
        by: The option.
        trainer: The ``--trainer.*`` options.
        epoch: Completed epochs.
        patience: The count of ``optim.patience``.
        rows: Metrics of the epochs.
        metric: The metric that is watched.
    """
    if by == "patience":
        log.info(
            "optim.patience %d: no better %s in %s, so the training ends after epoch %d of %d.",
            patience.optim.patience, metric, counted(patience.waited(rows, metric), "validation"), epoch,
            trainer.max_epochs,
        )  # fmt: skip
    elif by == "max_time":
        log.info(
            "trainer.max_time %s: the training ends after epoch %d of %d.",
            trainer.max_time, epoch, trainer.max_epochs,
        )  # fmt: skip
