"""The epochs of a training, and the learning rates over them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from crossx.errors import counted
from crossx.training.config import Config
from crossx.training.optim import build_scheduler, rise_fits
from crossx.training.sections import OptimConfig
from crossx.training.stopping import epochs_in_time

log = logging.getLogger(__name__)


class Plan:
    """Number of epochs, their options, and the schedule that follows from both.

    Args:
        config: The options.
        saved: ``state_dict`` of the checkpoint to resume from, if any. It counts if the limits are the same.

    Attributes:
        epochs: Epochs of the whole training: ``max_epochs``, or fewer if ``max_time`` leaves no time for all of them.
        optim: The options of a training of so many epochs.
    """

    def __init__(self, config: Config, saved: Mapping[str, Any] | None = None) -> None:
        self._config, self._most = config, config.trainer.max_epochs
        self.time_limit = config.trainer.seconds
        self.epochs = self._most
        if saved and saved.get("limits") == self._limits():
            self.epochs = saved["epochs"]
        for note in config.optim.shortened_to(self._most)[1]:
            log.warning(note)
        self.optim = self._options_for(self.epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of epochs and the options on which it depends, for the checkpoints."""
        return {"epochs": self.epochs, "limits": self._limits()}

    def start(self, optimizer: Optimizer, steps_per_epoch: int, skipped: int) -> None:
        """Start the schedule.

        Args:
            optimizer: The optimiser, with its peak learning rates.
            steps_per_epoch: Its steps in one epoch.
            skipped: Steps that an epoch cut short by ``max_steps`` or ``max_time`` had left.
        """
        self._optimizer, self.steps_per_epoch, self._skipped = optimizer, steps_per_epoch, skipped
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._build()

    def step(self) -> None:
        """Set the learning rates of the next step."""
        self._scheduler.step()

    def schedule_state(self) -> dict[str, Any]:
        """Return the state of the schedule, for the checkpoints."""
        state: dict[str, Any] = self._scheduler.state_dict()
        return state

    def continue_at(self, position: int, *, warns: bool = True) -> None:
        """Set the learning rates of a step. They differ from the present ones if the length has changed."""
        before = self._highest_rate()
        # from the schedule of the present length, not from the checkpoint's: both are functions of the step
        state = self._scheduler.state_dict() | {"last_epoch": position - 1, "_step_count": position}
        self._scheduler.load_state_dict(state)
        with warnings.catch_warnings():
            # after one step, torch misses the step that was before the checkpoint
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self._scheduler.step()
        now = self._highest_rate()
        if warns and now != before:
            log.warning(
                "optim.schedule %s is now that of %d epochs: the learning rate, which was at %.2g, continues at %.2g.",
                self.optim.schedule, self.epochs, before, now,
            )  # fmt: skip

    def fit_into_time(self, ends: Sequence[float]) -> bool:
        """Plan the number of epochs from the time that they take, and fit options and schedule to it.

        Args:
            ends: Seconds since the start at the end of each epoch so far, at least one; the same on every rank.

        Returns:
            Whether options and schedule have changed.
        """
        epochs = epochs_in_time(self.epochs, self._most, ends, self.time_limit)
        if epochs == self.epochs:
            return False
        self.epochs = epochs
        if epochs <= len(ends):
            return False
        log.info(
            "trainer.max_time %s has time for %d of %s, and schedule and phases become those of %d.",
            self._config.trainer.max_time, epochs, counted(self._most, "epoch"), epochs,
        )  # fmt: skip
        self.optim = self._options_for(epochs)
        self._build()
        self.continue_at(len(ends) * self.steps_per_epoch, warns=False)
        return True

    def _limits(self) -> list[float]:
        """Return the options on which the number of epochs depends."""
        return [self._most, self.time_limit]

    def _options_for(self, epochs: int) -> OptimConfig:
        """Return the options of a training of so many epochs; fewer than ``max_epochs`` only for lack of time."""
        optim = self._config.optim
        optim = optim.in_proportion(epochs, self._most) if epochs < self._most else optim
        return optim.shortened_to(epochs)[0]

    def _build(self) -> None:
        total, most = self.steps_per_epoch * self.epochs, self._config.trainer.max_steps
        # without an epoch no step follows, but one_cycle needs one
        total = max(1, min(total, most + self._skipped) if most >= 0 else total)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak
        if self.epochs < self._most and not rise_fits(self.optim, self.steps_per_epoch, total):
            # too late for an error
            self.optim = replace(self.optim, warmup_epochs=0.0, warmup_steps=0)
        self._scheduler = build_scheduler(
            self._optimizer, self.optim, steps_per_epoch=self.steps_per_epoch, total_steps=total
        )

    def _highest_rate(self) -> float:
        return max(float(group["lr"]) for group in self._optimizer.param_groups)
