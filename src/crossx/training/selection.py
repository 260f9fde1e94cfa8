"""Which epoch's weights become the model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from crossx.data.datamodule import DataModule
from crossx.errors import UsageError
from crossx.training.config import Config

log = logging.getLogger(__name__)


class BestEpoch:
    """The best epoch so far.

    Args:
        monitor: The metric to maximise (ties: the later epoch); None takes the last epoch.

    Attributes:
        best: ``epoch`` (counted from 1) and ``value`` of the best epoch; empty before there is one.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor = monitor
        self.best: dict[str, float] = {}

    def update(self, row: Mapping[str, Any]) -> bool:
        """Return whether an epoch is the best so far; if so, keep it as that."""
        value = row.get(self.monitor) if self.monitor else None
        if value is None or (self.best and value < self.best["value"]):
            return False
        self.best = {"epoch": row["epoch"], "value": value}
        return True

    def describe(self, how: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``selection`` of ``run.json``: how the weights are selected and, once known, the epoch that was.

        Args:
            how: ``optim.selection``.
            rows: The epochs so far.
        """
        if self.monitor is None or (rows and not self.best):
            return {
                "how": "last",
                "split": None,
                "epoch": rows[-1]["epoch"] if rows else None,
                "value": None,
            }
        return {
            "how": how,
            "split": self.monitor.split("/")[0],
            "metric": "top1",
            "epoch": self.best.get("epoch"),
            "value": self.best.get("value"),
        }


def choose_monitor(config: Config, data: DataModule) -> str | None:
    """Return the metric that selects the best epoch, or None to take the last one.

    Raises:
        UsageError: If the selection needs images that the dataset does not have.
    """
    trainer, selection, missing = config.trainer, config.optim.selection, ""
    on_test = selection == "best_on_test"
    if on_test and not data.index.split("test"):
        raise UsageError("optim.selection best_on_test needs test images, and the dataset has none.")
    if not trainer.max_epochs:
        return "test/top1" if on_test else None
    if not data.holds_out and not on_test:
        missing = "There are no validation images"
    elif trainer.limit_val_batches == 0:
        missing = "trainer.limit_val_batches 0 switches validation off"
    elif trainer.check_val_every_n_epoch > trainer.max_epochs:
        missing = f"trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch} is more than trainer.max_epochs"
    if missing and config.optim.patience:
        raise UsageError(
            f"optim.patience {config.optim.patience} needs validation after epochs. {missing}: change that, or leave "
            "out the option."
        )
    if on_test:
        return "test/top1"
    if missing and selection == "best":
        log.warning("%s: the last epoch's weights become the model.", missing)
    return None if missing or selection == "last" else "val/top1"
